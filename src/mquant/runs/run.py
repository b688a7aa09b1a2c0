"""A run that writes OUT, from the claim on OUT to the finished checkpoint.

    with Run.claim(out, spec, **options) as run:
        if run.done:
            return run.result(fresh=False)
        run.write_shards(engine)
        return run.finish(run.judge)

Every verb that writes a checkpoint is such a run. `finish` writes config.json last, so that an
unfinished OUT does not look like a checkpoint.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypedDict, Unpack

from mquant.checkpoint import Folder, Source, changed
from mquant.errors import EngineError, SourceError
from mquant.events import Emit, Note, Progress, silent
from mquant.output import (
    RECORD,
    Claim,
    Ledger,
    Recorded,
    ShardSet,
    State,
    as_table,
    check_disk,
    discard,
    examine,
    finish,
    index_json,
    own_table,
    source_notes,
)
from mquant.plan import Plan
from mquant.plan.loadable import OUTPUT_NOT_JUDGED
from mquant.runs.checks import check_headers_as_planned
from mquant.runs.run_spec import RunSpec
from mquant.runs.unchanged import (
    accept_touched,
    check_unchanged,
    described_by,
    tell_touched,
    tell_unread,
)
from mquant.runs.workers import default_workers
from mquant.text import names, size
from mquant.verify.config_json import CONFIG_KEY_MISSING
from mquant.verify.digests import refuse_changed
from mquant.verify.judge import Depth, verify
from mquant.verify.not_judged import ASK_VLLM

_MOST_TOUCHES: Final = 10
"""The limit on repetitions of a run: a file that changes all the time is no source."""

Kept = Mapping[str, Mapping[str, Any]]
"""`bytes` and `sha256` of each file of the result that the run does not write, by path."""


class RunOptions(TypedDict, total=False):
    """The options of a run that do not change its output.

    `workers` is the number of fused sets that the stream engine processes at a time; None: cores
    + 1. `scratch` is the most bytes of a hub repo's files that are in OUT at a time; None: the
    files are downloaded first. If `restart`, the run deletes what an earlier run made in OUT.
    `emit` receives progress.
    """

    workers: int | None
    scratch: int | None
    restart: bool
    emit: Emit


class _TouchedError(Exception):
    """Files were touched (as `accept_touched` returns them) while the result was judged."""

    def __init__(self, touched: Mapping[str, bool]) -> None:
        super().__init__(*touched)
        self.touched = touched


@dataclass(frozen=True)
class Result:
    """A finished checkpoint. `fresh` is False if an earlier run had finished the checkpoint.

    `engine` is the name of the engine that did the arithmetic. `page` is the address of the hub
    repo, if a repo holds the checkpoint instead of `out`. `parent_bytes` is the number of bytes
    that a repair read of the parent's shards. `cast` is the entry of mquant.json on the cast from
    MXFP4 to NVFP4, if there was one.
    """

    out: Path
    plan: Plan
    engine: str
    fresh: bool
    page: str = ""
    parent_bytes: int = 0
    cast: Mapping[str, Any] | None = None


@dataclass
class Run:
    """A claimed OUT, and the run that fills OUT.

    `source` is where the tensors are read: the local copy if the run downloaded the files. `found`
    is the state of OUT at the claim. `plan` has the shards to write: all shards of the spec, or a
    share of them. `digests` are those of the shards, `source_digests` are known ones of the source.
    `_again` writes the shards again, if this run wrote them; `_touches` counts how often it did.
    `measured` is what mquant.json says from a look at the data, and `used` what it says of the
    data that the engine used.
    """

    out: Path
    spec: RunSpec
    source: Source
    ledger: Ledger | None
    found: Claim
    plan: Plan
    emit: Emit = silent
    workers: int | None = None
    digests: dict[str, str] = field(default_factory=dict)
    source_digests: dict[str, str] = field(default_factory=dict)
    _again: Callable[[Recorded | None, set[str]], None] | None = None
    _touches: int = 0
    measured: dict[str, Any] = field(default_factory=dict)
    used: dict[str, Any] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def claim(
        cls,
        out: Path,
        spec: RunSpec,
        *,
        room: int | None = None,
        fetch: Callable[[], Source] | None = None,
        **options: Unpack[RunOptions],
    ) -> Iterator[Self]:
        """Claim OUT for a run, and release OUT in the end.

        `room` is the number of bytes that OUT needs; None: the spec's. `fetch` returns the source
        to read, before OUT is locked; None: all files of a hub repo are downloaded. Raises
        OutputError for an OUT that mquant did not make, that is in use or is too small, SourceError
        for a source that is not the checkpoint that its mquant.json lists.
        """
        emit, restart = options.get("emit", silent), options.get("restart", False)
        look = partial(
            examine,
            out,
            spec.protected,
            spec.fingerprint,
            restart=restart,
            elsewhere=spec.elsewhere,
            emit=emit,
        )
        claim = look()
        make = partial(cls, out, spec, plan=spec.shards, emit=emit, workers=options.get("workers"))
        if claim.state is State.DONE:
            tell_unread(spec.source, spec.stamps, emit, out)
            yield make(spec.source, None, claim)
            return
        check_disk(out, claim.files, spec.file_bytes if room is None else room)
        refuse_changed(spec.source, emit)
        source = fetch() if fetch else spec.source.materialize(emit)
        ledger = Ledger(out)
        try:
            claim = look()  # again: no other process can change OUT now
            yield make(source, ledger, claim)
        finally:
            ledger.release()

    @property
    def done(self) -> bool:
        """Whether an earlier run finished the checkpoint of this run."""
        return self.found.state is State.DONE

    @property
    def claimed(self) -> Ledger:
        """The ledger, which holds the lock on OUT. Raises TypeError if the run was already done."""
        if self.ledger is None:
            raise TypeError(f"{self.out} is not claimed")
        return self.ledger

    @property
    def threads(self) -> int:
        """The number of work units that are under way at once."""
        return self.workers or default_workers()

    def result(self, *, fresh: bool, page: str = "", parent_bytes: int = 0) -> Result:
        """Return the result of the run."""
        name = str(self.spec.engine["name"])
        said = self.measured if fresh else own_table(self.out) or {}
        cast = as_table(said.get("cast")) or None
        return Result(self.out, self.spec.plan, name, fresh, page, parent_bytes, cast)

    def write_shards(
        self,
        engine: Callable[[ShardSet], None],
        away: Callable[[], Mapping[str, str]] | None = None,
        files: tuple[str, ...] | None = None,
    ) -> None:
        """Write the shards with `engine`, except the shards that an earlier run completed.

        If `away` is given, shards do not stay in OUT: `away` returns the sha256 of the shards that
        are complete elsewhere, made from the source as it is now. `files` are the names in the
        ledger, which a later run may delete; None: the spec's files. What was made from a source
        file that was touched meanwhile (see `accept_touched`) is made again. Raises EngineError if
        a written header is not as planned.
        """
        self._again = partial(self._write_until_untouched, engine, away, files)
        self._again(self.found.recorded, {*self.found.files})

    def _write_until_untouched(
        self,
        engine: Callable[[ShardSet], None],
        away: Callable[[], Mapping[str, str]] | None,
        files: tuple[str, ...] | None,
        recorded: Recorded | None,
        old: set[str],
    ) -> None:
        """Do `write_shards` after a run that did what is `recorded` and made the files `old`."""
        spec, plan, ledger = self.spec, self.plan, self.claimed
        shards = {shard.name for shard in plan.shards}
        while True:
            recorded = spec.resumable(recorded)
            old = old - shards - {*spec.working} if recorded else old
            discard(self.out, old - {RECORD})
            names = (*(files or spec.files), *spec.working)
            ledger.begin(spec.fingerprint, names, afresh=recorded is None)
            discard(self.out, old & {RECORD})  # until the ledger is there, it says whose OUT is
            touched = self._write(engine, recorded, None if away is None else away())
            if not touched:
                break
            self._count_touch(touched)
            recorded, old = ledger.recorded, shards | {*spec.working}
        if away is None:
            check_headers_as_planned(Folder(self.out), plan)

    def _count_touch(self, touched: Mapping[str, bool]) -> None:
        """Say that files were touched. Raises SourceError if that happened too often."""
        self._touches += 1
        if self._touches > _MOST_TOUCHES:
            raise changed(names([*touched]))
        tell_touched(touched, self.emit)

    def _write(
        self,
        engine: Callable[[ShardSet], None],
        recorded: Recorded | None,
        away: Mapping[str, str] | None,
    ) -> dict[str, bool]:
        """Do the work units that are not `recorded`; return touched files, if some do not count."""
        spec, plan, ledger = self.spec, self.plan, self.claimed
        ledger.read_from(spec.stamps)
        output = ShardSet(
            self.out, plan, ledger, recorded, spec.stamps, self.emit, spec.stage, away
        )
        output.in_order = not spec.working  # layers come in another order
        try:
            self._tell(output, "were done before")
            self.emit(Progress(spec.stage, output.done_bytes, plan.source_bytes))
            touched = self._make(engine, output)
        except BaseException:
            self._tell(output, "are done; the same command resumes from there")
            raise
        finally:
            output.abandon()
        self.digests = output.digests
        return touched

    def _make(self, engine: Callable[[ShardSet], None], output: ShardSet) -> dict[str, bool]:
        """Fill `output`. Return touched files if what was made does not count."""
        try:
            engine(output)
            output.finish()
        except SourceError:
            if touched := self.accept_touched():
                return touched
            raise
        return self.accept_touched(unknown=True)

    def accept_touched(self, *, unknown: bool = False) -> dict[str, bool]:
        """Return touched files; if `unknown`, those that units read and whose digest is unknown."""
        spec, touched = self.spec, dict[str, bool]()
        for origin in spec.origins:
            sides = [n for n, s in spec.side_files.items() if s is origin.checkpoint.source]
            touched |= accept_touched(origin, self.source, spec.read, sides, self.source_digests)
        if unknown:
            return {p: known for p, known in touched.items() if p in spec.read and not known}
        return touched

    def finish(self, judge: Callable[[Source], None], kept: Kept | None = None) -> Result:
        """Complete the checkpoint as `assemble` does, and delete the ledger."""
        self.assemble(judge, kept)
        self.claimed.complete()
        return self.result(fresh=True)

    def assemble(self, judge: Callable[[Source], None], kept: Kept | None = None) -> None:
        """Write all files but the shards. `judge` sees the checkpoint before config.json exists.

        `kept` are the files of the result that the run does not write. If `judge` raises, or if a
        file that was read has changed since, OUT has no index and no config.json. If a file was
        touched since, what the run made from the file is made again, and the rest is done again.
        """
        while True:
            try:
                self._assemble(judge, kept)
            except _TouchedError as error:
                if self._again is None:  # other runs wrote the shards
                    raise changed(names([*error.touched])) from None
                self._count_touch(error.touched)
                shards = {shard.name for shard in self.plan.shards}
                self._again(self.claimed.recorded, shards | {*self.spec.working})
            else:
                return

    def _assemble(self, judge: Callable[[Source], None], kept: Kept | None) -> None:
        """Do `assemble` once. Raises _TouchedError if what was made does not count."""
        spec = self.spec
        shards = dict(kept or {})
        for shard in spec.shards.shards:
            shards[shard.name] = {"bytes": shard.file_bytes, "sha256": self.digests[shard.name]}
        sides = {path: self._now(source) for path, source in spec.side_files.items()}
        checkpoint = spec.plan.survey.checkpoint
        for note in source_notes(checkpoint, self._now(checkpoint.source)):
            self.emit(note)
        index = index_json(spec.indexed or spec.plan)
        read = [(self.source, path) for path in spec.stamps]
        read += [(source, path) for path, source in sides.items()]

        self.measured = self.used | spec.measured(self.source, self.emit)

        def judge_and_check(made: Source) -> None:
            judge(made)
            if touched := self.accept_touched(unknown=True):
                raise _TouchedError(touched)
            check_unchanged([*read, *described_by(checkpoint.source)])

        finish(
            self.out, spec.plan, index, shards, sides, spec.record | self.measured, judge_and_check
        )

    def judge(
        self, made: Source, *, ignoring: Collection[str] = (), parent: Source | None = None
    ) -> None:
        """Judge the checkpoint `made` as `mquant verify` does, and emit the findings.

        The judgement reads headers and JSON; with `parent`, also all numbers. Errors of the rules
        in `ignoring` are emitted but do not count. A key that config.json lacks does not count
        either: the result has the parent's config.json, key by key. Raises NotJudged if what
        decides cannot be judged and the plan does not say so, EngineError for any other error.
        """
        families = {self.spec.plan.family.name: self.spec.plan.family}
        depth = Depth.NUMBERS if parent else Depth.STRUCTURE
        report = verify(made, families, depth, parent=parent, emit=self.emit)
        if report.undecided and OUTPUT_NOT_JUDGED.id in {f.rule for f in self.spec.plan.findings}:
            self.emit(Note("warning", f"{report.undecided} {ASK_VLLM}"))
        else:
            report.raise_if_undecided()
        for finding in report.findings:
            known = finding.rule in ignoring or finding.rule == CONFIG_KEY_MISSING.id
            if finding.severity == "error" and not known:
                raise EngineError(
                    f"The result is wrong ({finding.rule}): {finding.message}",
                    "Please report this error; OUT has no config.json, so no loader will load OUT.",
                )
            fact = finding.severity == "info"
            self.emit(Note("info" if fact else "warning", finding.message))

    def _now(self, source: Source) -> Source:
        """Return where to read the files of `source`: the local copy if the run downloaded one."""
        return self.source if source is self.spec.source else source

    def _tell(self, output: ShardSet, what: str) -> None:
        if self.spec.resumes and output.done_bytes:
            done, total = size(output.done_bytes), size(self.plan.source_bytes)
            self.emit(Note("info", f"{done} of {total} {what}."))
