"""A hub repo's files on their way through a folder of bounded size.

Files come in the order in which the work needs them, and are deleted when no work needs them any
more. A file comes whole if all its tensors are needed; then its sha256 must be the hub's before the
file is used. A later run goes on with the files in the folder.
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
"""Bytes of one request. Several run at once; a killed run requests the unfinished ones again."""
_WINDOW: Final = 10  # pieces; more than connections, so that a slow one does not stop the others
_READ_BYTES: Final = 1 << 20
_PARTIAL: Final = ".partial"
_NAMES: Final = ("", _PARTIAL)
_AGAIN: Final = "Run the same command again: it goes on from there."

Work = Mapping[int, Iterable[TensorInfo]]
"""The reads of each work unit, by its number, in the order of the work units."""


@dataclass(eq=False)
class FilePart:
    """Bytes [start, end) of a file, which one or more pieces of work need.

    `digest` is the sha256 of the whole file, if the whole file is fetched and the hub lists a
    digest.
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
        """How much room it takes."""
        return self.end - self.start

    @property
    def name(self) -> str:
        """What it is called in the folder."""
        return self.path if self.digest else f"{self.path}.{self.start}-{self.end}"


def parts_of(repo: HubRepo, tensors: Iterable[TensorInfo], work: Work) -> list[FilePart]:
    """The parts to fetch, in order. `tensors` are all tensors of the repo.

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
    """The least bytes with which the work can be done: of all files needed at one time."""
    changes = [change for p in parts for change in ((p.first, p.nbytes), (p.last + 1, -p.nbytes))]
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


class Spool:
    """A reader of a hub repo's files: a read waits until its file is on this machine.

    At most `room` bytes lie in `folder`; `room` must be at least `least_room`. Files are fetched
    while the spool is used as a context manager. `done` says which work needs its files no longer.
    A read raises SourceError if a file cannot be fetched, or is not the file that the hub lists.
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
        self._here = 0  # bytes of room that are taken
        self._fetched = 0
        self._prepare(folder)
        self._total = sum(part.nbytes for part in parts)
        self._thread = Thread(target=self._run, name="spool")

    def __enter__(self) -> "Spool":
        """Begin to fetch."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Fetch no more. Files stay, for the next run."""
        self.stop()
        self._thread.join()
        for file in self._open.values():
            os.close(file)
        self._open.clear()

    def clear(self) -> None:
        """Remove the folder, when all work is done."""
        self._folder.rmdir()
        self._folder.parent.rmdir()

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on, when the file is there."""
        file, part, done = self._file(path), self._parts[path], 0
        while done < len(buffer):
            got = os.preadv(file, [buffer[done:]], start - part.start + done)
            if not got:
                raise SourceError(f"{path} ends before byte {start + len(buffer):,}.", _AGAIN)
            done += got

    def prefetch(self, path: str, start: int, end: int) -> None:
        """Do nothing: all files are on their way."""

    def check(self, path: str) -> None:
        """Do nothing: nobody else writes these files."""

    def done(self, numbers: Iterable[int]) -> None:
        """Note that work is done for good; files that no other work needs are deleted."""
        with self._changed:
            for path in (path for number in numbers for path in self._needs.pop(number, ())):
                part = self._parts[path]
                part.users -= 1
                if not part.users:
                    self._remove(part)
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody wait any longer: whoever waits raises SourceError."""
        self._fail(SourceError("Stopped.", _AGAIN))

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    # -------------------------------------------------------------------- what lies in the folder

    def _prepare(self, folder: Path) -> None:
        """Keep the files of an earlier run that are of use, and delete the others."""
        for place in (folder, self._folder):
            if place.is_symlink():
                place.unlink()  # a link could lead outside OUT
        self._folder.mkdir(parents=True, exist_ok=True)
        for part in self._parts.values():
            there = self._folder / part.path
            if there.is_file() and there.stat().st_size == self._repo.files[part.path]:
                _make_whole(part, self._repo)  # the pieces on disk are not fetched again
        useful = {self._folder / (p.name + end) for p in self._parts.values() for end in _NAMES}
        for path in (*folder.iterdir(), *self._folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                if path != self._folder:
                    shutil.rmtree(path)  # the files of another commit
            elif path not in useful or path.is_symlink():
                path.unlink()
        for part in self._parts.values():
            whole = self._folder / part.name
            if whole.is_file() and whole.stat().st_size == part.nbytes:
                part.ready = True
                self._here += part.nbytes
                self._fetched += part.nbytes

    def _remove(self, part: FilePart) -> None:
        if part.path in self._open:
            os.close(self._open.pop(part.path))
        (self._folder / part.name).unlink(missing_ok=True)
        self._here -= part.nbytes

    def _file(self, path: str) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._parts[path].ready)
            if not self._parts[path].ready and self._failure:
                raise self._failure
            if path not in self._open:
                where = self._folder / self._parts[path].name
                self._open[path] = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            return self._open[path]

    # ------------------------------------------------------------------------------------- fetching

    def _run(self) -> None:
        with ThreadPoolExecutor(CONNECTIONS) as pool, ExitStack() as files:
            try:
                self._fetch(pool, files)
            except BaseException as error:  # noqa: BLE001 -- raised where the files are awaited
                self._fail(error)
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, pool: ThreadPoolExecutor, files: ExitStack) -> None:
        """Fetch pieces side by side, and store them one after another."""
        under_way: deque[tuple[_Growing, Future[bytes]]] = deque()

        def store() -> None:
            growing, piece = under_way.popleft()
            self._store(growing, piece.result())

        for part in [part for part in self._parts.values() if not part.ready]:
            while under_way and not self._has_room(part):
                store()
            if not self._wait_for_room(part):
                return
            growing = files.enter_context(_Growing(part, self._folder))
            self._tell(growing.nbytes)
            for start in range(part.start + growing.nbytes, part.end, PIECE):
                end = min(start + PIECE, part.end)
                while len(under_way) >= _WINDOW:
                    store()
                if self._failure:
                    return
                piece = pool.submit(self._repo.read, part.path, start, end)
                under_way.append((growing, piece))
            if growing.nbytes == part.nbytes:  # an earlier run had fetched all of it
                self._finish(growing)
        while under_way:
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
                "Run the same command again: it gets the file anew.",
            )
        with self._changed:
            part.ready = True
            self._changed.notify_all()

    def _has_room(self, part: FilePart) -> bool:
        with self._changed:
            return self._here + part.nbytes <= self._room

    def _wait_for_room(self, part: FilePart) -> bool:
        """Reserve the space that a part needs; False if no work unit needs the part any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._here + part.nbytes <= self._room)
            self._here += part.nbytes
            return self._failure is None

    def _tell(self, nbytes: int) -> None:
        self._fetched += nbytes
        self._emit(Progress("download", self._fetched, self._total))


class _Growing:
    """A part that is being fetched, from its first byte to its last, in a partial file."""

    def __init__(self, part: FilePart, folder: Path) -> None:
        """Go on with an earlier run's partial file, if a digest can tell that it is right."""
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
        """Nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; keep it on disk."""
        self._file.close()

    def append(self, data: bytes) -> None:
        """Take the next bytes."""
        self._digest.update(data)
        self.nbytes += len(data)
        with _stored(self._partial):
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]

    def finish(self) -> bool:
        """Rename the file when it is on disk; if the digest differs, delete it and return False."""
        with _stored(self._partial):
            os.fdatasync(self._file.fileno())
            self._file.close()
            right = self.part.digest in (None, self._digest.hexdigest())
            if right:
                self._partial.rename(self._final)
            else:
                self._partial.unlink()
        return right


@contextmanager
def _stored(path: Path) -> Iterator[None]:
    """Turn OSErrors of the folder into one sentence."""
    try:
        yield
    except OSError as error:
        name = path.name.removesuffix(_PARTIAL)
        raise OutputError(
            f"{name} cannot be stored in {path.parent.parent}: {error.strerror}.",
            "Free space there, then run the same command again.",
        ) from error
