"""Temporary replacement of an attribute of upstream's code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Replace `owner.name` by `stand_in` within the block.

    Upstream offers no argument for what the engines need; each use says what is replaced and why.
    `owner` is a module or a class. No other thread may run upstream's code within the block.
    """
    original = vars(owner)[name]
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)
