"""Try again after failures that may pass: a busy server, a broken connection."""

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from mquant.errors import MquantError

T = TypeVar("T")

TRIES: Final = 5
BACKOFF_SECONDS: Final = 0.5
LONGEST_WAIT: Final = 300.0  # the hub's own window of rate limits


class Again(Exception):
    """A failure that may pass. `wait`: the seconds that the server asks for; `tries`: the limit."""

    def __init__(self, error: MquantError, wait: float | None = None, tries: int = TRIES) -> None:
        super().__init__(error.message)
        self.error = error
        self.wait = wait
        self.tries = tries


def retrying(attempt: Callable[[], T]) -> T:
    """Return the result of `attempt`, tried again after failures that may pass.

    Each wait is longer than the last, or as long as the server asks. Raises the last failure's
    error if there were too many attempts, or the server asks for too long a wait.
    """
    failures = 0
    while True:
        try:
            return attempt()
        except Again as failure:
            failures += 1
            wait = failure.wait
            if wait is None:  # jitter, so that sixteen readers do not retry at the same instant
                wait = BACKOFF_SECONDS * 2 ** (failures - 1) * random.uniform(0.75, 1.25)  # noqa: S311
            if failures >= failure.tries or wait > LONGEST_WAIT:
                raise failure.error from None
        time.sleep(wait)
