"""How much of a text the calibration data holds, by a sketch of the data's tokens in mquant.json.

Every run of WINDOW tokens of a sample has a hash, whatever its place; the sketch holds the smallest
of the hashes (A. Broder, On the resemblance and containment of documents, 1997). A text that has
the same tokens has the same hashes, so the share of the text's small hashes that are in the sketch
estimates the share of the text that the data holds.

A sketch does not see text that differs every few words, such as another edition or a translation;
text that another tokenizer or a chat template cut differently; or overlap so short that none of its
hashes is in the sketch: with 500,000 tokens of data, a few hundred tokens.
"""

import base64
import binascii
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from mquant.tokens.tokenizer import Integers

WINDOW: Final = 32
"""Tokens in a row: longer than phrases that many texts share."""
_HASHES: Final = 2048
_BASE: Final = np.uint64(0x9E3779B97F4A7C15)  # odd: the fraction of the golden ratio
_MIX: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))

_Hashes = npt.NDArray[np.uint64]


def sketch(samples: Iterable[Integers]) -> str:
    """Return the smallest hashes of the samples, as little-endian uint64 in base64."""
    smallest = np.empty(0, np.uint64)
    for ids in samples:
        smallest = np.union1d(smallest, _hashes(ids))[:_HASHES]
    return base64.b64encode(smallest.astype("<u8").tobytes()).decode()


def overlap(ids: Integers, sketched: object) -> float:
    """Return the estimated share of a text that the data of a sketch holds, 0 to 1.

    `sketched` is untrusted; the share is 0 for anything but a sketch.
    """
    known = _parsed(sketched)
    text = np.unique(_hashes(ids))
    if len(known) == _HASHES:  # of more windows than these, the sketch says nothing
        text = text[text <= known[-1]]
    return float(np.isin(text, known).mean()) if len(known) and len(text) else 0.0


def _parsed(sketched: object) -> _Hashes:
    try:
        raw = base64.b64decode(sketched if isinstance(sketched, str) else "", validate=True)
        return np.unique(np.frombuffer(raw[: 8 * _HASHES], "<u8").astype(np.uint64))
    except (binascii.Error, ValueError):
        return np.empty(0, np.uint64)


def _hashes(ids: Integers) -> _Hashes:
    """Return the hash of each run of WINDOW tokens: a polynomial, then splitmix64's mixing."""
    tokens = ids.astype(np.uint64) + np.uint64(1)
    count = max(0, len(tokens) - WINDOW + 1)
    hashes = np.zeros(count, np.uint64)
    for start in range(WINDOW):
        hashes = hashes * _BASE + tokens[start : start + count]
    for shift, factor in zip((30, 27), _MIX, strict=True):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * factor
    return hashes ^ (hashes >> np.uint64(31))
