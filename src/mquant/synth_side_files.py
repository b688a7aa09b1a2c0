"""The files of a synthetic checkpoint beside its shards: a tokenizer of bytes, and its config."""

from typing import Any


def side_files(vocabulary: int) -> dict[str, dict[str, Any]]:
    """Return the files beside the weights on the hub that mquant can generate."""
    files: dict[str, dict[str, Any]] = {
        "generation_config.json": {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 40,
            "top_p": 0.95,
        }
    }
    if vocabulary >= 256:
        files["tokenizer.json"] = _byte_tokenizer()
        files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return files


def _byte_tokenizer() -> dict[str, Any]:
    """Return a tokenizer without merges: every byte of the text is a token, its id the byte."""
    # GPT-2's alphabet: printable bytes are themselves, other bytes the characters from 256 on.
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    vocabulary = {chr(byte if byte in plain else next(others)): byte for byte in range(256)}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
