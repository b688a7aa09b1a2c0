"""Tokenize the beginning of a text: only as much of the text is read as the tokens need."""

import codecs
import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mquant.checkpoint import Source
from mquant.errors import SourceError
from mquant.forward.decoder import Integers
from mquant.untrusted import MAX_TEXT_BYTES, open_named

_TOKENIZER: Final = "tokenizer.json"
_FIRST: Final = 300_000
"""Bytes to read first. A byte of a text that is one word takes 200 bytes of memory."""
_MARGIN: Final = 50_000
"""Characters before the end of what was read: text that follows could change the tokens there."""


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
    tokenizer = _tokenizer(sources)
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
            encoding = tokenizer.encode(string, add_special_tokens=False)
            ends = [end for _, end in encoding.offsets]
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
    ids = np.array(encoding.ids[:settled], np.int64)
    return TextTokens(ids, used, hashlib.sha256(raw[:used]).hexdigest(), whole)


def _tokenizer(sources: list[Source]) -> Any:
    # Only tokenizer.json, which is data, is read: no tokenizer code of the checkpoint runs.
    from tokenizers import Tokenizer

    holder = next((source for source in sources if _TOKENIZER in source.files), None)
    if holder is None:
        raise SourceError(
            f"{sources[0].name} has no {_TOKENIZER}.",
            "Copy the parent's file, or write it with AutoTokenizer(...).save_pretrained.",
        )
    if holder.files[_TOKENIZER] > MAX_TEXT_BYTES:
        raise SourceError(f"{_TOKENIZER} is too large to be valid.", "Get the file again.")
    try:
        tokenizer = Tokenizer.from_str(holder.read(_TOKENIZER).decode("utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise SourceError(
            f"{_TOKENIZER} cannot be understood: {error}.", "Get the file again."
        ) from error
    tokenizer.no_truncation()  # some files say how to cut and fill the texts of a training
    tokenizer.no_padding()
    return tokenizer
