"""Download a hub repo's files through a folder of bounded size.

The spool downloads files in the order in which the work units need them, and deletes a file when no
work unit needs the file any more. If the work units need all tensors of a file, the spool downloads
the whole file, and compares the file's sha256 with the hub's before a work unit reads the file. A
later run resumes with the files in the folder.
"""

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import Final

from mquant.checkpoint.headers import TensorInfo
from mquant.checkpoint.hub import HubRepo
from mquant.errors import OutputError, SourceError
from mquant.events import Emit, Progress

CONNECTIONS: Final = 8
PIECE: Final = 2 << 20
"""Bytes of one request. Several requests run at once; a killed run repeats the unfinished ones."""
_WINDOW: Final = 10  # pieces; more than connections, so that a slow piece does not stop the others
_READ_BYTES: Final = 1 << 20
_PARTIAL: Final = ".partial"
_NAMES: Final = ("", _PARTIAL)
_AGAIN: Final = "Run the same command again to resume."

Work = Mapping[int, Iterable[TensorInfo]]
"""The reads of each work unit, by its number, in the order of the work units."""


@dataclass(eq=False)
class FilePart:
    """Bytes [start, end) of a file, which one or more work units need.

    `digest` is the sha256 of the whole file, if the whole file is downloaded and the hub lists a
    digest. `first` and `last` are the places of the first and the last work unit that needs the
    part; `users` is the number of work units that still need the part.
    """

    path: str
    start: int
    end: int
    digest: str | None
    first: int
    last: int
    users: int = 0
    ready: bool = False

    @property
    def nbytes(self) -> int:
        """The part's bytes on disk."""
        return self.end - self.start

    @property
    def name(self) -> str:
        """The part's file name in the folder."""
        return self.path if self.digest else f"{self.path}.{self.start}-{self.end}"


def parts_of(repo: HubRepo, tensors: Iterable[TensorInfo], work: Work) -> list[FilePart]:
    """Return the parts to download, in order. `tensors` are all tensors of the repo.

    A part goes from the first needed byte of a file to the last. If the work needs all tensors of
    the file, the part is the whole file, header included.
    """
    held: dict[str, tuple[int, int]] = {}
    for info in tensors:
        start, end = held.get(info.shard, (info.start, info.end))
        held[info.shard] = min(start, info.start), max(end, info.end)
    parts: dict[str, FilePart] = {}
    for place, infos in enumerate(work.values()):
        for info in infos:
            part = parts.setdefault(
                info.shard, FilePart(info.shard, info.start, info.end, None, place, place)
            )
            part.start, part.end = min(part.start, info.start), max(part.end, info.end)
            part.last = place
    for path, part in parts.items():
        if (part.start, part.end) == held[path]:
            _make_whole(part, repo)
    return list(parts.values())


def _make_whole(part: FilePart, repo: HubRepo) -> None:
    part.start, part.end, part.digest = 0, repo.files[part.path], repo.sha256.get(part.path)


def least_room(parts: Iterable[FilePart]) -> int:
    """Return the least room in bytes: the peak that the files needed at one time take."""
    changes = [change for p in parts for change in ((p.first, p.nbytes), (p.last + 1, -p.nbytes))]
    peak = current = 0
    for _, change in sorted(changes):
        current += change
        peak = max(peak, current)
    return peak


class Spool:
    """A reader of a hub repo's files: a read waits until its file is on this machine.

    `folder` holds at most `room` bytes; `room` must be at least `least_room`. The spool downloads
    files while it is used as a context manager. `done` says which work units are finished. A read
    raises SourceError if the download fails, or gives another file than the hub lists.
    """

    def __init__(
        self, repo: HubRepo, folder: Path, room: int, parts: list[FilePart], work: Work, emit: Emit
    ) -> None:
        self._repo, self._emit, self._room = repo, emit, room
        self._folder = folder / repo.commit
        self._parts = {part.path: part for part in parts}
        self._needs = {number: {info.shard for info in infos} for number, infos in work.items()}
        for path in (path for paths in self._needs.values() for path in paths):
            self._parts[path].users += 1
        self._open: dict[str, int] = {}
        self._changed = Condition()
        self._failure: BaseException | None = None
        self._taken = 0  # bytes of room
        self._fetched = 0
        self._prepare(folder)
        self._total = sum(part.nbytes for part in parts)
        self._thread = Thread(target=self._run, name="spool")

    def __enter__(self) -> "Spool":
        """Start the download."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the download. The files stay for the next run."""
        self.stop()
        self._thread.join()
        for file in self._open.values():
            os.close(file)
        self._open.clear()

    def clear(self) -> None:
        """Remove the empty folder after all work is done."""
        self._folder.rmdir()
        self._folder.parent.rmdir()

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on, once the part is downloaded."""
        file, part, done = self._file(path), self._parts[path], 0
        while done < len(buffer):
            count = os.preadv(file, [buffer[done:]], start - part.start + done)
            if not count:
                raise SourceError(f"{path} ends before byte {start + len(buffer):,}.", _AGAIN)
            done += count

    def prefetch(self, path: str, start: int, end: int) -> None:
        """Do nothing: the spool downloads all files in advance."""

    def check(self, path: str) -> None:
        """Do nothing: no other process writes these files."""

    def done(self, numbers: Iterable[int]) -> None:
        """Note that work units are finished, and delete the files that no other work unit needs."""
        with self._changed:
            for path in (path for number in numbers for path in self._needs.pop(number, ())):
                part = self._parts[path]
                part.users -= 1
                if not part.users:
                    self._remove(part)
            self._changed.notify_all()

    def stop(self) -> None:
        """Stop the download; reads that wait raise SourceError."""
        self._fail(SourceError("Stopped.", _AGAIN))

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    # -------------------------------------------------------------------------- files in the folder

    def _prepare(self, folder: Path) -> None:
        """Keep the useful files of an earlier run, and delete the others."""
        for place in (folder, self._folder):
            if place.is_symlink():
                place.unlink()  # a link could lead outside OUT
        self._folder.mkdir(parents=True, exist_ok=True)
        for part in self._parts.values():
            whole = self._folder / part.path
            if whole.is_file() and whole.stat().st_size == self._repo.files[part.path]:
                _make_whole(part, self._repo)  # so that the file on disk is not downloaded again
        useful = {self._folder / (p.name + end) for p in self._parts.values() for end in _NAMES}
        for path in (*folder.iterdir(), *self._folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                if path != self._folder:
                    shutil.rmtree(path)  # the files of another commit
            elif path not in useful or path.is_symlink() or path.stat().st_nlink > 1:
                path.unlink()  # to append to a file with another name would change another file
        for part in self._parts.values():
            whole = self._folder / part.name
            if whole.is_file() and not _is_still(part, whole):
                whole.unlink()  # the file changed since the run that downloaded it
            elif whole.is_file():
                part.ready = True
                self._taken += part.nbytes
                self._fetched += part.nbytes

    def _remove(self, part: FilePart) -> None:
        if part.path in self._open:
            os.close(self._open.pop(part.path))
        (self._folder / part.name).unlink(missing_ok=True)
        self._taken -= part.nbytes

    def _file(self, path: str) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._parts[path].ready)
            if not self._parts[path].ready and self._failure:
                raise self._failure
            if path not in self._open:
                stored = self._folder / self._parts[path].name
                self._open[path] = os.open(stored, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            return self._open[path]

    # ------------------------------------------------------------------------------------- download

    def _run(self) -> None:
        with ThreadPoolExecutor(CONNECTIONS) as pool, ExitStack() as files:
            try:
                self._fetch(pool, files)
            except BaseException as error:  # noqa: BLE001 -- the reads that wait raise the error
                self._fail(error)
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, pool: ThreadPoolExecutor, files: ExitStack) -> None:
        """Download pieces in parallel, and store the pieces one after another."""
        pending: deque[tuple[_Growing, Future[bytes]]] = deque()

        def store() -> None:
            growing, piece = pending.popleft()
            self._store(growing, piece.result())

        for part in [part for part in self._parts.values() if not part.ready]:
            while pending and not self._has_room(part):
                store()
            if not self._wait_for_room(part):
                return
            growing = files.enter_context(_Growing(part, self._folder))
            self._tell(growing.nbytes)
            for start in range(part.start + growing.nbytes, part.end, PIECE):
                end = min(start + PIECE, part.end)
                while len(pending) >= _WINDOW:
                    store()
                if self._failure:
                    return
                piece = pool.submit(self._repo.read, part.path, start, end)
                pending.append((growing, piece))
            if growing.nbytes == part.nbytes:  # an earlier run downloaded all of the part
                self._finish(growing)
        while pending:
            store()

    def _store(self, growing: "_Growing", data: bytes) -> None:
        growing.append(data)
        self._tell(len(data))
        if growing.nbytes == growing.part.nbytes:
            self._finish(growing)

    def _finish(self, growing: "_Growing") -> None:
        part = growing.part
        if not growing.finish():
            raise SourceError(
                f"{part.path} of {self._repo.repo_id} does not have the sha256 that "
                f"{self._repo.host} lists.",
                "Run the same command again to download the file again.",
            )
        with self._changed:
            part.ready = True
            self._changed.notify_all()

    def _has_room(self, part: FilePart) -> bool:
        with self._changed:
            return self._taken + part.nbytes <= self._room

    def _wait_for_room(self, part: FilePart) -> bool:
        """Wait for a part's room, and reserve the room; return False after a failure or `stop`."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._taken + part.nbytes <= self._room)
            self._taken += part.nbytes
            return self._failure is None

    def _tell(self, nbytes: int) -> None:
        self._fetched += nbytes
        self._emit(Progress("download", self._fetched, self._total))


class _Growing:
    """A part during its download, from the first byte to the last, in a partial file."""

    def __init__(self, part: FilePart, folder: Path) -> None:
        """Resume an earlier run's partial file, if a digest can verify the whole file."""
        self.part = part
        self._final = folder / part.name
        self._partial = folder / (part.name + _PARTIAL)
        self._digest = hashlib.sha256()
        self.nbytes = 0
        with _stored(self._partial):
            self._file = self._partial.open("a+b", buffering=0)
            self._file.seek(0)
            if part.digest and os.fstat(self._file.fileno()).st_size <= part.nbytes:
                while data := self._file.read(_READ_BYTES):
                    self._digest.update(data)
                    self.nbytes += len(data)
            else:
                self._file.truncate(0)

    def __enter__(self) -> "_Growing":
        """Return the part: its file is open already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, which stays on disk."""
        self._file.close()

    def append(self, data: bytes) -> None:
        """Append the next bytes to the file."""
        self._digest.update(data)
        self.nbytes += len(data)
        with _stored(self._partial):
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]

    def finish(self) -> bool:
        """Sync and rename the file; if its digest is wrong, delete the file and return False."""
        with _stored(self._partial):
            os.fdatasync(self._file.fileno())
            self._file.close()
            valid = self.part.digest in (None, self._digest.hexdigest())
            if valid:
                self._partial.rename(self._final)
            else:
                self._partial.unlink()
        return valid


def _is_still(part: FilePart, path: Path) -> bool:
    """Return whether an earlier run's file has the part's size, and its digest if one is known."""
    if path.stat().st_size != part.nbytes:
        return False
    if part.digest is None:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == part.digest


@contextmanager
def _stored(path: Path) -> Iterator[None]:
    """Turn an OSError of the folder into an OutputError."""
    try:
        yield
    except OSError as error:
        name = path.name.removesuffix(_PARTIAL)
        raise OutputError(
            f"{name} cannot be stored in {path.parent.parent}: {error.strerror}.",
            "Free space there, then run the same command again.",
        ) from error
