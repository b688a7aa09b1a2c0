"""Open and parse untrusted files: what a file may be, and how much of it is read, is bounded first.

Parsed JSON takes up to 60 times the memory of its text, and deep nesting overflows the stack of
every later walk. So brackets, colons and commas of the text are counted first.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from mquant.errors import DataFileError

MAX_TENSORS: Final = 1_000_000
"""Limit on tensors: twice as many as the largest known checkpoint has, Kimi-K3 with 497,387."""
MAX_DEPTH: Final = 50
MAX_TEXT_BYTES: Final = 100_000_000  # in memory: one emoji makes every character take 4 bytes
MAX_INDEX_BYTES: Final = 160_000_000
_SPARE: Final = 10_000
HEADER: Final = {
    "{": MAX_TENSORS + _SPARE,
    "[": 2 * MAX_TENSORS + _SPARE,
    ":": 4 * MAX_TENSORS + _SPARE,
    ",": 9 * MAX_TENSORS,
}
"""Limits of a header: per tensor an object, two lists, four keys and numbers; plus __metadata__."""
RECORD: Final = {"{": 290_000, "[": 290_000, ":": 870_000, ",": 870_000}
"""Limits of config.json, a hub's listing and mquant's own records."""
INDEX: Final = RECORD | {":": MAX_TENSORS + _SPARE, ",": MAX_TENSORS + _SPARE}
"""Limits of an index: a name and a file per tensor, and metadata."""


class TooMuch(ValueError):
    """A JSON text that holds more than any document of its kind."""


def is_file(path: Path) -> bool:
    """Return whether there is such a regular file, even for a path that no system can look up."""
    try:
        return path.is_file()
    except OSError:  # a name that is too long, or a folder that may not be searched
        return False


@contextmanager
def open_named(path: Path, fix: str, most: int | None = None) -> Iterator[BufferedReader]:
    """Open a regular file of at most `most` bytes that the user named.

    Raises DataFileError, with `fix`, for any other file, or if the file cannot be opened or read.
    """
    try:
        # Opening a pipe without a writer would block; a pipe or a device may never end.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise DataFileError(f"{path} is not a regular file.", fix)
            if most is not None and status.st_size > most:
                raise DataFileError(f"{path} is too large: mquant reads {most:,} bytes.", fix)
            yield file
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror or error}.", fix) from error


def parse_json(
    raw: bytes,
    most: dict[str, int] = RECORD,
    *,
    most_bytes: int = MAX_TEXT_BYTES,
    parse_int: Callable[[str], Any] | None = None,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises TooMuch if the text could take more than `most_bytes`, or has more of some character than
    `most` allows, and ValueError if the text is no JSON, is nested deeper than MAX_DEPTH, or holds
    half of a surrogate pair, which UTF-8 cannot encode.
    """
    width = 1 if raw.isascii() else 4
    if width * len(raw) > most_bytes or any(raw.count(c.encode()) > most[c] for c in most):
        raise TooMuch
    text = raw.decode("utf-8")
    del raw  # a text and its bytes may be 160 MB each
    try:
        value = json.loads(text, parse_int=parse_int, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for node in level for item in _items(node) if isinstance(item, dict | list)]
        if not level:
            break
    else:
        raise ValueError("nested too deeply")
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _items(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
