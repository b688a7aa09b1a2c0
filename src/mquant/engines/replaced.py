"""An attribute of upstream's code, replaced for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Let `owner.name` be `stand_in` within the block.

    Upstream offers no argument for what the engines need here; each use says what is replaced and
    why. `owner` is a module or a class, and no other thread runs upstream's code meanwhile.
    """
    original = vars(owner)[name]
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)
