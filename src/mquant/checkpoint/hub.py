"""A hub repo as a `Source`: its list of files, and ranges of files by HTTP.

A hub's answer may lie: the commit, names, sizes, ranges and lengths are checked. Functions import
huggingface_hub and httpx when they need them: the import takes a third of a second, and
`mquant --help` needs neither.
"""

import contextlib
import hashlib
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NoReturn
from urllib.parse import quote, urljoin, urlsplit

from mquant import __version__
from mquant.checkpoint.client import BUSY, busy_returns, endpoint, guard_token, origin
from mquant.checkpoint.download import download
from mquant.checkpoint.listing import Listing, parse_listing
from mquant.checkpoint.retry import Again, asked_to_wait, retrying
from mquant.checkpoint.source import Folder, Stamp
from mquant.errors import SourceError
from mquant.events import Emit, Note

if TYPE_CHECKING:
    import httpx

MAX_LISTING_BYTES: Final = 16_000_000
# The most bytes to skip if a server ignores ranges.
MAX_SKIPPED_BYTES: Final = 16_000_000
MOST_KEPT_BYTES: Final = 16_000_000  # of small files in memory, such as config.json
TRIES_TO_CONNECT: Final = 3  # a hub that does not answer will not answer in ten seconds
TIMEOUT_SECONDS: Final = 30.0
MAX_REDIRECTS: Final = 5

_TRANSIENT: Final = BUSY | {408}
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_LOG_IN: Final = "log in with `hf auth login` or set HF_TOKEN"


class NoSuchRepo(SourceError):
    """A repo that does not exist, or that the token may not see."""


class HubRepo:
    """A model repo on the hub, at one commit.

    The object's creation fixes the commit: later reads read that commit, even if somebody pushes
    another commit. `sha256` has the hub's digests of large files, `blobs` git's ids of small files.
    Any thread may read. HF_ENDPOINT and the token are huggingface_hub's, read at the object's
    creation; the token is sent to that address only. `requests` and `bytes_read` count requests and
    bytes, retries included.

    Raises SourceError if the repo cannot be listed.
    """

    repo_type: Literal["model", "dataset"] = "model"

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        from huggingface_hub import constants
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import build_hf_headers, validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            raise SourceError(
                f"{repo_id[:96]!r} is neither an existing folder nor a hub repo id.",
                "Give an existing folder, or a repo id such as org/model.",
            ) from None
        self.repo_id = repo_id
        self.revision = revision
        self.endpoint = endpoint()
        guard_token()
        self.requests = 0
        self.bytes_read = 0
        self._kept: dict[str, bytes] = {}
        self._moved: dict[str, str] = {}  # an address -> the address of its redirect
        self._count = threading.Lock()
        self._headers: dict[str, str] = {
            **build_hf_headers(
                token=(not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and hub_token()) or False,
                library_name="mquant",
                library_version=__version__,
            ),
            # A range of a compressed file would be a range of other bytes.
            "Accept-Encoding": "identity",
        }
        listing = self._list()
        self.commit, self.private = listing.commit, listing.private
        self.files, self.sha256, self.blobs = listing.files, listing.sha256, listing.blobs

    @property
    def name(self) -> str:
        """The repo id."""
        return self.repo_id

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        """The size of each file, and no times: the commit fixes the content."""
        return {path: Stamp(size) for path, size in self.files.items()}

    @property
    def folders(self) -> tuple[Path, ...]:
        """Empty: the files are not on this machine."""
        return ()

    def materialize(self, emit: Emit, only: Collection[str] | None = None) -> Folder:
        """Download the commit, or its files that `only` names, into the Hugging Face cache."""
        emit(Note("info", f"Downloading {self.repo_id}."))
        return download(self, emit, only)

    @property
    def host(self) -> str:
        """The hub's host name, for messages: HF_ENDPOINT may hold a password."""
        return host_of(self.endpoint)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes [start, end) of a file, from one request if no request fails.

        A small file that was read whole is not asked for again: the commit fixes its bytes.
        """
        size = self.files.get(path)
        if size is None:
            raise SourceError(
                f"{self.repo_id} has no file {path!r}.", "Check the repo and --revision."
            )
        end = size if end is None else end
        if not 0 <= start <= end <= size:
            raise SourceError(
                f"{path} ends at byte {size:,}; {end:,} were expected.",
                "The file is truncated on the hub: tell the repo's owner.",
            )
        if start == end:
            return b""
        if path in self._kept:
            return self._kept[path][start:end]
        url = f"{self.endpoint}/{self._path}/resolve/{self.commit}/{quote(path)}"
        data = retrying(lambda: self._range(url, path, start, end))
        if end - start == size and self.digest(path) and not self.lists(path, data):
            raise SourceError(
                f"{self.host} sent another {path} of {self.repo_id} than it lists.",
                "Run the same command again to download the file again.",
            )
        kept = sum(len(whole) for whole in [*self._kept.values()])
        if path in self.blobs and end - start == size and kept + size <= MOST_KEPT_BYTES:
            self._kept[path] = data
        return data

    def digest(self, path: str) -> str:
        """Return the sha256 or git's id that the hub lists for a file; empty if it lists none."""
        return self.sha256.get(path) or self.blobs.get(path, "")

    def lists(self, path: str, content: bytes) -> bool:
        """Return whether `content` has the digest that the hub lists for the file."""
        if path in self.sha256:
            return hashlib.sha256(content).hexdigest() == self.sha256[path]
        blob = b"blob %d\0" % len(content) + content
        return hashlib.sha1(blob).hexdigest() == self.blobs.get(path)  # noqa: S324 -- git's id

    def identity(self) -> dict[str, str]:
        """Return the repo id and the commit."""
        return {"kind": "hub", "repo": self.repo_id, "commit": self.commit}

    def _list(self) -> Listing:
        revision = quote(self.revision or "main", safe="")
        url = f"{self.endpoint}/api/{self.repo_type}s/{self.repo_id}/revision/{revision}?blobs=true"
        try:
            return parse_listing(retrying(lambda: self._whole(url)))
        except ValueError as error:
            raise self.nonsense(str(error)) from None

    def _whole(self, url: str) -> bytes:
        with self._get(url, {}) as response:
            if response.status_code != 200:
                self.refuse(response)
            data = self._body(response, 0, MAX_LISTING_BYTES + 1)
        if len(data) > MAX_LISTING_BYTES:
            raise self.nonsense("lists more files than any checkpoint has")
        return data

    def _range(self, url: str, path: str, start: int, end: int) -> bytes:
        size = self.files[path]
        part = (start, end) != (0, size)
        headers = {"Range": f"bytes={start}-{end - 1}"} if part else {}
        with self._get(url, headers) as response:
            skip = 0
            if response.status_code == 206 and part:
                self._check_range(response, path, start, end)
            elif response.status_code == 200:
                skip = start  # the server sends the whole file: skip the bytes before
            else:
                self.refuse(response, path)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise self.nonsense(f"compresses {path} though asked not to")
            if skip > MAX_SKIPPED_BYTES:
                raise SourceError(
                    f"{self.host} does not serve parts of files ({path}).",
                    f"Download {self.repo_id} and give the folder.",
                )
            data = self._body(response, skip, end - start)
        if len(data) != end - start:
            raise Again(
                SourceError(
                    f"{self.host} sent {len(data):,} of {end - start:,} bytes of {path}.",
                    "Try again later.",
                )
            )
        return data

    def _check_range(self, response: "httpx.Response", path: str, start: int, end: int) -> None:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        size = str(self.files[path])
        if not match or match.groups() not in (
            (str(start), str(end - 1), size),
            (str(start), str(end - 1), "*"),
        ):
            raise self.nonsense(f"answers with another part of {path} than asked for")

    def _body(self, response: "httpx.Response", skip: int, limit: int) -> bytes:
        """Return `limit` bytes of a body after the first `skip`; later bytes are never read."""
        data = bytearray()
        for chunk in response.iter_raw():
            with self._count:
                self.bytes_read += len(chunk)
            rest = chunk[skip:]
            skip -= len(chunk) - len(rest)
            data += rest[: limit - len(data)]
            if len(data) == limit:
                break
        return bytes(data)

    @contextlib.contextmanager
    def _get(self, url: str, headers: dict[str, str]) -> "Iterator[httpx.Response]":
        """Send a GET and yield the response.

        After a redirect, later requests for a file go to the new address until the new address
        fails: the hub limits the number of requests, its storage does not.
        """
        import httpx
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

        original = url
        try:
            hub = origin(self.endpoint)
            stored = url = self._moved.get(original, original)
            for _ in range(MAX_REDIRECTS + 1):
                with self._count:
                    self.requests += 1
                with (
                    busy_returns(),
                    get_session().stream(
                        "GET",
                        url,
                        headers={**self._headers, **headers},
                        follow_redirects=False,
                        timeout=TIMEOUT_SECONDS,
                    ) as response,
                ):
                    status = response.status_code
                    if status not in _REDIRECTS and not (stored != original and status >= 400):
                        self._moved[original] = url
                        yield response
                        return
                    target = response.headers.get("Location", "") if status < 400 else original
                    stored, url = original, urljoin(url, target)
                scheme = urlsplit(url).scheme
                if scheme not in ("https", hub[0]):
                    raise self.nonsense(f"redirects to an address that begins with {scheme!r}")
            raise self.nonsense("redirects without end")
        except OfflineModeIsEnabled:
            raise self.offline() from None
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL, ValueError):
            raise SourceError(  # the value is not shown: it may hold a password
                f"{self.host} cannot be asked: HF_ENDPOINT is malformed.",
                "HF_ENDPOINT must be like https://huggingface.co.",
            ) from None
        except httpx.TransportError as error:
            self._moved.pop(original, None)
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                raise Again(self.unreachable(), tries=TRIES_TO_CONNECT) from None
            raise Again(self.unreachable()) from None

    def refuse(self, response: "httpx.Response", path: str = "") -> NoReturn:
        """Raise the error of an answer that reports a failure; `Again` if the failure may pass."""
        error = self._explain(response, path)
        if response.status_code in _TRANSIENT:
            raise Again(error, asked_to_wait(response.headers))
        raise error

    def _explain(self, response: "httpx.Response", path: str = "") -> SourceError:
        """Return the error for a status and the hub's error headers."""
        status = response.status_code
        code = response.headers.get("X-Error-Code", "")
        reason = response.headers.get("X-Error-Message", "")
        repo, host = self.repo_id, self.host
        token = "authorization" in self._headers
        log_in = "use a token that may read the repo" if token else _LOG_IN
        if code == "RevisionNotFound":
            return SourceError(
                f"{repo} has no revision {self.revision or 'main'!r}.",
                f"Take a branch, tag or commit that {host} lists, or leave --revision out.",
            )
        if code == "GatedRepo":
            return SourceError(
                f"{repo} is gated: its owner grants access on request.",
                f"Ask for access at {self._page}, then {log_in}.",
            )
        if reason.startswith("Access to this resource is disabled"):
            return SourceError(f"{host} has disabled {repo}.", "Take another copy of the model.")
        if reason.startswith("Invalid credentials"):
            return SourceError(
                f"{host} does not accept your token.",
                f"The token may have expired: {_LOG_IN} again; public repos need no token.",
            )
        if code == "EntryNotFound" or (path and status == 404 and code != "RepoNotFound"):
            return SourceError(
                f"{repo} lists {path} but does not serve it.", "Tell the repo's owner."
            )
        if code == "RepoNotFound" or status in (401, 404):
            return NoSuchRepo(
                f"There is no repo {repo} on {host}, or it is private.",
                f"Check the name; if it is private, {log_in}.",
            )
        if status == 403:
            return SourceError(
                f"{host} forbids reading {repo} with your token.",
                "Give the token the right to read this repo, in its settings on the hub.",
            )
        if status == 429:
            return SourceError(
                f"{host} limits the number of requests (HTTP 429).",
                "Try again in a few minutes"
                + ("." if token else "; the limit is higher if you log in."),
            )
        if status >= 500:
            return SourceError(f"{host} reports an error (HTTP {status}).", "Try again later.")
        return SourceError(
            f"{host} answers HTTP {status} to a request for {repo}.",
            "Check HF_ENDPOINT, or try again later.",
        )

    @property
    def _page(self) -> str:
        split = urlsplit(self.endpoint)
        return f"{split.scheme}://{split.netloc.rpartition('@')[2]}/{self._path}"

    @property
    def _path(self) -> str:
        """The path of the repo's page on the hub."""
        return self.repo_id if self.repo_type == "model" else f"datasets/{self.repo_id}"

    def nonsense(self, what: str) -> SourceError:
        """Return the error for an answer of the hub that makes no sense."""
        return SourceError(f"{self.host} {what}.", "Check HF_ENDPOINT, or try again later.")

    def unreachable(self) -> SourceError:
        """Return the error for a hub that does not answer."""
        return SourceError(
            f"{self.host} cannot be reached.",
            "Check the network, proxy and HF_ENDPOINT, or give the folder of a local copy.",
        )

    def offline(self) -> SourceError:
        """Return the error for a huggingface_hub that may not use the network."""
        return SourceError(
            f"HF_HUB_OFFLINE is set, so {self.repo_id} cannot be read from {self.host}.",
            "Unset HF_HUB_OFFLINE, or give the folder of a local copy.",
        )


def hub_token() -> str | None:
    """Return huggingface_hub's token. Raises SourceError for a token that no header can hold."""
    from huggingface_hub import get_token

    try:
        token = get_token()
        malformed = token is not None and not (token.isascii() and token.isprintable())
    except (OSError, ValueError):  # HF_TOKEN_PATH is no file of text
        malformed = True
    if malformed:
        raise SourceError(
            "The Hugging Face token is malformed.",
            f"A token is letters and digits: look at HF_TOKEN and HF_TOKEN_PATH, or {_LOG_IN}.",
        )
    return token


def host_of(endpoint: str) -> str:
    """Return a hub's host name."""
    with contextlib.suppress(ValueError):
        return urlsplit(endpoint).hostname or "the hub"
    return "the hub"
