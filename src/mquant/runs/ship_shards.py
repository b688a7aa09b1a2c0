"""Upload of shards to a hub repo: a shard is uploaded when complete, and committed with others.

The local file is deleted after the commit. The repo holds a ledger while the run is under way: the
first line has the run's fingerprint, and every commit of shards adds the lines of these shards. So
any machine can resume from the repo alone. config.json is uploaded after all other files are in the
repo and verified.
"""

import time
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, Final, NamedTuple

from mquant.checkpoint import Folder, Stamp, is_shard
from mquant.checkpoint.hub import HubRepo
from mquant.checkpoint.upload import HubWriter
from mquant.errors import MquantError, OutputError
from mquant.events import Emit, Progress
from mquant.output import LAST, LEDGER, RECORD, ShardObserver, known_table, read_record
from mquant.output.folder import differences
from mquant.output.ledger import (
    MOST_BYTES,
    Recorded,
    head_line,
    parse_ledger,
    shard_line,
    sources_line,
)
from mquant.plan import Plan, ShardPlan
from mquant.runs.run import Run
from mquant.runs.run_spec import RunSpec
from mquant.text import names

_AGAIN: Final = "Run the same command again: the run resumes."
COMMIT_SECONDS: Final = 300.0
"""The longest wait of an uploaded shard for its commit, as in huggingface_hub's own uploads.

These are 12 commits an hour; the hub allows 128. Another machine makes the shards of this time
again, at most.
"""


class Shipped(NamedTuple):
    """A shard in the repo: its sha256, and the stamps of the source files that it is made from."""

    sha256: str
    sources: Mapping[str, Stamp]


@dataclass(frozen=True)
class Destination:
    """A hub repo that a run fills: without a checkpoint, with a part of this run, or complete.

    `away` has the shards in the repo by name, also those that are made from files that were touched
    since. These are made again, and sent if they differ.
    """

    writer: HubWriter
    spec: RunSpec
    public: bool
    away: dict[str, Shipped] = field(default_factory=dict)
    done: bool = False

    def open(self) -> None:
        """Create the repo, if there is none."""
        if self.writer.repo is None:
            self.writer.create(private=not self.public)

    def current(self) -> dict[str, str]:
        """Return the sha256 of the shards in the repo that are made from the source as it is."""
        now = sources_of(self.spec)
        return {n: shipped.sha256 for n, shipped in self.away.items() if shipped.sources == now[n]}


def sources_of(spec: RunSpec) -> dict[str, dict[str, Stamp]]:
    """Return the stamps of the source files that each shard is made from, as they are now."""
    stamps = spec.stamps
    return {
        shard.name: {path: stamps[path] for unit in shard.units for path in unit.files}
        for shard in spec.plan.shards
    }


def open_destination(repo_id: str, spec: RunSpec, *, public: bool, emit: Emit) -> Destination:
    """Return the state of a repo for this run.

    Raises OutputError if the repo holds another run or another checkpoint, if there is no token,
    and for a public repo unless `public`.
    """
    writer = HubWriter(repo_id, {*spec.files, LEDGER}, emit)
    repo = writer.repo
    if repo is None:
        return Destination(writer, spec, public)
    if not repo.private and not public:
        raise OutputError(
            f"{repo_id} is public: what is pushed there is published.",
            "Give --public to publish the checkpoint, or give another repo.",
        )
    if LEDGER in repo.files:
        recorded = parse_ledger(_read(repo, LEDGER))
        _refuse_other(repo_id, recorded.fingerprint, spec.fingerprint)
        away = _away(spec.plan, repo, recorded.shards)
        return Destination(writer, spec, public, _made_from(spec.plan, away, recorded))
    if table := known_table(repo):
        _refuse_other(repo_id, table.get("fingerprint"), spec.fingerprint)
        done = all(name in repo.files for name in LAST)
        # The ledger went with a commit that lost a file.
        record = None if done else read_record(repo)
        digests = {n: sha for n, (_, sha) in record.files.items()} if record else {}
        away, now = _away(spec.plan, repo, digests), sources_of(spec)
        if spec.source.folders and len(away) < len(now):
            away = {}  # the source may have changed since: no output of both
        shipped = {name: Shipped(sha256, now[name]) for name, sha256 in away.items()}
        return Destination(writer, spec, public, shipped, done)
    foreign = [name for name in repo.files if is_shard(name) or name in (*LAST, RECORD)]
    if foreign:
        raise OutputError(f"{repo_id} holds {names(foreign)} already.", "Give another repo.")
    return Destination(writer, spec, public)


def _away(plan: Plan, repo: HubRepo, digests: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of the shards that the repo holds as planned and as recorded."""
    return {
        shard.name: digest
        for shard in plan.shards
        if (digest := digests.get(shard.name))
        and digest == repo.sha256.get(shard.name)
        and repo.files.get(shard.name) == shard.file_bytes
    }


def _made_from(plan: Plan, away: Mapping[str, str], recorded: Recorded) -> dict[str, Shipped]:
    """Add the stamps that the ledger has beside each shard; a ledger may lack them."""
    first = {s.name: units.start for s, units in zip(plan.shards, plan.numbers, strict=True)}
    return {n: Shipped(sha256, recorded.units.get(first[n], {})) for n, sha256 in away.items()}


class Shipper(ShardObserver):
    """An observer that uploads the shards of a run in a thread, one after another.

    A commit has the shards of some minutes, because hubs limit the commits of an hour, or fewer if
    a new shard waits for room: at most `room` bytes of shards are in OUT. Use the shipper as a
    context manager: at its end all shards are uploaded. `poll`, `opening` and the end raise
    OutputError if the hub refuses an upload or cannot be reached.
    """

    def __init__(self, destination: Destination, run: Run, room: float) -> None:
        self._to, self._out, self._room, self._emit = destination, run.out, room, run.emit
        self._names = run.spec.files
        plan = destination.spec.plan
        self._shards = {shard.name: shard for shard in plan.shards}
        self._unit_numbers = dict(zip(self._shards, plan.numbers, strict=True))
        self._sources = sources_of(destination.spec)
        self._changed = Condition()
        self._waiting: deque[tuple[ShardPlan, str]] = deque()
        self._held: dict[str, Shipped] = {}  # uploaded, not committed
        self._due, self._blocked = 0.0, False
        self._local: set[str] = set()
        self._failure: BaseException | None = None
        self._complete = False
        self._thread = Thread(target=self._run, name="shipper", daemon=True)

    def __enter__(self) -> "Shipper":
        """Start the thread, and delete local shards that are in the repo already."""
        for name in self._to.current():
            (self._out / name).unlink(missing_ok=True)  # a killed run left this file
        self._tell()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait for all uploads; after an error, for the current upload; after Ctrl-C, for none."""
        with self._changed:
            self._complete = True
            self._changed.notify_all()
        if kind is not KeyboardInterrupt:
            self._thread.join()
        if kind is None:
            self.poll()

    def poll(self) -> None:
        """Raise the error that stopped the uploads, if there is one."""
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Wake every thread that waits for room: the run ends early."""
        with self._changed:
            self._failure = self._failure or OutputError("The upload was stopped.", _AGAIN)
            self._changed.notify_all()

    def opening(self, shard: ShardPlan) -> None:
        """Wait until the shard fits into the room."""
        with self._changed:
            self._blocked = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure or self._fits(shard))
            self._blocked = False
            self.poll()
            self._local.add(shard.name)

    def _fits(self, shard: ShardPlan) -> bool:
        taken = sum(self._shards[name].file_bytes for name in self._local)
        return taken + shard.file_bytes <= self._room

    def completed(self, shard: ShardPlan, sha256: str) -> None:
        """Upload the shard; the hub asks for no bytes that the repo has already."""
        with self._changed:
            self._local.add(shard.name)
            self._waiting.append((shard, sha256))
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while shard := self._next():
                self._send(*shard)
            self._commit()
        except BaseException as error:  # noqa: BLE001 -- `poll` raises the error in another thread
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()
            with suppress(MquantError):
                self._commit()  # this may fail too, but other uploads need not be lost

    def _next(self) -> tuple[ShardPlan, str] | None:
        """Wait for a complete shard; commit meanwhile. None after the last, or after an error."""
        while True:
            with self._changed:
                left = self._due - time.monotonic() if self._held else None
                self._changed.wait_for(self._has_work, left)
                if not self._needs_room():
                    if self._waiting and not self._failure:
                        return self._waiting.popleft()
                    if self._complete or self._failure:
                        return None
            self._commit()  # due, or for room

    def _has_work(self) -> bool:
        return bool(self._waiting or self._complete or self._failure or self._needs_room())

    def _needs_room(self) -> bool:
        return self._blocked and bool(self._held)

    def _send(self, shard: ShardPlan, sha256: str) -> None:
        """Upload a shard, and commit if a commit is full or due."""
        self._to.writer.upload(shard.name, self._out / shard.name, sha256)
        self._due = self._due if self._held else time.monotonic() + COMMIT_SECONDS
        self._held[shard.name] = Shipped(sha256, self._sources[shard.name])
        self._tell()
        if self._to.writer.full or time.monotonic() >= self._due:
            self._commit()

    def _commit(self) -> None:
        """Commit the uploaded shards with their lines in the ledger, and delete the local files."""
        if not self._held:
            return
        held, self._held = self._held, {}
        away = self._to.away | held
        self._to.writer.upload(LEDGER, self._ledger(away))
        self._to.writer.commit(f"Add {names([*held])}")
        self._to.away.update(away)
        for name in held:
            (self._out / name).unlink()
        with self._changed:
            self._local -= held.keys()
            self._changed.notify_all()

    def _ledger(self, away: Mapping[str, Shipped]) -> bytes:
        lines = [head_line(self._to.spec.fingerprint, self._names)]
        for name, (sha256, sources) in away.items():
            lines += [sources_line(sources), shard_line(name, sha256, self._unit_numbers[name])]
        return b"".join(lines)

    def _tell(self) -> None:
        sent = sum(self._shards[name].file_bytes for name in self._to.away | self._held)
        self._emit(Progress("upload", sent, self._to.spec.plan.file_bytes))


def send_others(to: Destination, run: Run, others: list[str]) -> HubRepo:
    """Upload the files other than index and config.json, and return the repo after the upload.

    Raises OutputError if a file or a shard in the repo is missing or differs from the run's, or if
    the repo holds another shard.
    """
    repo, wrong = _send(to, run, others, "Add all but index and config.json")
    wrong += [name for name, digest in run.digests.items() if repo.sha256.get(name) != digest]
    wrong += [name for name in repo.files if is_shard(name) and name not in run.digests]
    _refuse_wrong(repo, wrong)
    return repo


def seal(to: Destination, run: Run) -> None:
    """Upload index and config.json, which complete the checkpoint, and delete the ledger.

    The commit follows the commit that was compared and judged. Raises OutputError if the repo then
    lacks one of the two files, or holds another.
    """
    message = "Add index and config.json: the checkpoint is complete"
    _refuse_wrong(*_send(to, run, [*LAST], message, [LEDGER]))


def _send(
    to: Destination, run: Run, files: list[str], message: str, delete: Collection[str] = ()
) -> tuple[HubRepo, list[str]]:
    """Commit files as mquant.json lists them; return the repo, and the files that it lacks."""
    record = read_record(Folder(run.out))
    sha256 = {name: sha for name, (_, sha) in record.files.items()} if record else {}
    contents = {name: (run.out / name).read_bytes() for name in files}
    for name, content in contents.items():
        to.writer.upload(name, content, sha256.get(name))
    to.writer.commit(message, delete)
    repo = to.writer.made
    return repo, [n for n, c in contents.items() if n not in repo.files or not repo.lists(n, c)]


def _refuse_wrong(repo: HubRepo, wrong: list[str]) -> None:
    if wrong:
        raise OutputError(f"{repo.repo_id} does not hold {names(wrong)} as made.", _AGAIN)


def _read(repo: HubRepo, path: str) -> bytes:
    if repo.files[path] > MOST_BYTES:
        raise OutputError(f"{path} of {repo.repo_id} was not made by mquant.", "Give another repo.")
    return repo.read(path)


def _refuse_other(repo_id: str, other_fingerprint: object, fingerprint: Mapping[str, Any]) -> None:
    if other_fingerprint != fingerprint:
        values = differences(other_fingerprint, fingerprint)
        raise OutputError(f"{repo_id} is made from something else: {values}.", "Give another repo.")
