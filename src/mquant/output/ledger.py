"""The ledger of a run: which files OUT will hold, and which work units are on disk for good.

The ledger is an append-only file of JSON lines. While a run is at work, the run holds the ledger
locked; when the run is complete, the ledger is deleted. A line is written after the bytes that it
counts are on disk; a last line without its end counts nothing. In a run in shares (see
`shared_run`) each share has its own ledger, which numbers the work units of the share. The key
`jobs` means work units.

    {"schema": "mquant.run/2", "fingerprint": {...}, "files": ["config.json", ...]}
    {"sources": {"model-00001-of-00002.safetensors": [size, mtime_ns], ...}}     at each start
    {"jobs": [[0, 41], [44, 44]]}      first to last, as numbered in the plan
    {"shard": "model-00001-of-00003.safetensors", "sha256": "...", "jobs": [[0, 99]]}      whole
"""

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any, Final

from mquant.checkpoint import Stamp
from mquant.errors import InUse, OutputError
from mquant.output.disk import fsync_folder, out_of_space, read_own
from mquant.untrusted import MAX_TENSORS, parse_json

LEDGER: Final = "mquant-run.jsonl"
SHARES: Final = "mquant-shares.json"
"""The file in OUT that marks a run in shares."""
_SCHEMA: Final = "mquant.run/2"
MOST_BYTES: Final = 64_000_000
# A plan has no more work units than tensors; a ledger names each work unit a few times.
_MOST_JOBS: Final = 4 * MAX_TENSORS
_SHARED: Final = re.compile(r"mquant-run\.[1-9]\d{0,4}-of-[1-9]\d{0,4}\.jsonl", re.ASCII)
_TAKEN: Final = frozenset({errno.EAGAIN, errno.EACCES})  # EACCES: on some network file systems
_PAUSE_SECONDS: Final = 0.05


def ledger_name(number: int, of: int) -> str:
    """The name of the ledger of one share."""
    return f"mquant-run.{number}-of-{of}.jsonl"


def is_ledger(name: str) -> bool:
    """Whether a file has the name of a ledger, of a share or of a whole run."""
    return name == LEDGER or _SHARED.fullmatch(name) is not None


@dataclass(slots=True)
class Recorded:
    """What a ledger says.

    `units` maps the number of a work unit to the stamps of the files it was made from; `shards`
    maps the name of a complete shard to its sha256.
    """

    fingerprint: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    units: dict[int, Mapping[str, Stamp]] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)


def read_ledger(out: Path, name: str = LEDGER) -> Recorded | None:
    """What a ledger in `out` says; None if there is no ledger, empty if it has no first line.

    A line that makes no sense counts nothing: its work units are made again.
    """
    raw = read_own(out / name, MOST_BYTES)
    return None if raw is None else parse_ledger(raw)


def parse_ledger(raw: bytes) -> Recorded:
    """What the lines of a ledger say."""
    recorded = Recorded()
    sources: dict[str, Stamp] = {}
    left = _MOST_JOBS
    for line in raw.splitlines(keepends=True):
        entry = _parse(line)
        match entry:
            case {"schema": str(schema), "fingerprint": dict(fingerprint), "files": list(files)}:
                recorded = Recorded(fingerprint if schema == _SCHEMA else {}, tuple(files))
            case {"sources": dict(table)}:
                sources = {path: _stamp(value) for path, value in table.items()}
            case {"jobs": list(spans)}:
                for number in islice(chain.from_iterable(map(_span, spans)), left):
                    recorded.units[number] = sources
                    left -= 1
                if "shard" in entry:
                    recorded.shards[str(entry["shard"])] = str(entry.get("sha256"))
    return recorded


class Ledger:
    """The claim on OUT, or on a share, during a run. Any thread may call the methods."""

    def __init__(self, out: Path, name: str = LEDGER, patience: float = 0.0) -> None:
        """Lock OUT; make the folder if there is none.

        Raises InUse if another process is still at work in OUT after `patience` seconds,
        OutputError if OUT cannot be locked at all.
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
                        f"Nothing in {self._out} can be locked: {error.strerror}.",
                        "Mount its file system with locks (Lustre: -o flock), or give another -o.",
                    ) from error
                if time.monotonic() > deadline:
                    raise InUse(
                        f"Another mquant is writing into {self._out}.",
                        "Wait for it, or give another -o.",
                    ) from None
                time.sleep(_PAUSE_SECONDS)
                continue
            if self._is_at(file):
                return file
            os.close(file)  # another run was complete just then, and deleted it

    def begin(self, fingerprint: dict[str, Any], files: Iterable[str], *, afresh: bool) -> None:
        """Write down what this run will make, before it makes anything.

        With `afresh` the ledger forgets what an earlier run made; otherwise this run goes on from
        there.
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
        """Write down the stamps of the source files that later work units are made from."""
        self._append(_line({"sources": dict(sources)}))

    def count(self, units: Iterable[int]) -> None:
        """Count work units whose bytes are on disk."""
        spans: list[list[int]] = []
        for number in sorted(units):
            if spans and number == spans[-1][1] + 1:
                spans[-1][1] = number
            else:
                spans.append([number, number])
        if spans:
            self._append(_line({"jobs": spans}))

    def complete_shard(self, name: str, sha256: str, units: range) -> None:
        """Count a shard, and all its work units: it is on disk under its final name."""
        self._append(shard_line(name, sha256, units))

    def complete(self) -> None:
        """Delete the ledger: the run is whole."""
        with out_of_space(self._path, 0):
            self._path.unlink()
            fsync_folder(self._out)

    def release(self) -> None:
        """Let go of OUT. The ledger stays, so that the next run knows that the folder is ours.

        An empty ledger is deleted: nothing was claimed.
        """
        if self._is_at(self._file) and not os.fstat(self._file).st_size:
            self._path.unlink()
        os.close(self._file)

    def _append(self, line: bytes) -> None:
        with self._lock, out_of_space(self._path, len(line)):
            if not self._is_at(self._file):
                raise OutputError(
                    f"{self._out} was deleted or replaced during the run.",
                    "Run the same command again; what was made there is lost.",
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
    """The first line: which run it is, and every file that the run will make."""
    head = {"schema": _SCHEMA, "fingerprint": dict(fingerprint), "files": sorted(files)}
    return _line(head)


def shard_line(name: str, sha256: str, units: range) -> bytes:
    """The line of a complete shard and all its work units."""
    return _line({"shard": name, "sha256": sha256, "jobs": [[units.start, units.stop - 1]]})


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _stamp(value: object) -> Stamp:
    match value:
        case [int(size), int(time)]:
            return size, time
    return -1, -1  # no file's


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
