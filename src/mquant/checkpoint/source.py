"""The sources of a checkpoint's bytes: the protocol, a folder, an overlay. `hub` has a hub repo."""

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from mquant.errors import SourceError
from mquant.events import Emit


class Stamp(NamedTuple):
    """A file's size, times of modification and of change in ns, and inode.

    Every write to the file changes the stamp: a program can set `mtime` back, but not `ctime`. A
    hard link or a chmod changes `ctime` too, so the bytes under another stamp may be the same.
    """

    size: int
    mtime: int = 0
    ctime: int = 0
    inode: int = 0


def stamp(stat: os.stat_result) -> Stamp:
    """Return the stamp in a file's status."""
    return Stamp(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class Source(Protocol):
    """A named set of files that can be read in ranges. A source is never written to."""

    @property
    def name(self) -> str:
        """The checkpoint's name: the folder's, or `org/model`."""

    @property
    def files(self) -> Mapping[str, int]:
        """Relative POSIX paths of all files, with their sizes in bytes, sorted."""

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        """The stamp of each file, by path. A commit fixes a hub's file: its times are 0."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of this machine that hold the files. mquant never writes to these folders."""

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes [start, end) of a file. Raises SourceError if the file is shorter."""

    def identity(self) -> dict[str, str]:
        """Return the checkpoint's identity: equal for the same files in another place."""

    def materialize(self, emit: Emit, only: Collection[str] | None = None) -> "Source":
        """Return the files on this machine; a hub's are downloaded. `only`: the needed files."""


class Folder:
    """A checkpoint folder on this machine.

    `stamps` has the stamp of each file by path, as of the last look at the file.
    """

    def __init__(self, root: Path) -> None:
        if not root.exists():
            raise SourceError(
                f"{root} does not exist.",
                "Give an existing folder, or a hub repo id such as org/model.",
            )
        if not root.is_dir():
            raise SourceError(f"{root} is not a folder.", "Give the checkpoint's folder.")
        self.root = root
        self.stamps: Mapping[str, Stamp] = dict(sorted(self._walk()))
        self.files: Mapping[str, int] = {path: s.size for path, s in self.stamps.items()}

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.resolve().name

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder itself."""
        return (self.root,)

    def materialize(self, _emit: Emit, _only: Collection[str] | None = None) -> "Folder":
        """Return the folder itself: its files are on this machine already."""
        return self

    def path(self, path: str) -> Path:
        """Return the path of a listed file. Raises SourceError for a name that is not listed."""
        if path not in self.files:
            raise SourceError(f"{self.name} has no file {path!r}.", "Download all files again.")
        return self.root / PurePosixPath(path)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes [start, end) of a file."""
        end = self.files.get(path, 0) if end is None else end
        with self._opened(path) as file:
            return _part(file, path, start, end)

    @contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """Open a listed file. Raises SourceError if the file cannot be opened or read."""
        try:
            with self.path(path).open("rb") as file:
                yield file.fileno()
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read: {error.strerror}.", "Check the disk."
            ) from error

    def check(self, paths: Iterable[str]) -> None:
        """Raise SourceError if one of the files has changed since the folder was listed."""
        for path in paths:
            try:
                now = stamp(self.path(path).stat())
            except OSError:
                now = None
            if now != self.stamps[path]:
                raise changed(path)

    def look_again(self, paths: Iterable[str]) -> list[str]:
        """Take the stamps of these files anew; return the files whose ctime or inode differs.

        If a file has another size or mtime, or is gone, return none, and take no stamp.
        """
        now: dict[str, Stamp] = {}
        for path in paths:
            with suppress(OSError):
                now[path] = stamp(self.path(path).stat())
            if path not in now or now[path][:2] != self.stamps[path][:2]:
                return []
        touched = [path for path in now if now[path] != self.stamps[path]]
        self.stamps = {**self.stamps, **now}
        return touched

    def leads_out(self, path: str) -> bool:
        """Return whether a listed file is a link out of this folder.

        The hub cache's folders consist of links to `../../blobs`: such links count as inside.
        """
        root = self.root.resolve()
        cache = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        real = self.path(path).resolve()
        return not (real.is_relative_to(root) or real.is_relative_to(cache))

    def identity(self) -> dict[str, str]:
        """Return `content`: the sha256 of names, sizes, small files and samples of large files.

        The samples are some 64 evenly spread pieces of 4 KiB, the file's first bytes included:
        reading a whole checkpoint of 278 GB would cost as much as quantizing the checkpoint. The
        model card does not count: no output depends on the card.
        """
        digest = hashlib.sha256()
        for path, size in self.files.items():
            if path.lower() == "readme.md":
                continue
            digest.update(f"{path}\0{size}\0".encode())
            step = max(size // 64, 4096)
            with self._opened(path) as file:
                for start in range(0, size, step):
                    digest.update(_part(file, path, start, min(start + 4096, size)))
        return {"kind": "folder", "content": digest.hexdigest()}

    def _walk(self) -> list[tuple[str, Stamp]]:
        # Subfolders count (some tokenizers have one), except hidden folders (.git, .cache). A link
        # to a file counts, because hub caches consist of such links; a link to a folder does not.
        # Pipes and devices are no files, and no checkpoint has a name that cannot be printed. A
        # file that was deleted meanwhile is skipped: other processes may work in the folder.
        stamps: list[tuple[str, Stamp]] = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = sorted(filter(_is_visible, folders))
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError):
                    if _is_visible(name) and path.is_file():
                        stamps.append((path.relative_to(self.root).as_posix(), stamp(path.stat())))
        return stamps


def changed(path: str) -> SourceError:
    """Return the error for a file of a source that changed during a run."""
    return SourceError(
        f"{path} changed while it was read.",
        "Wait until nothing writes to the file, then run the same command again: only what was "
        "made from the file is made again.",
    )


def _part(file: int, path: str, start: int, end: int) -> bytes:
    """Return bytes [start, end) of an open file. Raises SourceError if the file is shorter."""
    data = os.pread(file, end - start, start)
    while len(data) < end - start:  # pread stops at 2 GiB
        more = os.pread(file, end - start - len(data), start + len(data))
        if not more:
            raise SourceError(
                f"{path} ends at byte {start + len(data):,}; {end:,} were expected.",
                "The file changed while it was read, or is truncated: get it again.",
            )
        data += more
    return data


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.isprintable()


class Overlay:
    """A source with some files in memory, instead of its own files or beside them.

    mquant can then judge a checkpoint before it writes the checkpoint's last files.
    """

    def __init__(self, below: Source, files: Mapping[str, bytes]) -> None:
        self._below = below
        self._over = files
        sizes = {**below.files, **{path: len(content) for path, content in files.items()}}
        self.files: Mapping[str, int] = dict(sorted(sizes.items()))

    @property
    def name(self) -> str:
        """The name of the source below."""
        return self._below.name

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        """The stamps of the source below; a file in memory never changes."""
        return {p: self._below.stamps.get(p, Stamp(n)) for p, n in self.files.items()}

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of the source below."""
        return self._below.folders

    def materialize(self, emit: Emit, only: Collection[str] | None = None) -> "Overlay":
        """Return the same files in memory, over the materialized source below."""
        return Overlay(self._below.materialize(emit, only), self._over)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes [start, end) of a file."""
        if path in self._over:
            return self._over[path][start:end]
        return self._below.read(path, start, end)

    def identity(self) -> dict[str, str]:
        """Return the identity of the source below."""
        return self._below.identity()
