"""Tokenize the beginning of a text: only as much of the text is read as the tokens need."""

import codecs
import hashlib
import subprocess
import sys
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from mquant.checkpoint import Source
from mquant.errors import SourceError
from mquant.forward.decoder import Integers
from mquant.text import size
from mquant.untrusted import MAX_TEXT_BYTES, open_named

_TOKENIZER: Final = "tokenizer.json"
_FIRST: Final = 300_000
"""Bytes to read first. A byte of a text that is one word takes 200 bytes of memory."""
_MARGIN: Final = 50_000
"""Characters before the end of what was read: text that follows could change the tokens there."""

_PROGRAM: Final = Path(__file__).with_name("tokenize_text.py")
_DAMAGED: Final = b"damaged: "
_SECONDS: Final = 300
# Bytes of memory that tokenizing may take, in all, for a byte of tokenizer.json (measured: 21), and
# for a byte of text (measured: 200).
_MEMORY: Final = 100_000_000
_MEMORY_OF_TOKENIZER: Final = 30
_MEMORY_OF_TEXT: Final = 320


@dataclass(frozen=True)
class TextTokens:
    """The tokens of the first `bytes` bytes of a text, which have `sha256`.

    `whole`: these bytes are the whole text.
    """

    ids: Integers
    bytes: int
    sha256: str
    whole: bool


def read_tokens(text: Path, sources: list[Source], count: int) -> TextTokens:
    """Return the first `count` tokens of a text, or more; fewer only if the text has fewer.

    The tokens are those of the whole text. The tokenizer is that of the first source that has one.

    Raises DataFileError if the text cannot be read, and SourceError if it is not UTF-8, has fewer
    than two tokens, or hardly a token in 32 bytes, or if the tokenizer cannot be read.
    """
    tokenizer = _read_tokenizer(sources)
    first = max(_FIRST, 8 * count)
    with open_named(text, "Give a file of text in UTF-8.") as file:
        for most in (first, 4 * first):
            file.seek(0)
            raw = file.read(most)
            whole = len(raw) < most
            try:  # a character that the end of `raw` cuts is left out
                string, used = codecs.utf_8_decode(raw, "strict", whole)
            except UnicodeDecodeError:
                fix = "Convert the text, e.g. with iconv."
                raise SourceError("The text is not UTF-8.", fix) from None
            ids, ends = _tokenize(tokenizer, raw[:used])
            settled = len(ends) if whole else bisect_right(ends, len(string) - _MARGIN)
            if whole or settled >= count:
                break
        else:  # a terabyte of zeros may be one token
            raise SourceError(
                f"The first {used:,} bytes of the text have only {settled:,} tokens.",
                "Give a text in a language that the tokenizer knows, or ask for fewer --tokens.",
            )
    if settled < 2:
        raise SourceError("The text has fewer than two tokens.", "Give a longer text.")
    return TextTokens(ids[:settled], used, hashlib.sha256(raw[:used]).hexdigest(), whole)


def _read_tokenizer(sources: list[Source]) -> bytes:
    # Only tokenizer.json, which is data, is read: no tokenizer code of the checkpoint runs.
    holder = next((source for source in sources if _TOKENIZER in source.files), None)
    if holder is None:
        raise SourceError(
            f"{sources[0].name} has no {_TOKENIZER}.",
            "Copy the parent's file, or write it with AutoTokenizer(...).save_pretrained.",
        )
    if holder.files[_TOKENIZER] > MAX_TEXT_BYTES:
        raise SourceError(f"{_TOKENIZER} is too large to be valid.", "Get the file again.")
    return holder.read(_TOKENIZER)


def _tokenize(tokenizer: bytes, text: bytes) -> tuple[Integers, Integers]:
    """Return the ids of a text's tokens, and where each token ends, in characters.

    Raises SourceError for a tokenizer that cannot be understood, or takes too much memory or time.
    """
    memory = _MEMORY + _MEMORY_OF_TOKENIZER * len(tokenizer) + _MEMORY_OF_TEXT * len(text)
    # -P: without this flag, imports would find files beside the program.
    command = [sys.executable, "-P", str(_PROGRAM), str(memory), str(len(tokenizer))]
    try:
        done = subprocess.run(  # noqa: S603 -- our own program; untrusted input goes to stdin
            command, input=tokenizer + text, capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise SourceError(
            f"{_TOKENIZER} takes more than {_SECONDS} s for {len(text):,} bytes of text.",
            "Get the file again, or ask for fewer --tokens.",
        ) from None
    if done.stderr.startswith(_DAMAGED):
        reason = done.stderr.removeprefix(_DAMAGED).decode("utf-8", "replace")
        reason = " ".join(reason.split())[:300]
        raise SourceError(f"{_TOKENIZER} cannot be understood: {reason}.", "Get the file again.")
    if done.returncode:
        raise SourceError(
            f"{_TOKENIZER} cannot tokenize {len(text):,} bytes of text in {size(memory)}.",
            "Get the file again: a tokenizer that writes a long text for a short one is damaged.",
        )
    both = np.frombuffer(done.stdout, np.int64)
    return both[: len(both) // 2], both[len(both) // 2 :]
