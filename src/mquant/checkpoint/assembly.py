"""A source that is put together from files of other sources."""

from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Lock

from mquant.checkpoint.reader import reader_of
from mquant.checkpoint.source import Source, Stamp
from mquant.errors import SourceError
from mquant.events import Emit

Parts = Mapping[str, tuple[Source, str]]
"""A file's path in the assembly -> the source that has the file, and its path in the source."""


class Assembly:
    """Files of several sources under one name, each file under a path of its own.

    Nothing is copied. `stamps` tells when a local file changes; a hub's commit fixes a hub's file.
    """

    def __init__(self, name: str, parts: Parts) -> None:
        self.name = name
        self.parts: Parts = dict(sorted(parts.items()))
        self.files: Mapping[str, int] = {
            path: source.files[inner] for path, (source, inner) in self.parts.items()
        }

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        """The stamps that the sources have of their files."""
        stamps = {source: source.stamps for source in self._sources}
        return {path: stamps[source][inner] for path, (source, inner) in self.parts.items()}

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of all sources."""
        return tuple(folder for source in self._sources for folder in source.folders)

    def materialize(self, emit: Emit, only: Collection[str] | None = None) -> "Assembly":
        """Return the assembly with the files of `only` on this machine; other files do not move.

        Each source downloads the needed files only, in one download.
        """
        parts = dict(self.parts)
        needed = parts if only is None else {path: parts[path] for path in only}
        for source in dict.fromkeys(source for source, _ in needed.values()):
            inner = {path: name for path, (owner, name) in needed.items() if owner is source}
            local = source.materialize(emit, sorted(inner.values()))
            parts |= {path: (local, name) for path, name in inner.items()}
        return Assembly(self.name, parts)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes [start, end) of a file."""
        source, inner = self._part(path)
        return source.read(inner, start, end)

    def identity(self) -> dict[str, str]:
        """Return the identities of all sources, numbered in the order of their first file."""
        return {
            f"{key} {number}": value
            for number, source in enumerate(self._sources, start=1)
            for key, value in source.identity().items()
        }

    @property
    def _sources(self) -> list[Source]:
        return list(dict.fromkeys(source for source, _ in self.parts.values()))

    def _part(self, path: str) -> tuple[Source, str]:
        if path not in self.parts:
            raise SourceError(f"{self.name} has no file {path!r}.", "Download all files again.")
        return self.parts[path]


class AssemblyReader:
    """A reader of an assembly's files: each source is read by its own reader.

    `bytes_read` counts the bytes that came from each source.
    """

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        sources = {source for source, _ in assembly.parts.values()}
        self._readers = {source: reader_of(source) for source in sources}
        self._lock = Lock()
        self.bytes_read: dict[Source, int] = dict.fromkeys(sources, 0)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on."""
        source, inner = self._assembly.parts[path]
        self._readers[source].read_into(inner, start, buffer)
        with self._lock:
            self.bytes_read[source] += len(buffer)

    def prefetch(self, path: str, start: int, end: int) -> None:
        """Ask the system to fetch bytes [start, end) of a local file in the background."""
        source, inner = self._assembly.parts[path]
        self._readers[source].prefetch(inner, start, end)

    def check(self, path: str) -> None:
        """Raise SourceError if a local file was written to since its folder was read."""
        source, inner = self._assembly.parts[path]
        self._readers[source].check(inner)

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.close()
