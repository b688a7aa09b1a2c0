"""The repos of `fakehub`: folders, commits and files of repos, and the tokens and requests."""

import hashlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

GOOD_TOKEN = "hf_goodgoodgoodgoodgoodgoodgoodgood"  # noqa: S105
POOR_TOKEN = "hf_poorpoorpoorpoorpoorpoorpoorpoor"  # noqa: S105
"""A valid token without access to gated or private repos."""

PIECE = 64 * 1024
_WHOLE = 64_000_000


@dataclass
class Repo:
    """A repo: the folder of each commit, the commit of each branch, and the access to the repo."""

    access: Literal["public", "gated", "private"] = "public"
    folders: dict[str, Path] = field(default_factory=dict)
    """Commit -> folder."""
    revisions: dict[str, str] = field(default_factory=dict)
    """Branch -> commit."""


@dataclass(frozen=True)
class Request:
    """A request that the hub received."""

    host: str
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass(frozen=True)
class Commit:
    """A commit: the files that the commit added, in the order of the commit, and deleted."""

    repo: str
    message: str
    added: tuple[str, ...]
    deleted: tuple[str, ...]


def listing(folder: Path) -> list[tuple[str, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files)


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".parquet"))


def etag(path: Path) -> str:
    """Return the sha256 of a large file, or git's sha1 of another file.

    Of a sparse large file, return the sha256 of the first 1,000,000 bytes.
    """
    stat = path.stat()
    whole = stat.st_size <= _WHOLE or stat.st_blocks * 512 >= stat.st_size
    return _etag(path, stat.st_ino, stat.st_mtime_ns, stat.st_size if whole else 1_000_000)


@cache
def _etag(path: Path, _inode: int, _time: int, count: int) -> str:
    if not is_lfs(path.name):
        blob = b"blob %d\0" % count + path.read_bytes()
        return hashlib.sha1(blob).hexdigest()  # noqa: S324
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while count and (piece := file.read(min(count, PIECE))):
            digest.update(piece)
            count -= len(piece)
    return digest.hexdigest()
