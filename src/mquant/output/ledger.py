"""The ledger of a run: which files OUT will hold, and which work units are durably on disk.

The ledger is an append-only file of JSON lines. A run locks the ledger while the run is under way,
and deletes the ledger when the run is complete. A line is written after the bytes of its work units
are on disk; a last line without a line feed is ignored. In a run in shares (see `shared_run`) each
share has its own ledger, which numbers the work units of the share. The key `jobs` means work
units.

    {"schema": "mquant.run/2", "fingerprint": {...}, "files": ["config.json", ...]}
    {"sources": {"model-00001-of-00002.safetensors": STAMP, ...}}      at each start
    {"jobs": [[0, 41], [44, 44]],      first to last, as numbered in the plan
     "fronts": {"model-00001-of-00003.safetensors": FRONT}}
    {"shard": "model-00001-of-00003.safetensors", "sha256": "...", "jobs": [[0, 99]],
     "stamp": STAMP}                                                   complete
    {"said": {...}}                    what an engine that is done says, for mquant.json

A STAMP is a list of size, mtime, ctime and inode. A ledger of an earlier release has other stamps,
which equal no stamp of this release. A FRONT is a list of the number of bytes at the front of a
partial shard that are complete, and their sha256. The work units behind a front do not count. A
ledger of an earlier release has no fronts; then all work units count.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any, Final, NamedTuple

from mquant.checkpoint import Stamp, stamp
from mquant.errors import InUse, OutputError
from mquant.output.disk import fsync_folder, out_of_space, read_own, write_whole
from mquant.untrusted import MAX_TENSORS, parse_json

LEDGER: Final = "mquant-run.jsonl"
SHARES: Final = "mquant-shares.json"
"""The file in OUT that marks a run in shares."""
_SCHEMA: Final = "mquant.run/2"
MOST_BYTES: Final = 256_000_000  # a run of days writes 200 bytes a few times a second
# A plan has no more work units than tensors; a ledger names each work unit a few times.
_MOST_JOBS: Final = 4 * MAX_TENSORS
_SHARED: Final = re.compile(r"mquant-run\.[1-9]\d{0,4}-of-[1-9]\d{0,4}\.jsonl", re.ASCII)
_TAKEN: Final = frozenset({errno.EAGAIN, errno.EACCES})  # EACCES: on some network file systems
_PAUSE_SECONDS: Final = 0.05


def ledger_name(number: int, of: int) -> str:
    """Return the name of the ledger of one share."""
    return f"mquant-run.{number}-of-{of}.jsonl"


def is_ledger(name: str) -> bool:
    """Return whether a file has the name of a ledger, of a share or of a whole run."""
    return name == LEDGER or _SHARED.fullmatch(name) is not None


class Front(NamedTuple):
    """The complete bytes at the front of a partial shard: their number, and their sha256."""

    nbytes: int
    sha256: str


@dataclass(slots=True)
class Recorded:
    """The content of a ledger.

    `units` maps the number of a work unit to the stamps of the source files at that time; `shards`
    maps the name of a complete shard to its sha256, and `stamps` to the stamp of its file. `fronts`
    maps the name of a partial shard to the front that was recorded last. `digests` maps the number
    of a work unit that was written out of order to its sha256 (see `ShardSet`). `said` is what an
    engine said that is done; None if none is.
    """

    fingerprint: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    units: dict[int, Mapping[str, Stamp]] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    stamps: dict[str, Stamp] = field(default_factory=dict)
    fronts: dict[str, Front] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    said: Mapping[str, Any] | None = None

    def has(self, shard: str, path: Path) -> bool:
        """Return whether `path` is the complete shard: by its stamp, or else by its sha256."""
        if shard not in self.shards or path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            if stamp(os.fstat(file.fileno())) == self.stamps.get(shard):
                return True
            return hashlib.file_digest(file, "sha256").hexdigest() == self.shards[shard]


def read_ledger(out: Path, name: str = LEDGER) -> Recorded | None:
    """Return the content of a ledger in `out`; None if there is no readable ledger.

    A ledger without a valid first line has no `files`. An invalid line is ignored: a run makes the
    work units of the line again.
    """
    raw = read_own(out / name, MOST_BYTES)
    return None if raw is None else parse_ledger(raw)


def parse_ledger(raw: bytes) -> Recorded:
    """Return the content of a ledger, from the bytes of its lines."""
    recorded = Recorded()
    sources: dict[str, Stamp] = {}
    allowed = _MOST_JOBS
    for line in io.BytesIO(raw):
        entry = _parse(line)
        match entry:
            case {"schema": str(schema), "fingerprint": dict(fingerprint), "files": list(files)}:
                recorded = Recorded(fingerprint if schema == _SCHEMA else {}, tuple(files))
            case {"sources": dict(table)}:
                sources = {path: _stamp(value) for path, value in table.items()}
            case {"jobs": list(spans)}:
                for number in islice(chain.from_iterable(map(_span, spans)), allowed):
                    recorded.units[number] = sources
                    allowed -= 1
                if "shard" in entry:
                    recorded.shards[str(entry["shard"])] = str(entry.get("sha256"))
                    recorded.stamps[str(entry["shard"])] = _stamp(entry.get("stamp"))
                    recorded.fronts.pop(str(entry["shard"]), None)
                recorded.fronts |= _fronts(entry.get("fronts"))
                recorded.digests |= _digests(entry.get("digests"), recorded.units)
            case {"said": dict(said)}:
                recorded.said = said
    return recorded


class Ledger:
    """The claim on OUT, or on a share, during a run. Any thread may call the methods."""

    def __init__(self, out: Path, name: str = LEDGER, patience: float = 0.0) -> None:
        """Lock OUT, or a share of a run, and create the folder if it does not exist.

        Raises InUse if another process still holds the lock after `patience` seconds, OutputError
        if OUT cannot be written, or if its file system has no locks.
        """
        self._out = out
        self._path = out / name
        self._lock = Lock()
        with out_of_space(self._path, 0):
            out.mkdir(parents=True, exist_ok=True)
            self._file = self._open(time.monotonic() + patience)

    def _open(self, deadline: float) -> int:
        while True:
            flags = os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.open(self._path, flags, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(file)
                if error.errno not in _TAKEN:
                    raise OutputError(
                        f"{self._out} cannot be locked: {error.strerror}.",
                        "Mount the file system with locks (Lustre: -o flock), or give another -o.",
                    ) from error
                if time.monotonic() > deadline:
                    raise InUse(
                        f"Another mquant is writing into {self._out}.",
                        "Wait for the other mquant, or give another -o.",
                    ) from None
                time.sleep(_PAUSE_SECONDS)
                continue
            if self._is_at(file):
                if os.fstat(file).st_nlink < 2:
                    return file
                # Lines in a file with another name would change another file.
                write_whole(self._path, [read_own(self._path, MOST_BYTES) or b""])
            os.close(file)  # or another run was completed just then, and deleted the file

    def begin(self, fingerprint: dict[str, Any], files: Iterable[str], *, afresh: bool) -> None:
        """Record the fingerprint and the files of this run, before the run writes any of the files.

        With `afresh`, delete all lines first; otherwise keep the lines of the earlier run, which
        this run resumes.
        """
        if afresh:
            with out_of_space(self._path, 0):
                os.ftruncate(self._file, 0)
            self._append(head_line(fingerprint, files))
        elif not self._ends_a_line():
            self._append(b"\n")
        with out_of_space(self._path, 0):
            fsync_folder(self._out)

    def read_from(self, sources: Mapping[str, Stamp]) -> None:
        """Record the stamps of the source files that later work units are made from."""
        self._append(sources_line(sources))

    @property
    def recorded(self) -> Recorded:
        """The content of the ledger."""
        return read_ledger(self._out, self._path.name) or Recorded()

    def count(
        self,
        units: Iterable[int],
        fronts: Mapping[str, Front] | None = None,
        digests: Mapping[int, str] | None = None,
    ) -> None:
        """Count work units whose bytes are on disk; `fronts`: of the partial shards that changed.

        A front holds before and after the line is written: its bytes are on disk, and stay.
        `digests`: the sha256 of units that were written out of order.
        """
        spans: list[list[int]] = []
        for number in sorted(units):
            if spans and number == spans[-1][1] + 1:
                spans[-1][1] = number
            else:
                spans.append([number, number])
        more = {"fronts": fronts, "digests": digests}
        if spans or fronts:
            self._append(
                _line({"jobs": spans, **{key: each for key, each in more.items() if each}})
            )

    def complete_shard(self, name: str, sha256: str, units: range) -> None:
        """Count a shard that is on disk under its final name, and all its work units."""
        self._append(shard_line(name, sha256, units, stamp((self._out / name).stat())))

    def say(self, said: Mapping[str, Any]) -> None:
        """Record what an engine that is done says, for mquant.json."""
        self._append(_line({"said": said}))

    def complete(self) -> None:
        """Delete the ledger: the run is complete."""
        with out_of_space(self._path, 0):
            self._path.unlink()
            fsync_folder(self._out)

    def release(self) -> None:
        """Release the lock. The ledger stays, so that the next run knows that mquant made OUT.

        An empty ledger is deleted: the run did not claim OUT.
        """
        if self._is_at(self._file) and not os.fstat(self._file).st_size:
            self._path.unlink()
        os.close(self._file)

    def _append(self, line: bytes) -> None:
        with self._lock, out_of_space(self._path, len(line)):
            if not self._is_at(self._file):
                raise OutputError(
                    f"{self._out} was deleted or replaced during the run.",
                    "Delete the folder if it is there, then run the same command again.",
                )
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)

    def _ends_a_line(self) -> bool:
        size = os.fstat(self._file).st_size
        return os.pread(self._file, 1, size - 1) == b"\n" if size else True

    def _is_at(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), self._path.stat())
        except FileNotFoundError:
            return False


def head_line(fingerprint: Mapping[str, Any], files: Iterable[str]) -> bytes:
    """Return the first line of a ledger: the run's fingerprint, and every file of the run."""
    head = {"schema": _SCHEMA, "fingerprint": dict(fingerprint), "files": sorted(files)}
    return _line(head)


def sources_line(sources: Mapping[str, Stamp]) -> bytes:
    """Return the line of the source files that the work units of the next lines are made from."""
    return _line({"sources": dict(sources)})


def shard_line(name: str, sha256: str, units: range, at: Stamp | None = None) -> bytes:
    """Return the line of a complete shard and all its work units; `at`: the stamp of its file."""
    jobs = [[units.start, units.stop - 1]]
    return _line({"shard": name, "sha256": sha256, "jobs": jobs, **({"stamp": at} if at else {})})


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _stamp(value: object) -> Stamp:
    match value:
        case [int(size), int(mtime), int(ctime), int(inode)]:
            return Stamp(size, mtime, ctime, inode)
    return Stamp(-1)  # no file has this stamp


def _fronts(table: object) -> dict[str, Front]:
    fronts: dict[str, Front] = {}
    for name, value in table.items() if isinstance(table, dict) else ():
        match value:
            case [int(nbytes), str(sha256)]:
                fronts[name] = Front(nbytes, sha256)
            case _:
                fronts[name] = Front(-1, "")  # no file begins so
    return fronts


def _digests(table: object, units: Container[int]) -> dict[int, str]:
    """Return the digests of known work units: JSON's keys are strings."""
    return {
        int(number): digest
        for number, digest in (table.items() if isinstance(table, dict) else ())
        if number.isascii() and number.isdigit() and len(number) < 9 and int(number) in units
        if isinstance(digest, str)
    }


def _span(value: object) -> range:
    match value:
        case [int(first), int(last)] if 0 <= first <= last < MAX_TENSORS:
            return range(first, last + 1)
    return range(0)


def _parse(line: bytes) -> Any:
    if not line.endswith(b"\n"):
        return None
    try:
        return parse_json(line)
    except ValueError:
        return None
