"""The hub's list of a repo, read as hostile input: the commit, names, sizes and digests."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from mquant.untrusted import parse_json

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Listing:
    """The hub's list of a repo at a commit."""

    commit: str
    private: bool
    files: Mapping[str, int]
    sha256: Mapping[str, str]
    blobs: Mapping[str, str]


def parse_listing(raw: bytes) -> Listing:
    """Return the list in a hub's answer. Raises ValueError, which says what is wrong."""
    try:
        listing = parse_json(raw)
        commit, siblings = listing["sha"], listing["siblings"]
        files = dict(sorted(_file(sibling) for sibling in siblings))
        digests = dict(filter(None, map(_digest, siblings)))
        blobs = dict(filter(None, map(_blob, siblings)))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("lists the repo in a way mquant does not understand") from None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise ValueError("names no commit")
    # Hidden files (.gitattributes) are no part of a checkpoint, as in a folder.
    visible = {path: size for path, size in files.items() if "/." not in f"/{path}"}
    return Listing(commit, listing.get("private") is True, visible, digests, blobs)


def _file(sibling: Mapping[str, Any]) -> tuple[str, int]:
    """Return a file's name and size. Raises TypeError, KeyError or ValueError for a bad entry."""
    path = sibling["rfilename"]
    size = (sibling.get("lfs") or sibling)["size"]
    if type(path) is not str or type(size) is not int or not 0 <= size < 2**53:
        raise TypeError(path)
    parts = PurePosixPath(path).parts
    plain = path.isprintable() and "\\" not in path and parts and path == "/".join(parts)
    if not plain or ".." in parts or len(path) > 1024:
        raise ValueError(path)
    return path, size


def _digest(sibling: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return a large file's name and sha256, its key in the hub's storage; None for small files."""
    lfs = sibling.get("lfs")
    digest = lfs.get("sha256") if isinstance(lfs, dict) else None
    if isinstance(digest, str) and _SHA256.fullmatch(digest):
        return sibling["rfilename"], digest
    return None


def _blob(sibling: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return a small file's name and git's id of its content; None for large files."""
    blob = sibling.get("blobId")
    if not sibling.get("lfs") and isinstance(blob, str) and _COMMIT.fullmatch(blob):
        return sibling["rfilename"], blob
    return None
