"""Tokenize the beginning of a text: only as much of the text is read as the tokens need."""

import codecs
import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mquant.checkpoint import Source
from mquant.errors import SourceError
from mquant.tokens.in_child import MARGIN
from mquant.tokens.tokenizer import Integers, read_tokenizer
from mquant.untrusted import open_named

_FIRST: Final = 300_000
"""Bytes to read first. A byte of a text that is one word takes 200 bytes of memory."""


@dataclass(frozen=True)
class TextTokens:
    """The tokens of the first `bytes` bytes of a text, which have `sha256`.

    `whole`: these bytes are the whole text.
    """

    ids: Integers
    bytes: int
    sha256: str
    whole: bool


def read_tokens(text: Path, sources: Sequence[Source], count: int) -> TextTokens:
    """Return the first `count` tokens of a text, or more; fewer only if the text has fewer.

    The tokens are those of the whole text. The tokenizer is that of the first source that has one.

    Raises DataFileError if the text cannot be read, and SourceError if it is not UTF-8, has fewer
    than two tokens, or hardly a token in 32 bytes, or if the tokenizer cannot be read.
    """
    tokenizer = read_tokenizer(sources)
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
            ids, ends = tokenizer.encode_with_ends(string, "text")
            settled = len(ends) if whole else bisect_right(ends, len(string) - MARGIN)
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
