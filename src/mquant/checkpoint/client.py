"""huggingface_hub's HTTP client in this process, which sends the token to the hub alone.

huggingface_hub compares host names only before it sends the token on, so the token would reach
another port of the hub's host. The rule is said here once, for every request of every room.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from mquant.checkpoint.retry import LONGEST_WAIT, asked_to_wait

if TYPE_CHECKING:
    import httpx

BUSY: Final = frozenset({429, 500, 502, 503, 504})
_PORTS: Final = {"http": 80, "https": 443}
_longest: Final = ContextVar("longest", default=LONGEST_WAIT)
"""The seconds that huggingface_hub may wait for a busy hub, without a line that says so.

A context variable has its default in huggingface_hub's own threads.
"""


def endpoint() -> str:
    """Return the hub's address: HF_ENDPOINT, or huggingface_hub's."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return the scheme, host and port of an address. Raises ValueError if there is no such."""
    split = urlsplit(url)
    return split.scheme, split.hostname, split.port or _PORTS.get(split.scheme)


@cache
def guard_token() -> None:
    """Have huggingface_hub's client send the token to the hub's scheme, host and port only."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> "httpx.Client":
        made = default_client_factory()
        hooks = made.event_hooks
        made.event_hooks = {
            "request": [*hooks["request"], _keep_token],
            "response": [*hooks["response"], _raise_busy],
        }
        return made

    set_client_factory(client)


@contextmanager
def busy_raises() -> Iterator[None]:
    """Have requests to a busy hub fail at once: huggingface_hub would wait and say nothing."""
    with _waiting(-1.0):
        yield


@contextmanager
def busy_returns() -> Iterator[None]:
    """Have requests return a busy hub's answer: for requests that mquant itself sends."""
    with _waiting(math.inf):
        yield


@contextmanager
def _waiting(longest: float) -> Iterator[None]:
    token = _longest.set(longest)
    try:
        yield
    finally:
        _longest.reset(token)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes: huggingface_hub wraps its own errors."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _keep_token(request: "httpx.Request") -> None:
    if not _is_hub(request):
        request.headers.pop("Authorization", None)


def _raise_busy(response: "httpx.Response") -> None:
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    busy = response.status_code in BUSY and _is_hub(response.request)
    if busy and (asked_to_wait(response.headers) or 0.0) > _longest.get():
        response.read()
        hf_raise_for_status(response)


def _is_hub(request: "httpx.Request") -> bool:
    return origin(str(request.url)) == origin(endpoint())
