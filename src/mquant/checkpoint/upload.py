"""Write to a hub repo: create the repo, upload files with huggingface_hub, commit.

The token is sent to the hub and appears nowhere else: huggingface_hub's log is silenced, and no
error's text is shown except the hub's message.
"""

import glob
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar
from urllib.parse import urlsplit

from mquant import __version__
from mquant.checkpoint.download import quiet
from mquant.checkpoint.hub import asked_to_wait, host_of
from mquant.checkpoint.retry import Again, retrying
from mquant.errors import MquantError, OutputError
from mquant.events import Emit, Progress
from mquant.text import clean

if TYPE_CHECKING:
    import httpx
    from huggingface_hub import HfApi

T = TypeVar("T")

_TRANSIENT: Final = frozenset({408, 409, 412, 429, 500, 502, 503, 504})
_METADATA: Final = "Invalid metadata in README.md"
_LOG_IN: Final = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
_BATCH_BYTES: Final = 4_000_000_000  # most shards are larger, so each shard gets a commit
_AGAIN: Final = "Run the same command again to resume."


class HubWriter:
    """A model repo to write to, which need not exist yet.

    HF_ENDPOINT and the token are huggingface_hub's, read at the object's creation. Raises
    OutputError without a token, or, from every method, if the hub refuses or cannot be reached.
    """

    def __init__(self, repo_id: str) -> None:
        from huggingface_hub import constants, get_token

        self.repo_id = repo_id
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        token = get_token()
        if not token:
            raise OutputError(f"There is no token, so {self.host} accepts no files.", _LOG_IN)
        self._token = token

    @property
    def host(self) -> str:
        """The hub's host name, for messages: HF_ENDPOINT may hold a password."""
        return host_of(self.endpoint)

    @property
    def page(self) -> str:
        """The repo's address."""
        split = urlsplit(self.endpoint)
        return f"{split.scheme}://{split.netloc.rpartition('@')[2]}/{self.repo_id}"

    def create(self, *, private: bool) -> None:
        """Create the repo; an existing repo stays unchanged."""
        self._retrying(lambda: self._api.create_repo(self.repo_id, private=private, exist_ok=True))

    def upload(self, folder: Path, files: Mapping[str, int], emit: Emit) -> None:
        """Upload and commit files of a folder, some gigabytes at a time.

        `files` has the bytes of each file. huggingface_hub asks the hub which files it has, so no
        file is sent twice; the upload writes no file into the folder.
        """
        total, done = sum(files.values()), 0
        emit(Progress("upload", 0, total))
        for batch in _batches(files):
            self._upload(folder, batch)
            done += sum(files[name] for name in batch)
            emit(Progress("upload", done, total))

    def _upload(self, folder: Path, batch: list[str]) -> None:
        self._retrying(
            lambda: self._api.upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                allow_patterns=[glob.escape(name) for name in batch],
                commit_message="Add files; index and config.json come last",
            )
        )

    def commit(
        self, message: str, add: Mapping[str, Path | bytes], delete: Iterable[str] = ()
    ) -> str:
        """Commit a few files, in their order, and return the commit's id."""
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        def attempt() -> str:
            # Make new operations each time: a committed operation cannot be reused.
            operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
                *(CommitOperationAdd(name, path) for name, path in add.items()),
                *(CommitOperationDelete(name, is_folder=False) for name in delete),
            ]
            result = self._api.create_commit(self.repo_id, operations, commit_message=message)
            return str(result.oid)

        return self._retrying(attempt)

    @cached_property
    def _api(self) -> "HfApi":
        """huggingface_hub's client."""
        from huggingface_hub import HfApi

        class Api(HfApi):
            def preupload_lfs_files(self, repo_id: str, additions: Any, **options: Any) -> None:
                # Without hf_xet, parallel uploads use threads that outlive Ctrl-C.
                for addition in list(additions):
                    super().preupload_lfs_files(repo_id, [addition], **options)

        return Api(
            endpoint=self.endpoint,
            token=self._token,
            library_name="mquant",
            library_version=__version__,
        )

    def _retrying(self, action: Callable[[], T]) -> T:
        return retrying(lambda: self._attempt(action))

    def _attempt(self, action: Callable[[], T]) -> T:
        """Call `action` once. Raises the error of a failure; `Again` if the failure may pass."""
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            disable_progress_bars,
            enable_progress_bars,
        )

        disable_progress_bars()
        try:
            with quiet():
                return action()
        except MquantError:
            raise
        except Exception as error:  # noqa: BLE001 -- huggingface_hub's, httpx's, hf_xet's
            self._refuse(error)
        finally:
            enable_progress_bars()

    def _refuse(self, error: BaseException) -> NoReturn:
        import httpx
        from huggingface_hub.errors import HfHubHTTPError, XetDownloadError

        chain = list(_causes(error))
        for cause in chain:
            if isinstance(cause, HfHubHTTPError):
                self._refuse_answer(cause.response)
            if isinstance(cause, ValueError) and str(cause).startswith(_METADATA):
                raise OutputError(
                    f"{self.host} does not accept the metadata of README.md:"
                    f"{self._shown(str(cause).removeprefix(_METADATA + '.'))}.",
                    "Write the card again with mquant card.",
                ) from None
            if isinstance(cause, OSError) and cause.errno is not None and cause.filename:
                raise OutputError(
                    f"{cause.filename} cannot be read or written: {cause.strerror}.",
                    f"Check the disk. {_AGAIN}",
                ) from None
        network = (httpx.HTTPError, XetDownloadError, RuntimeError, OSError)
        if any(isinstance(cause, network) for cause in chain):
            raise Again(OutputError(f"The connection to {self.host} broke.", _AGAIN)) from None
        kind = type(error).__name__
        raise OutputError(f"{self.host} gave an unknown answer ({kind}).", _AGAIN) from None

    def _refuse_answer(self, response: "httpx.Response") -> NoReturn:
        status, host, repo = response.status_code, self.host, self.repo_id
        if status in _TRANSIENT:
            busy = OutputError(f"{host} is busy or reports an error (HTTP {status}).", _AGAIN)
            raise Again(busy, asked_to_wait(response.headers)) from None
        if status == 401:
            raise OutputError(f"{host} does not accept your token.", _LOG_IN) from None
        if status in (402, 403, 404):
            raise OutputError(
                f"{host} does not let your token write to {repo} (HTTP {status}).",
                "Check the name, and allow the token to write to the repo, in its settings.",
            ) from None
        reason = self._shown(response.headers.get("X-Error-Message", ""))
        raise OutputError(
            f"{host} refuses the files (HTTP {status}){':' if reason else ''}{reason}.",
            "Correct what {host} names, then run the same command again.",
        ) from None

    def _shown(self, reason: str) -> str:
        """Return the hub's text on one line, without the token."""
        line = " ".join(reason.replace(self._token, "(token)").split())[:300].rstrip(".")
        return f" {clean(line)}" if line else ""


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    """Yield an error and its causes: huggingface_hub's workers wrap their errors."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _batches(files: Mapping[str, int]) -> Iterable[list[str]]:
    """Yield the files, in their order, in lists of some gigabytes: each list is one commit."""
    batch: list[str] = []
    size = 0
    for name, count in files.items():
        batch.append(name)
        size += count
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
