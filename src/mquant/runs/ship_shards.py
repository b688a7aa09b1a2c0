"""Upload of shards to a hub repo: a shard is uploaded when complete, and its local file deleted.

The repo holds a ledger while the run is under way: the first line has the run's fingerprint, and
every commit of shards adds the lines of these shards. So any machine can resume from the repo
alone. config.json is uploaded after all other files are in the repo and verified.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread
from typing import Any, Final

from mquant.checkpoint import is_shard
from mquant.checkpoint.hub import HubRepo, NoSuchRepo
from mquant.checkpoint.upload import HubWriter
from mquant.errors import OutputError
from mquant.events import Progress
from mquant.output import LAST, LEDGER, RECORD, ShardObserver, known_table, read_record
from mquant.output.folder import differences
from mquant.output.ledger import MOST_BYTES, head_line, parse_ledger, shard_line
from mquant.plan import Plan, ShardPlan
from mquant.runs.run import Run
from mquant.text import names

_AGAIN: Final = "Run the same command again: the run resumes."


@dataclass(frozen=True)
class Destination:
    """A hub repo that a run fills: without a checkpoint, with a part of this run, or complete.

    `repo` is the repo, or None if the repo does not exist. `away` maps the names of the shards in
    the repo to their sha256.
    """

    writer: HubWriter
    plan: Plan
    fingerprint: Mapping[str, Any]
    public: bool
    repo: HubRepo | None
    away: Mapping[str, str] = field(default_factory=dict)
    done: bool = False

    def open(self) -> None:
        """Create the repo, if there is none."""
        if self.repo is None:
            self.writer.create(private=not self.public)


def open_destination(
    repo_id: str, plan: Plan, fingerprint: Mapping[str, Any], *, public: bool
) -> Destination:
    """Return the state of a repo for this run.

    Raises OutputError if the repo holds another run or another checkpoint, if there is no token,
    and for a public repo unless `public`.
    """
    writer = HubWriter(repo_id)
    try:
        repo = HubRepo(repo_id)
    except NoSuchRepo:
        return Destination(writer, plan, fingerprint, public, None)
    if not repo.private and not public:
        raise OutputError(
            f"{repo_id} is public: what is pushed there is published.",
            "Give --public to publish the checkpoint, or give another repo.",
        )
    if LEDGER in repo.files:
        recorded = parse_ledger(_read(repo, LEDGER))
        _refuse_other(repo_id, recorded.fingerprint, fingerprint)
        away = _away(plan, repo, recorded.shards)
        return Destination(writer, plan, fingerprint, public, repo, away)
    if table := known_table(repo):
        _refuse_other(repo_id, table.get("fingerprint"), fingerprint)
        done = all(name in repo.files for name in LAST)
        # The ledger went with a commit that lost a file.
        record = None if done else read_record(repo)
        away = _away(plan, repo, {n: sha for n, (_, sha) in record.files.items()} if record else {})
        return Destination(writer, plan, fingerprint, public, repo, away, done=done)
    foreign = [name for name in repo.files if is_shard(name) or name in (*LAST, RECORD)]
    if foreign:
        raise OutputError(f"{repo_id} holds {names(foreign)} already.", "Give another repo.")
    return Destination(writer, plan, fingerprint, public, repo)


def _away(plan: Plan, repo: HubRepo, digests: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of the shards that the repo holds as planned and as recorded."""
    return {
        shard.name: digest
        for shard in plan.shards
        if (digest := digests.get(shard.name))
        and digest == repo.sha256.get(shard.name)
        and repo.files.get(shard.name) == shard.file_bytes
    }


class Shipper(ShardObserver):
    """An observer that uploads the shards of a run in a thread, one commit after another.

    At most `room` bytes of shards are in OUT: a new shard waits for room. Use the shipper as a
    context manager: at its end all shards are uploaded. `poll`, `opening` and the end raise
    OutputError if the hub refuses an upload or cannot be reached.
    """

    def __init__(self, destination: Destination, run: Run, room: float) -> None:
        self._to, self._out, self._room, self._emit = destination, run.out, room, run.emit
        self._names = run.spec.files
        plan = destination.plan
        self._shards = {shard.name: shard for shard in plan.shards}
        self._unit_numbers = dict(zip(self._shards, plan.numbers, strict=True))
        self.sent = dict(destination.away)
        self._changed = Condition()
        self._waiting: deque[tuple[ShardPlan, str]] = deque()
        self._local: set[str] = set()
        self._failure: BaseException | None = None
        self._complete = False
        self._thread = Thread(target=self._run, name="shipper", daemon=True)

    def __enter__(self) -> "Shipper":
        """Start the thread, and delete local shards that are in the repo already."""
        for name in self.sent:
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
            self._changed.wait_for(lambda: self._failure or self._fits(shard))
            self.poll()
            self._local.add(shard.name)

    def _fits(self, shard: ShardPlan) -> bool:
        taken = sum(self._shards[name].file_bytes for name in self._local)
        return taken + shard.file_bytes <= self._room

    def completed(self, shard: ShardPlan, sha256: str) -> None:
        """Upload the shard, unless the shard is in the repo already."""
        if shard.name in self.sent:
            return
        with self._changed:
            self._local.add(shard.name)
            self._waiting.append((shard, sha256))
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while batch := self._next():
                self._send(batch)
        except BaseException as error:  # noqa: BLE001 -- `poll` raises the error in another thread
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _next(self) -> list[tuple[ShardPlan, str]]:
        """Wait for complete shards and return them; [] after the last shard, or after an error."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._complete or self._failure)
            batch = [] if self._failure else [*self._waiting]
            self._waiting.clear()
            return batch

    def _send(self, batch: list[tuple[ShardPlan, str]]) -> None:
        self.sent |= {shard.name: sha256 for shard, sha256 in batch}
        files = {shard.name: self._out / shard.name for shard, _ in batch}
        self._to.writer.commit(f"Add {names([*files])}", {**files, LEDGER: self._ledger()})
        for path in files.values():
            path.unlink()
        with self._changed:
            self._local -= files.keys()
            self._changed.notify_all()
        self._tell()

    def _ledger(self) -> bytes:
        lines = [head_line(self._to.fingerprint, self._names)]
        lines += [shard_line(name, self.sent[name], self._unit_numbers[name]) for name in self.sent]
        return b"".join(lines)

    def _tell(self) -> None:
        sent = sum(self._shards[name].file_bytes for name in self.sent)
        self._emit(Progress("upload", sent, self._to.plan.file_bytes))


def send_others(to: Destination, run: Run, others: list[str]) -> HubRepo:
    """Upload the files other than index and config.json, and return the repo after the upload.

    Raises OutputError if a file or a shard in the repo is missing or differs from the run's, or if
    the repo holds another shard.
    """
    to.writer.commit("Add all but index and config.json", {name: run.out / name for name in others})
    repo = HubRepo(to.writer.repo_id)
    wrong = [name for name, digest in run.digests.items() if repo.sha256.get(name) != digest]
    wrong += [name for name in others if not _holds(repo, name, (run.out / name).read_bytes())]
    wrong += [name for name in repo.files if is_shard(name) and name not in run.digests]
    _refuse_wrong(repo, wrong)
    return repo


def seal(to: Destination, run: Run) -> None:
    """Upload index and config.json, which complete the checkpoint, and delete the ledger.

    Raises OutputError if the repo then lacks one of the two files, or holds another.
    """
    last: dict[str, Path | bytes] = {name: run.out / name for name in LAST}
    to.writer.commit("Add index and config.json: the checkpoint is complete", last, [LEDGER])
    repo = HubRepo(to.writer.repo_id)
    _refuse_wrong(repo, [n for n in LAST if not _holds(repo, n, (run.out / n).read_bytes())])


def _refuse_wrong(repo: HubRepo, wrong: list[str]) -> None:
    if wrong:
        raise OutputError(f"{repo.repo_id} does not hold {names(wrong)} as made.", _AGAIN)


def _holds(repo: HubRepo, name: str, content: bytes) -> bool:
    return name in repo.files and repo.lists(name, content)


def _read(repo: HubRepo, path: str) -> bytes:
    if repo.files[path] > MOST_BYTES:
        raise OutputError(f"{path} of {repo.repo_id} was not made by mquant.", "Give another repo.")
    return repo.read(path)


def _refuse_other(repo_id: str, other_fingerprint: object, fingerprint: Mapping[str, Any]) -> None:
    if other_fingerprint != fingerprint:
        values = differences(other_fingerprint, fingerprint)
        raise OutputError(f"{repo_id} is made from something else: {values}.", "Give another repo.")
