"""Try again after failures that may pass: a busy server, a broken connection."""

import contextlib
import email.utils
import random
import re
import time
from collections.abc import Callable, Mapping
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
_LONGEST_SAID: Final = 1e9  # later times may be beyond the last year of `datetime`
# The hub limits commits by the hour, and says so in a sentence only.
_RETRY_IN: Final = re.compile(
    r"retry this action in (?:about |less than )?([0-9]{1,4}|an?) (second|minute|hour)"
)
_SECONDS: Final = {"second": 1, "minute": 60, "hour": 3600}


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
    error if there were too many attempts, or the server asks for too long a wait: then the error
    says until when.
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
            if wait > longest:
                raise _later(failure.error, wait) from None
            if failures >= failure.tries:
                raise failure.error from None
            if emit and wait >= _SHORTEST_TOLD_WAIT:
                reason = failure.error.message.rstrip(".")
                emit(Note("warning", f"{reason}: waiting until {_after(wait):%H:%M:%S %Z}."))
        time.sleep(wait)


def _later(error: MquantError, wait: float) -> MquantError:
    """Return the error with the time that the server asks to wait for."""
    reason = error.message.rstrip(".")
    return type(error)(
        f"{reason}: the hub asks to wait until {_after(wait):%H:%M %Z on %Y-%m-%d}.",
        "Run the same command again then; it resumes.",
    )


def _after(seconds: float) -> datetime:
    return datetime.now(UTC).astimezone() + timedelta(seconds=min(seconds, _LONGEST_SAID))


def asked_to_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait: Retry-After in either form, the hub's rate limit, or sentence."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    retry_after = headers.get("Retry-After", "").strip()
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    if retry_after:
        with contextlib.suppress(ValueError):
            when = email.utils.parsedate_to_datetime(retry_after)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            return max(0.0, (when - datetime.now(UTC)).total_seconds())
    limit = parse_ratelimit_headers(headers)
    if limit and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    if match := _RETRY_IN.search(headers.get("X-Error-Message", "")):
        return _SECONDS[match[2]] * (float(match[1]) if match[1].isdigit() else 1.0)
    return None
