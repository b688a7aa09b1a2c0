"""A hub in this process: an HTTP server on 127.0.0.1 that serves folders as repos, datasets/ too.

The server speaks the part of the hub's protocol that huggingface_hub 1.33 uses for reading: model
info and file trees with sizes, HEAD and GET of files with ranges, the error headers, and a "CDN"
under another host name to which requests for weights are redirected; `uploads` has the rest.
A test can make the hub fail or drop connections; the hub counts requests and bytes.

    def test_headers_cost_few_bytes(hub: FakeHub) -> None:
        hub.add("org/model", folder)
        HubRepo("org/model")
        assert hub.bytes_served < 100_000

The fixture `hub` also sets HF_ENDPOINT, the cache folder and the token file, also for children.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import uploads
from hub_repos import GOOD_TOKEN, PIECE, POOR_TOKEN, Commit, Repo, Request, etag, is_lfs, listing

Ranges = Literal["served", "ignored", "shifted", "cut short"]

_FILE = re.compile(r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API = re.compile(
    r"/api/(?:models/)?(?P<repo>(?:(?<=/api/)datasets/)?[^/]+/[^/]+?)"
    r"(?:/(?P<kind>revision|tree)/(?P<revision>[^/]+))?"
)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # of five, connections beyond wait a second, and then three


class FakeHub:
    """The hub. Call `close` at the end, or take the fixture `hub`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.bytes_served = 0
        self.bytes_received = 0
        """Bytes of large files."""
        self.ranges: Ranges = "served"
        self.latency = 0.0
        """Seconds before each answer."""
        self.bytes_per_second = 0.0
        """The bandwidth of all downloads and uploads together; 0: no limit."""
        self.redirect_to = ""
        """The URL to which requests for large files are redirected; `{path}` is the request's path.

        If the URL is empty, the requests are redirected to the CDN.
        """
        self.tamper: Callable[[bytes], bytes] | None = None
        """A function that changes the body of a JSON answer, like a listing, before sending."""
        self.drops = 0
        """The number of the next file uploads that break off half-way."""
        self.drop_after: int | None = None
        """The number of stored files from which on every upload breaks off; None: no limit."""
        self.flips: str | None = None
        """The name of a file whose last byte is sent with one bit changed."""
        self.loses: str | None = None
        """The name of a file that commits leave out."""
        self.before_commit: list[Callable[[], object]] = []
        """Functions that the hub calls before it makes the next commits, one for each."""
        self.lost_answers = 0
        """The number of the next commits that the hub makes and answers with 504."""
        self.commits: list[Commit] = []
        self.stored: dict[str, Path] = {}
        """sha256 -> path of each large file that was uploaded, committed or not."""
        self.scratch = Path(tempfile.mkdtemp(prefix="fakehub-"))
        """The folder of the uploaded large files and of the folders of commits."""
        self._free_at = 0.0
        self._failures: list[tuple[int, dict[str, str]]] = []
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        """The hub's address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def cdn(self) -> str:
        """The address of the same server under another host name."""
        return f"http://localhost:{self.port}"

    def add(
        self,
        repo_id: str,
        folder: Path,
        *,
        revision: str = "main",
        access: Literal["public", "gated", "private"] = "public",
    ) -> str:
        """Serve a folder as a repo, or as another branch of the repo; return the commit."""
        digest = hashlib.sha1(repo_id.encode())  # noqa: S324
        for path, size in listing(folder):
            digest.update(f"{path}\0{size}\0{etag(folder / path)}".encode(errors="surrogateescape"))
        commit = digest.hexdigest()
        repo = self.repos.setdefault(repo_id, Repo())
        repo.access = access
        repo.folders[commit] = folder
        repo.revisions[revision] = commit
        return commit

    def fail(self, status: int, times: int = 1, **headers: str) -> None:
        """Answer the next `times` requests with a status, and headers like `Retry_After="0"`."""
        fields = {key.replace("_", "-"): value for key, value in headers.items()}
        self._failures += [(status, fields)] * times

    def environment(self, where: Path) -> dict[str, str]:
        """Return the environment of a process with this hub, a token, and caches in `where`."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(where / "home"),
            "HF_TOKEN": GOOD_TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "XDG_CACHE_HOME": str(where / "cache"),
        }

    def forget(self) -> None:
        """Reset the counts of requests and bytes."""
        self.requests.clear()
        self.bytes_served = self.bytes_received = 0

    def close(self) -> None:
        """Stop the server, and delete the scratch folder."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def note(self, request: Request) -> tuple[int, dict[str, str]] | None:
        """Count a request; return the failure with which to answer the request, or None."""
        with self._lock:
            self.requests.append(request)
            return self._failures.pop(0) if self._failures else None

    def served(self, count: int) -> None:
        """Count bytes of a body that the hub sends."""
        with self._lock:
            self.bytes_served += count
        self.pace(count)

    def received(self, count: int) -> None:
        """Count bytes of an upload of a large file."""
        with self._lock:
            self.bytes_received += count
        self.pace(count)

    def pace(self, count: int) -> None:
        """Wait as long as `count` bytes take at the bandwidth."""
        if not self.bytes_per_second:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + count / self.bytes_per_second
            wait = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait))


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    # HTTP/1.0 closes the connection after a request: no connection is open when the server stops.
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        # A client may close the connection before the end of the answer.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _answer(self) -> None:
        if self.hub.latency:
            time.sleep(self.hub.latency)
        host = self.headers.get("Host", "").partition(":")[0]
        authorization = self.headers.get("Authorization")
        failure = self.hub.note(
            Request(host, self.command, self.path, self.headers.get("Range"), authorization)
        )
        if failure is not None:
            return self.send(failure[0], b"", failure[1])
        url = urlsplit(self.path)
        if self.command in ("POST", "PUT"):
            return uploads.answer(self, unquote(url.path))
        if match := _API.fullmatch(url.path):
            return self._api(match, parse_qs(url.query))
        if match := _FILE.fullmatch(url.path):
            return self._file(match, on_cdn=host == "localhost")
        return self.error(404, "", "Not Found")

    def _api(self, match: re.Match[str], query: dict[str, list[str]]) -> None:
        # The hub shows the listing of a gated repo to everyone.
        revision = self._find(match["repo"], match["revision"] or "main", route="api")
        if revision is None:
            return None
        repo, commit, folder = revision
        entries = []
        for path, size in listing(folder):
            entry: dict[str, Any] = {"size": size, "oid": etag(folder / path)}
            if is_lfs(path):
                entry["lfs"] = {"oid": etag(folder / path), "size": size, "pointerSize": 134}
            entries.append((path, entry))
        if match["kind"] == "tree":
            return self.json([{"type": "file", "path": path, **e} for path, e in entries])
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path, _ in entries]
        if "blobs" in query:
            for sibling, (_, entry) in zip(siblings, entries, strict=True):
                sibling |= {"blobId": entry["oid"], "size": entry["size"]}
                if "lfs" in entry:
                    sibling["lfs"] = {"sha256": entry["oid"], "size": entry["size"]}
        return self.json(
            {
                "id": match["repo"],
                "modelId": match["repo"],
                "sha": commit,
                "private": repo.access == "private",
                "gated": "manual" if repo.access == "gated" else False,
                "disabled": False,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _file(self, match: re.Match[str], *, on_cdn: bool) -> None:
        revision = self._find(match["repo"], match["revision"], route="cdn" if on_cdn else "file")
        if revision is None:
            return None
        _, commit, folder = revision
        name = unquote(match["path"])
        if name not in dict(listing(folder)):
            return self.error(404, "EntryNotFound", "Entry not found")
        path = folder / name
        size = path.stat().st_size
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_lfs(name) and not on_cdn:
            target = self.hub.redirect_to or self.hub.cdn + "{path}"
            headers |= {
                "Location": target.replace("{path}", self.path),
                "X-Linked-Size": str(size),
                "X-Linked-Etag": f'"{etag(path)}"',
            }
            return self.send(302, b"", headers)
        return self._bytes(path, size, headers)

    def _bytes(self, path: Path, size: int, headers: dict[str, str]) -> None:
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end, status = 0, size, HTTPStatus.OK
        if byte_range and self.hub.ranges != "ignored":
            start = int(byte_range[1])
            end = min(size, int(byte_range[2]) + 1) if byte_range[2] else size
            if start >= size:
                return self.send(416, b"", {"Content-Range": f"bytes */{size}"})
            if self.hub.ranges == "shifted":
                start, end = start + 1, min(size, end + 1)
            status = HTTPStatus.PARTIAL_CONTENT
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._head(status, {**headers, "Content-Length": str(end - start)})
        if self.command == "HEAD":
            return None
        if self.hub.ranges == "cut short":
            end = start + (end - start) // 2
        with path.open("rb") as file:
            file.seek(start)
            while start < end:
                piece = file.read(min(PIECE, end - start))
                # The bytes are counted first: the client may read the count at once.
                self.hub.served(len(piece))
                start += len(piece)
                if path.name == self.hub.flips and start == size:
                    piece = piece[:-1] + bytes([piece[-1] ^ 1])
                self.wfile.write(piece)
        return None

    def _find(
        self, repo_id: str, revision: str, *, route: Literal["api", "file", "cdn"]
    ) -> tuple[Repo, str, Path] | None:
        """Return the repo, the commit and the commit's folder, or None after sending an error."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", GOOD_TOKEN, POOR_TOKEN):
            self.error(401, "", "Invalid credentials in Authorization header")
            return None
        repo = self.hub.repos.get(repo_id)
        restricted = {"api": ("private",), "file": ("private", "gated"), "cdn": ()}[route]
        denied = repo is not None and repo.access in restricted and token != GOOD_TOKEN
        if repo is None or (denied and repo.access == "private"):
            # Without a token the hub does not say whether the repo exists.
            self.error(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        if denied:
            message = f"Access to model {repo_id} is restricted."
            self.error(403 if token else 401, "GatedRepo", message)
            return None
        ref = unquote(revision)
        commit = repo.revisions.get(ref, ref)
        if commit not in repo.folders:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {ref}")
            return None
        return repo, commit, repo.folders[commit]

    def error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def json(self, value: object) -> None:
        body = json.dumps(value).encode()
        body = self.hub.tamper(body) if self.hub.tamper else body
        self.send(200, body, {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.hub.served(len(body))
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


@pytest.fixture
def hub(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """Yield a fake hub that is the hub of this process and of its child processes."""
    from huggingface_hub import constants

    home = tmp_path_factory.mktemp("hf-home")
    hub = FakeHub()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    # huggingface_hub reads the environment once, at its import.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        hub.close()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def writable(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    """Return the hub, set up for uploads: plain LFS instead of Xet, a token, and quick retries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from mquant.checkpoint import retry

    sleep = time.sleep
    hurried = SimpleNamespace(time=time.time, sleep=lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr(_http, "time", hurried)
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return hub


__all__ = ["GOOD_TOKEN", "POOR_TOKEN", "FakeHub", "hub", "writable"]
