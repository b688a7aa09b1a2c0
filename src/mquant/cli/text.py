"""Parse sizes and shares that a person types. `mquant.text` formats them."""

import re
from typing import Final

from mquant.errors import UsageError
from mquant.text import clean

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b)?", re.IGNORECASE)
_POWER: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Return the bytes in `5GB`, `500MB`, `1GiB` or `5000000000`. Raises UsageError otherwise."""
    match = _SIZE.fullmatch(text.strip())
    if match:
        number, prefix, binary = match[1], (match[2] or "").lower(), match[3]
        count = int(float(number) * (1024 if binary else 1000) ** _POWER[prefix])
        if 0 < count < 2**53 and not (binary and not prefix):
            return count
    raise UsageError(
        f"{clean(text[:40])!r} is no size.", "Write a size like 5GB, 500MB, 1GiB or 5000000000."
    )


def parse_share(text: str) -> tuple[int, int]:
    """Return the number and the count in `3/16`. Raises UsageError otherwise."""
    number, slash, of = text.partition("/")
    if slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of) <= 10_000:
        return int(number), int(of)
    raise UsageError(
        f"{clean(text[:40])!r} is no share.", "Write a share like 1/16, the first of 16."
    )
