"""Try again after failures that may pass: a busy server, a broken connection."""

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from mquant.errors import MquantError
from mquant.events import Emit, Note

T = TypeVar("T")

TRIES: Final = 5
BACKOFF_SECONDS: Final = 0.5
LONGEST_BACKOFF: Final = 60.0
LONGEST_WAIT: Final = 300.0  # the hub's own window of rate limits
LONGEST_TOLD_WAIT: Final = 3900.0  # the hub limits the commits of an hour
_SHORTEST_TOLD_WAIT: Final = 1.0


class Again(Exception):
    """A failure that may pass. `wait`: the seconds that the server asks for; `tries`: the limit."""

    def __init__(self, error: MquantError, wait: float | None = None, tries: int = TRIES) -> None:
        super().__init__(error.message)
        self.error = error
        self.wait = wait
        self.tries = tries


def retrying(attempt: Callable[[], T], emit: Emit | None = None) -> T:
    """Return the result of `attempt`, tried again after failures that may pass.

    Each wait is longer than the last, or as long as the server asks. `emit` receives a line that
    says until when; only then a wait may be longer than five minutes. Raises the last failure's
    error if there were too many attempts, or the server asks for too long a wait.
    """
    failures, longest = 0, LONGEST_TOLD_WAIT if emit else LONGEST_WAIT
    while True:
        try:
            return attempt()
        except Again as failure:
            failures += 1
            wait = failure.wait
            if wait is None:  # jitter, so that sixteen readers do not retry at the same instant
                wait = min(BACKOFF_SECONDS * 2 ** (failures - 1), LONGEST_BACKOFF)
                wait *= random.uniform(0.75, 1.25)  # noqa: S311
            if failures >= failure.tries or wait > longest:
                raise failure.error from None
            if emit and wait >= _SHORTEST_TOLD_WAIT:
                until = datetime.now(UTC).astimezone() + timedelta(seconds=wait)
                reason = failure.error.message.rstrip(".")
                emit(Note("warning", f"{reason}: waiting until {until:%H:%M:%S %Z}."))
        time.sleep(wait)
