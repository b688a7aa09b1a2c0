"""Write to a hub repo: create the repo, upload files with huggingface_hub, commit.

Every commit names its parent, so no commit of another gets between unseen. The token is sent to the
hub and appears nowhere else: huggingface_hub's log is silenced, and no error's text is shown except
the hub's message.
"""

from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar
from urllib.parse import urlsplit

from mquant import __version__
from mquant.checkpoint.checkpoint import CONFIG_NAME, INDEX_NAME, is_shard
from mquant.checkpoint.client import BUSY, busy_raises, causes, endpoint
from mquant.checkpoint.download import quiet
from mquant.checkpoint.hub import HubRepo, NoSuchRepo, host_of, hub_token
from mquant.checkpoint.retry import Again, asked_to_wait, retrying
from mquant.errors import MquantError, OutputError
from mquant.events import Emit, Note
from mquant.text import clean, names

if TYPE_CHECKING:
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi

T = TypeVar("T")

MOST_FILES: Final = 100
"""The most files of a commit, as huggingface.co/docs/hub/repositories-recommendations says."""
MOST_COMMIT_TRIES: Final = 12  # five minutes of a hub that is busy
_TRANSIENT: Final = BUSY | {408, 409, 412}
_METADATA: Final = "Invalid metadata in README.md"
_LOG_IN: Final = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
_AGAIN: Final = "Run the same command again to resume."


class HubWriter:
    """A model repo to write to, which need not exist yet.

    `repo` is the repo at the commit that the next commit follows: the newest at the object's
    creation, then the last one that was made here; None if there is no repo. `ours` are the names
    of the checkpoint's files. If another changes one of these, or an index, config.json or shard,
    the next commit is refused; the change of any other file is named. HF_ENDPOINT and the token
    are huggingface_hub's, read at the object's creation. Raises OutputError without a token, or,
    from every method, if the hub refuses or cannot be reached.
    """

    def __init__(self, repo_id: str, ours: Collection[str], emit: Emit) -> None:
        self.repo_id, self._ours, self._emit = repo_id, ours, emit
        self.endpoint = endpoint()
        token = hub_token()
        if not token:
            raise OutputError(f"There is no token, so {self.host} accepts no files.", _LOG_IN)
        self._token = token
        self._held: dict[str, CommitOperationAdd] = {}
        self.repo: HubRepo | None
        try:
            self.repo = HubRepo(repo_id)
        except NoSuchRepo:
            self.repo = None

    @property
    def host(self) -> str:
        """The hub's host name, for messages: HF_ENDPOINT may hold a password."""
        return host_of(self.endpoint)

    @property
    def page(self) -> str:
        """The repo's address."""
        split = urlsplit(self.endpoint)
        return f"{split.scheme}://{split.netloc.rpartition('@')[2]}/{self.repo_id}"

    @property
    def full(self) -> bool:
        """Whether the next commit has as many files as a commit should have."""
        return len(self._held) >= MOST_FILES

    @property
    def made(self) -> HubRepo:
        """The repo, at the commit that the next commit follows. Raises TypeError if none exists."""
        if self.repo is None:
            raise TypeError(f"{self.repo_id} was not created")
        return self.repo

    def create(self, *, private: bool) -> None:
        """Create the repo. Raises OutputError if another created the repo and put files there."""
        self._retrying(lambda: self._api.create_repo(self.repo_id, private=private, exist_ok=True))
        self.repo = HubRepo(self.repo_id)
        if self.repo.files or (private and not self.repo.private):
            raise OutputError(
                f"Another created {self.repo_id} just now.",
                "If that is the same checkpoint, run the same command again when the other push "
                "has ended; if not, give another repo.",
            )

    def upload(self, name: str, content: Path | bytes, sha256: str | None = None) -> None:
        """Send a file, which the next commit will add; a file that the hub has is not sent again.

        Raises OutputError if `sha256` is given and what was sent has another.
        """
        addition = self._retrying(lambda: self._send(name, content))
        if sha256 not in (None, addition.upload_info.sha256.hex()):
            raise OutputError(
                f"{name} was changed before its upload: its sha256 is not the recorded one.",
                f"Make or copy {name} again, then run the same command again.",
            )
        self._held[name] = addition

    def _send(self, name: str, content: Path | bytes) -> "CommitOperationAdd":
        # One file at a time: without hf_xet, parallel uploads use threads that outlive Ctrl-C.
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(name, content)
        self._api.preupload_lfs_files(self.repo_id, [addition])
        return addition

    def commit(self, message: str, delete: Collection[str] = ()) -> None:
        """Commit the uploaded files, in their order; no commit is made if nothing would change.

        Raises OutputError if another's commit changed a file of the checkpoint.
        """
        from huggingface_hub import CommitOperationCopy, CommitOperationDelete

        tried = False

        def attempt() -> None:
            nonlocal tried
            if tried:  # another's commit may be the reason, or the answer to ours was lost
                self._follow(None, delete)
            tried = True
            gone = [name for name in delete if name in self.made.files]
            operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
                *(add for name, add in self._held.items() if not self._has(self.made, name)),
                *(CommitOperationDelete(name, is_folder=False) for name in gone),
            ]
            if operations:
                made = self._api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=message,
                    parent_commit=self.made.commit,
                )
                self._follow(made.oid, delete)

        self._retrying(attempt)
        self._held.clear()

    def _follow(self, commit: str | None, delete: Collection[str]) -> None:
        """Go on from a commit, or the newest, unless another changed a file that counts."""
        before, now = _contents(self.made), HubRepo(self.repo_id, commit)
        after = _contents(now)
        either = sorted(before.keys() | after.keys())
        changed = [name for name in either if before.get(name) != after.get(name)]
        # What the hub made of our own commit is compared with the digests later.
        ours = self._held.keys() if commit else {n for n in self._held if self._has(now, n)}
        foreign = [n for n in changed if n not in ours and (n in after or n not in delete)]
        other = f"Another's commit ({now.commit[:12]}) changed"
        read = {INDEX_NAME, CONFIG_NAME, "hf_quant_config.json", *self._ours}
        wrong = [name for name in foreign if name in read or is_shard(name)]
        if wrong:
            cards = [name for name in wrong if name.endswith(".md")]
            keep = f" That replaces {names(cards)}; to keep the other's text, copy it into the "
            keep = f"{keep}folder first." if cards else ""
            raise OutputError(
                f"{other} {names(wrong)} in {self.repo_id} during the upload.",
                f"Look at {self.page}/commit/{now.commit}. Let one process push to the repo at a "
                f"time, then run the same command again.{keep}",
            )
        if foreign or (not changed and now.commit != self.made.commit):
            what = names(foreign) or "no file of a checkpoint"
            self._emit(Note("warning", f"{other} {what} in {self.repo_id}; the upload goes on."))
        self.repo = now

    def _has(self, repo: HubRepo, name: str) -> bool:
        """Return whether the repo has an uploaded file's content."""
        addition = self._held.get(name)
        if addition is None:
            return False
        if name in repo.sha256:
            return repo.sha256[name] == addition.upload_info.sha256.hex()
        with addition.as_file() as file:
            return repo.lists(name, file.read())

    @cached_property
    def _api(self) -> "HfApi":
        """huggingface_hub's client."""
        from huggingface_hub import HfApi

        return HfApi(
            endpoint=self.endpoint,
            token=self._token,
            library_name="mquant",
            library_version=__version__,
        )

    def _retrying(self, action: Callable[[], T]) -> T:
        return retrying(lambda: self._attempt(action), self._emit)

    def _attempt(self, action: Callable[[], T]) -> T:
        """Call `action` once. Raises the error of a failure; `Again` if the failure may pass."""
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            disable_progress_bars,
            enable_progress_bars,
        )

        disable_progress_bars()
        try:
            with quiet(), busy_raises():
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

        chain = list(causes(error))
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
        reason = self._shown(response.headers.get("X-Error-Message", ""))
        reason = f":{reason}" if reason else ""
        if status in _TRANSIENT:
            busy = f"{host} is busy or reports an error (HTTP {status}){reason}."
            wait = asked_to_wait(response.headers)
            raise Again(OutputError(busy, _AGAIN), wait, MOST_COMMIT_TRIES) from None
        if status == 401:
            raise OutputError(f"{host} does not accept your token.", _LOG_IN) from None
        if status in (402, 403, 404):
            raise OutputError(
                f"{host} does not let your token write to {repo} (HTTP {status}).",
                "Check the name, and allow the token to write to the repo, in its settings.",
            ) from None
        raise OutputError(
            f"{host} refuses the files (HTTP {status}){reason}.",
            f"Correct what {host} names, then run the same command again.",
        ) from None

    def _shown(self, reason: str) -> str:
        """Return the hub's text on one line, without the token."""
        line = " ".join(reason.replace(self._token, "(token)").split())[:300].rstrip(".")
        return f" {clean(line)}" if line else ""


def _contents(repo: HubRepo) -> dict[str, str | int]:
    """Return a digest of each file; a size if the hub lists no digest."""
    digests = {**repo.blobs, **repo.sha256}
    return {name: digests.get(name, size) for name, size in repo.files.items()}
