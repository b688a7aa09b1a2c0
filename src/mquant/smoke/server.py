"""A client of an OpenAI-compatible server.

The server's answers are untrusted: sizes and types are checked. OPENAI_API_KEY is sent if it is
set, and appears in no message.
"""

import contextlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from mquant.errors import SourceError, UsageError
from mquant.text import clean
from mquant.untrusted import parse_json

MAX_ANSWER_BYTES: Final = 10_000_000
CONNECT_SECONDS: Final = 10.0

_THOUGHT: Final = re.compile(r"\A.*</think>", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """A model's answer, without its reasoning. `whole`: the answer was not cut off."""

    text: str
    whole: bool


class Server:
    """A server at `url`, with or without the `/v1` of its API.

    `model` and its `context` in tokens (None if the server does not say) are known after `choose`.
    Raises UsageError for a string that is no http address. All methods raise SourceError if the
    server's answer has an unexpected form. The caller closes the server.
    """

    def __init__(self, url: str, *, seconds: float) -> None:
        import httpx  # slow to import

        split = None
        with contextlib.suppress(ValueError):
            split = urlsplit(url)
        if split is None or split.scheme not in ("http", "https") or not split.hostname:
            raise UsageError(
                f"{clean(url[:96])!r} is no address of a server.",
                "Example: mquant smoke http://localhost:8000",
            )
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._seconds = seconds
        self.name = split.netloc.rpartition("@")[2]
        key = os.environ.get("OPENAI_API_KEY")
        if key and not (key.isascii() and key.isprintable()):
            raise UsageError("OPENAI_API_KEY is malformed.", "A key is letters, digits and signs.")
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS),
        )
        self.model = ""
        self.context: int | None = None

    def choose(self, model: str | None = None) -> str:
        """Choose the served model named `model`, or the first; return the name of the choice."""
        served = self._models()
        chosen = served[0] if model is None else next((m for m in served if m["id"] == model), None)
        if chosen is None:
            raise SourceError(
                f"{self.name} does not serve {model}, but {', '.join(m['id'] for m in served)}.",
                "Give a served model with --model, or leave --model out.",
            )
        self.model = chosen["id"]
        context = chosen.get("max_model_len")
        self.context = context if type(context) is int and context > 0 else None
        return self.model

    def close(self) -> None:
        """Close the server's connections."""
        self._client.close()

    def ask(self, prompt: str, options: Mapping[str, float]) -> Answer:
        """Return the answer to one message, sampled with `options` (the API's own keys)."""
        message = {"role": "user", "content": prompt}
        body = {"model": self.model, "messages": [message], **options}
        reply = self._request("POST", "/chat/completions", body)
        try:
            choice = reply["choices"][0]
            text = choice["message"].get("content") or ""
            whole = choice.get("finish_reason") != "length"
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._nonsense() from None
        if not isinstance(text, str):
            raise self._nonsense()
        return Answer(_THOUGHT.sub("", text).strip(), whole)

    def _models(self) -> list[dict[str, Any]]:
        entries = self._request("GET", "/models").get("data")
        models = [
            entry
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        ]
        if not models:
            raise self._nonsense()
        return models

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        import httpx

        raw, end = bytearray(), time.monotonic() + self._seconds
        try:
            with self._client.stream(method, self._base + path, json=body) as response:
                for piece in response.iter_bytes():
                    raw += piece
                    if len(raw) > MAX_ANSWER_BYTES:
                        raise self._nonsense()
                    if time.monotonic() > end:  # httpx limits the wait for each piece alone
                        raise httpx.ReadTimeout("")
        except httpx.TimeoutException:
            raise SourceError(
                f"{self.name} did not answer within {self._seconds:,.0f} s.",
                "Look at the server's log, or give a longer --timeout.",
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            raise SourceError(
                f"{self.name} cannot be reached.", "Start the server, or check the address."
            ) from None
        if response.status_code in (401, 403):
            raise SourceError(
                f"{self.name} requires a key (HTTP {response.status_code}).", "Set OPENAI_API_KEY."
            )
        if response.status_code != 200:
            raise SourceError(
                f"{self.name} answers HTTP {response.status_code} to {path}.",
                "Look at the server's log.",
            )
        try:
            reply = parse_json(bytes(raw))
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self._nonsense()
        return reply

    def _nonsense(self) -> SourceError:
        return SourceError(
            f"{self.name} does not answer as an OpenAI-compatible server does.",
            "Give the address of such a server, e.g. http://localhost:8000.",
        )
