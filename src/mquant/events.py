"""The core's only voice. It emits events; whoever called it decides how, and if, they look."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` bytes of `stage` are finished. `total` is known before the first byte.

    `workers` is how many other processes are at it; 0 where this one does it.
    """

    stage: str
    done: int
    total: int
    workers: int = 0


@dataclass(frozen=True, slots=True)
class Note:
    """One sentence worth a person's attention."""

    level: Literal["info", "warning"]
    message: str


Event = Progress | Note
Emit = Callable[[Event], None]


def silent(_event: Event) -> None:
    """An `Emit` that says nothing."""
