"""Events that the core emits. The caller decides whether and how events are shown."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of `stage`: `done` of `total` bytes are finished.

    `total` is known before the first byte. `workers` counts the other processes that do the
    work; 0 if this process does the work. `part` says what is under way: `layer 3 of 62`.
    """

    stage: str
    done: int
    total: int
    workers: int = 0
    part: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """One sentence that a person should read."""

    level: Literal["info", "warning"]
    message: str


Event = Progress | Note
Emit = Callable[[Event], None]


def silent(_event: Event) -> None:
    """Ignore an event: an `Emit` that shows nothing."""
