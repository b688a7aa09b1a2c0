"""Helpers for writing files: reserve room, write durably, turn OSErrors into one sentence."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial as bound
from pathlib import Path, PurePosixPath
from typing import Final

from mquant.errors import OutputError
from mquant.text import size

PARTIAL: Final = ".partial"
"""The suffix of an unfinished file."""
_LONGEST_NAME: Final = 255 - len(PARTIAL)
_COPIED_AT_ONCE: Final = 1 << 20
_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF})
"""The errors of a file system that lacks an operation."""


def is_there(out: Path) -> bool:
    """Return whether OUT exists. Raises OutputError if the system refuses the path."""
    try:
        return out.exists()
    except OSError as error:
        raise OutputError(
            f"{str(out)[:200]} cannot be accessed: {error.strerror}.",
            "Give another folder with -o.",
        ) from error


def is_plain(name: str) -> bool:
    """Return whether a name can name a file in a folder: printable, relative, no `..`, short."""
    path = PurePosixPath(name)
    if not name.isprintable() or not path.parts or path.is_absolute() or ".." in path.parts:
        return False
    return all(len(os.fsencode(part)) <= _LONGEST_NAME for part in path.parts)


def preallocate(file: int, size: int) -> None:
    """Reserve `size` bytes, so that a full disk raises an error before any work is done."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        os.ftruncate(file, size)


class out_of_space:  # noqa: N801  (a context manager reads as a phrase)
    """A context manager that raises OutputError, with one sentence, in place of an OSError."""

    def __init__(self, path: Path, needed: int) -> None:
        self._path = path
        self._needed = needed

    def __enter__(self) -> None:
        """Do nothing: only the end of the block matters."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise OutputError in place of an OSError."""
        if not isinstance(error, OSError):
            return
        name = self._path.name.removesuffix(PARTIAL)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"The disk is full: {name} needs {size(self._needed)} in {self._path.parent}.",
                "Free space, then run the same command again.",
            ) from error
        raise OutputError(
            f"{self._path.parent} cannot be written ({name}: {error.strerror}).",
            "Check the folder and the disk, then run the same command again.",
        ) from error


def link(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the system makes no hard link.

    If `source` is a symbolic link, `target` is a link to the file that `source` leads to. `target`
    must not exist.
    """
    with out_of_space(target, source.stat().st_size):
        try:
            with _whole(target) as partial:
                os.link(source.resolve(), partial)
        except OSError:  # of many kinds; if the folder cannot be written, the copy says so
            with source.open("rb") as file:
                write_whole(target, iter(bound(file.read, _COPIED_AT_ONCE), b""))


def write_whole(path: Path, pieces: Iterable[bytes]) -> str:
    """Write a file, whole or not at all, and return its sha256.

    If `path` is a link, the file replaces the link, and the link's target stays. Raises OSError.
    """
    digest = hashlib.sha256()
    with _whole(path) as partial, partial.open("xb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yield a partial path beside `path`; after the block, rename its file to `path`, durably.

    If the block fails, the file at `path` does not change, and the partial file is deleted.
    """
    partial = path.with_name(path.name + PARTIAL)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)  # perhaps a link to another file
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def open_own(path: Path, flags: int = 0) -> int:
    """Open a file that mquant writes bit by bit, and create the file if it does not exist.

    `flags` are added to those of os.open. Raises OSError.
    """
    unlink_foreign(path)
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o644)


def unlink_foreign(path: Path) -> None:
    """Unlink a link, and a file with another name: to write into it would change another file."""
    with suppress(FileNotFoundError):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            path.unlink()


def read_own(path: Path, most: int) -> bytes | None:
    """Read a file that mquant wrote, and that may be a link, a pipe or a huge file by now.

    Returns None if `path` is no regular file of at most `most` bytes, or cannot be read.
    """
    try:
        # Opening a pipe without a writer would block.
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(file, "rb") as opened:
            plain = stat.S_ISREG(os.fstat(file).st_mode) and os.fstat(file).st_size <= most
            return opened.read(most) if plain else None
    except OSError:
        return None


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable, if the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def pwrite(file: int, data: bytes | memoryview, offset: int) -> int:
    """Write all of `data` at byte `offset`, and return the number of bytes."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):  # pwrite stops at 2 GiB
        done += os.pwrite(file, view[done:], offset + done)
    return done


def free_disk(out: Path) -> int:
    """Return the bytes that are free on the disk of `out`, which need not exist yet."""
    existing = next(path for path in (out, *out.absolute().parents) if is_there(path))
    return shutil.disk_usage(existing).free


def check_disk(out: Path, files: Collection[str], needed: int) -> None:
    """Raise OutputError if `needed` bytes do not fit; existing `files` of OUT count as free."""
    held = (out / (name + end) for name in files for end in ("", PARTIAL))
    free = free_disk(out) + sum(map(_disk_of, held))
    if free < needed:
        raise OutputError(
            f"{out} needs {size(needed)}, {size(free)} are free there.",
            "Free space, or give a folder on another disk with -o.",
        )


def _disk_of(path: Path) -> int:
    """Return the bytes of a file on disk; 0 if there is no file, or another process renames it."""
    try:
        return path.stat().st_blocks * 512 if path.is_file() else 0
    except FileNotFoundError:
        return 0
