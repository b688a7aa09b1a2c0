"""Read a folder's files into buffers, in parallel, and notice files that change."""

import os
from contextlib import suppress
from pathlib import PurePosixPath
from threading import Lock
from typing import Final

from mquant.checkpoint.source import Folder, Source, changed, stamp
from mquant.errors import SourceError

_PREFETCH_BYTES: Final = 1 << 20  # Linux reads no more for one call than one request of the disk


class Reader:
    """Open files of a folder. Any number of threads may read at once.

    Bytes are read, not mapped: mapped pages count as this process's memory, and a mapped file that
    shrinks kills the process.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._files: dict[str, int] = {}
        self._lock = Lock()

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on.

        Raises SourceError if the file cannot be read, or is not long enough any more.
        """
        file, done = self._open(path), 0
        while done < len(buffer):  # preadv stops at 2 GiB
            try:
                count = os.preadv(file, [buffer[done:]], start + done)
            except OSError as error:
                raise SourceError(
                    f"{path} cannot be read at byte {start + done:,}: {error.strerror}.",
                    "Check the disk, or get the file again; then run the same command again.",
                ) from error
            if not count:
                raise SourceError(
                    f"{path} ends at byte {os.fstat(file).st_size:,}; "
                    f"{start + len(buffer):,} were expected.",
                    "The file changed while it was read: wait until nothing writes to it, then run "
                    "the same command again.",
                )
            done += count

    def prefetch(self, path: str, start: int, end: int) -> None:
        """Ask the system to fetch bytes [start, end) in the background. Ignore errors."""
        with suppress(OSError, SourceError):
            file = self._open(path)
            for at in range(start, end, _PREFETCH_BYTES):
                os.posix_fadvise(file, at, min(_PREFETCH_BYTES, end - at), os.POSIX_FADV_WILLNEED)

    def check(self, path: str) -> None:
        """Raise SourceError if a file has changed since its folder was listed."""
        if stamp(os.fstat(self._open(path))) != self._folder.stamps[path]:
            raise changed(path)

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _open(self, path: str) -> int:
        file = self._files.get(path)
        if file is not None:
            return file
        with self._lock:
            if path not in self._files:
                try:
                    self._files[path] = os.open(self._folder.path(path), os.O_RDONLY)
                except OSError as error:
                    raise SourceError(
                        f"{PurePosixPath(path).name} cannot be read: {error.strerror}.",
                        "Check the disk; then run the same command again.",
                    ) from error
            return self._files[path]


class RangeReader:
    """A reader of any source, with one `read` per call; for a hub, whose commit fixes its files."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on."""
        buffer[:] = self._source.read(path, start, start + len(buffer))

    def prefetch(self, path: str, start: int, end: int) -> None:
        """Do nothing: bytes of a hub are not kept."""

    def check(self, path: str) -> None:
        """Do nothing: a commit does not change."""

    def close(self) -> None:
        """Do nothing: no file is open."""


def reader_of(source: Source) -> Reader | RangeReader:
    """Return the reader of a source's files."""
    return Reader(source) if isinstance(source, Folder) else RangeReader(source)
