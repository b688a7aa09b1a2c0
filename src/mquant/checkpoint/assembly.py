"""One source made of files of others: what a checkpoint is put together from."""

from collections.abc import Mapping
from threading import Lock

from mquant.checkpoint.reader import reader_of
from mquant.checkpoint.source import Folder, Source, Stamp
from mquant.errors import SourceError

Parts = Mapping[str, tuple[Source, str]]
"""A file's path in the assembly -> the source that has it, and its path there."""


class Assembly:
    """Files of several sources under one name, each under a path of its own.

    Nothing is copied. `stamps` tells when a local file changes; one of a hub, which is fixed by
    its commit, has its size alone.
    """

    def __init__(self, name: str, parts: Parts) -> None:
        self.name = name
        self.parts: Parts = dict(sorted(parts.items()))
        self.files: Mapping[str, int] = {
            path: source.files[inner] for path, (source, inner) in self.parts.items()
        }
        self.stamps: Mapping[str, Stamp] = {
            path: source.stamps[inner] if isinstance(source, Folder) else (source.files[inner], 0)
            for path, (source, inner) in self.parts.items()
        }

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file."""
        source, inner = self._part(path)
        return source.read(inner, start, end)

    def identity(self) -> dict[str, str]:
        """The identities of all sources, numbered in the order of their first file."""
        sources = list(dict.fromkeys(source for source, _ in self.parts.values()))
        return {
            f"{key} {number}": value
            for number, source in enumerate(sources, start=1)
            for key, value in source.identity().items()
        }

    def _part(self, path: str) -> tuple[Source, str]:
        if path not in self.parts:
            raise SourceError(f"{self.name} has no file {path!r}.", "Download it again.")
        return self.parts[path]


class AssemblyReader:
    """A `Reader` of an assembly's files: folders' by their own, hubs' by one request for each read.

    `bytes_read` counts what came of each source.
    """

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        sources = {source for source, _ in assembly.parts.values()}
        self._readers = {each: reader_of(each) for each in sources}
        self._lock = Lock()
        self.bytes_read: dict[Source, int] = dict.fromkeys(sources, 0)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on."""
        source, inner = self._assembly.parts[path]
        self._readers[source].read_into(inner, start, buffer)
        with self._lock:
            self.bytes_read[source] += len(buffer)

    def prefetch(self, path: str, start: int, end: int) -> None:
        """Have the system fetch bytes [start, end) of a local file meanwhile."""
        source, inner = self._assembly.parts[path]
        self._readers[source].prefetch(inner, start, end)

    def check(self, path: str) -> None:
        """Raise SourceError where a local file was written to since its folder was looked at."""
        source, inner = self._assembly.parts[path]
        self._readers[source].check(inner)

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.close()


__all__ = ["Assembly", "AssemblyReader"]
