"""An OpenAI-compatible server in this process whose replies the test sets."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

MODEL = "org/Tiny-NVFP4"


class FakeServer:
    """The server: `answer` returns a reply's text for a prompt; all replies have `status`."""

    def __init__(self) -> None:
        self.answer: Callable[[str], str | None] = lambda _prompt: "I do not know."
        self.status = 200
        self.finish = "stop"
        self.context = 32_768
        self.raw: bytes | None = None
        """The body of every reply, in place of JSON; None: JSON."""
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        server = self

        class Handler(_Handler):
            pass

        Handler.server_ = server
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_: FakeServer
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self.server_.keys.append(self.headers.get("Authorization"))
        model = {"id": MODEL, "object": "model", "max_model_len": self.server_.context}
        self._reply({"object": "list", "data": [model]} if self.path == "/v1/models" else None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server_.bodies.append(body)
        text = self.server_.answer(body["messages"][0]["content"])
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": self.server_.finish}
        self._reply({"choices": [choice]} if self.path == "/v1/chat/completions" else None)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _reply(self, value: object) -> None:
        body = json.dumps(value).encode() if self.server_.raw is None else self.server_.raw
        self.send_response(self.server_.status if value is not None else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """Yield a server; the environment has no OPENAI_API_KEY."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    fake = FakeServer()
    try:
        yield fake
    finally:
        fake.close()


__all__ = ["MODEL", "FakeServer", "server"]
