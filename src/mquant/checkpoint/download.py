"""Download a hub repo into the Hugging Face cache."""

import contextlib
import glob
import shlex
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, Protocol

from mquant import __version__
from mquant.checkpoint.client import causes
from mquant.checkpoint.hashing import differing
from mquant.checkpoint.retry import Again, retrying
from mquant.checkpoint.source import Folder
from mquant.errors import SourceError
from mquant.events import Emit, Progress
from mquant.text import names

if TYPE_CHECKING:
    import httpx

PROGRESS_BYTES: Final = 8_000_000
# Other formats of the same weights, which mquant never reads.
_OTHER_WEIGHTS: Final = (
    ".bin",
    ".bin.index.json",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pt",
    ".pth",
    ".tflite",
)


class Downloadable(Protocol):
    """The attributes and methods of a repo that `download` needs; `HubRepo` has all of them."""

    repo_id: str
    repo_type: Literal["model", "dataset"]
    commit: str
    endpoint: str
    files: Mapping[str, int]

    @property
    def host(self) -> str:
        """The hub's host name."""

    def digest(self, path: str) -> str:
        """Return the digest that the hub lists for a file; empty if the hub lists none."""

    def refuse(self, response: "httpx.Response", path: str = "") -> NoReturn:
        """Raise SourceError for an answer of the hub."""

    def unreachable(self) -> SourceError:
        """Return the error for a hub that does not answer."""

    def offline(self) -> SourceError:
        """Return the error for a huggingface_hub that may not use the network."""

    def nonsense(self, what: str) -> SourceError:
        """Return the error for an answer of the hub that makes no sense."""


def download(repo: Downloadable, emit: Emit, only: Collection[str] | None = None) -> Folder:
    """Download the repo's commit into the Hugging Face cache, and return the folder.

    `only` names the files to download; None: all files but weights in other formats than
    safetensors, and weights in subfolders. Files in the cache are not downloaded again. All files
    are compared with the digests that the hub lists. Raises SourceError if the download fails, or
    if a file differs.
    """
    paths = [path for path in repo.files if (_matters(path) if only is None else path in only)]
    sizes = {path: repo.files[path] for path in paths}
    folder = retrying(lambda: _snapshot(repo, sizes, emit), emit)
    for path, size in sizes.items():
        if not (folder / path).is_file() or (folder / path).stat().st_size != size:
            raise SourceError(
                f"{path} of {repo.repo_id} is incomplete in the cache.",
                f"Delete {folder}, then run the same command again.",
            )
    total = sum(sizes.values())
    emit(Progress("download", total, total))
    files = Folder(folder)  # before its files are hashed: later changes change their stamps
    known = {path: digest for path in paths if (digest := repo.digest(path))}
    rotten = {path: files.path(path).resolve() for path, _ in differing(files, known, emit)}
    if rotten:
        one = len(rotten) == 1
        raise SourceError(
            f"{names([*rotten])} of {repo.repo_id} in the cache {'is' if one else 'are'} not what "
            f"{repo.host} lists: {names([*map(str, rotten.values())])} "
            f"{'has another digest' if one else 'have other digests'}.",
            f"Run: rm {shlex.join(map(str, rotten.values()))}; then run the same command again to "
            f"download the file{'' if one else 's'} again.",
        )
    return files


def _snapshot(repo: Downloadable, sizes: Mapping[str, int], emit: Emit) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, XetDownloadError

    try:
        with quiet():
            folder = snapshot_download(
                repo.repo_id,
                repo_type=repo.repo_type,
                revision=repo.commit,
                endpoint=repo.endpoint,
                library_name="mquant",
                library_version=__version__,
                allow_patterns=[glob.escape(path) for path in sizes],
                tqdm_class=_bar(sum(sizes.values()), emit),
            )
    except OfflineModeIsEnabled:
        raise repo.offline() from None
    except HfHubHTTPError as error:
        repo.refuse(error.response)
    except (httpx.HTTPError, XetDownloadError, RuntimeError):  # hf_xet raises RuntimeError
        raise Again(repo.unreachable()) from None
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise repo.nonsense("lists the repo in a way huggingface_hub does not understand") from None
    except OSError as error:
        for cause in causes(error):
            if isinstance(cause, HfHubHTTPError):
                repo.refuse(cause.response)
        # huggingface_hub's own errors (a download failed) are OSErrors without a number.
        if error.errno is None:
            raise Again(repo.unreachable()) from None
        raise SourceError(
            f"{repo.repo_id} cannot be stored in the Hugging Face cache: {error.strerror}.",
            "Free space there, or set HF_HOME to a folder on another disk.",
        ) from error
    return Path(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep huggingface_hub's log lines (a retry is a warning) off stderr. Failures still raise."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(50)  # CRITICAL of the standard library
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _bar(total: int, emit: Emit) -> Any:
    """Return a progress bar class for huggingface_hub that draws nothing and emits Progress."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    lock = threading.Lock()
    done = reported = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Only this progress bar of a download counts bytes on disk.
            self._counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal done, reported
            if self._counts and n:
                with lock:
                    done = min(done + int(n), total)
                    if done - reported >= PROGRESS_BYTES:
                        reported = done
                        emit(Progress("download", done, total))

    return Bar


def _matters(path: str) -> bool:
    nested = len(PurePosixPath(path).parts) > 1
    weights = (".safetensors", ".safetensors.index.json")
    return not path.endswith(_OTHER_WEIGHTS) and not (nested and path.endswith(weights))
