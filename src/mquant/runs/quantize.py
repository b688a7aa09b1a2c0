"""Carry out a plan: check what can be checked, claim OUT, run the engine, finish, verify."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mquant.checkpoint import Folder, Reader, Source
from mquant.errors import EngineError
from mquant.events import Emit, Note, silent
from mquant.output import (
    Claim,
    Ledger,
    ShardSet,
    State,
    examine,
    finish,
    index_json,
)
from mquant.plan import Plan
from mquant.runs.run import (
    Making,
    check_disk,
    default_workers,
    materialize,
    provenance,
)
from mquant.runs.scratch import (
    check_scratch,
    check_side_files,
    least_scratch,
    spooled,
)
from mquant.runs.spec import Engine, RunSpec, check_engine, prepare
from mquant.verify.judge import Depth, verify

if TYPE_CHECKING:
    from mquant.checkpoint.spool import Spool
    from mquant.runs.ship_shards import Shipper


@dataclass(frozen=True)
class Result:
    """A finished output folder. `fresh` is False where an earlier run had made it already."""

    out: Path
    plan: Plan
    engine: Engine
    fresh: bool


def quantize(
    plan: Plan,
    out: Path,
    *,
    engine: Engine = Engine.AUTO,
    importance: Path | None = None,
    data: str | None = None,
    workers: int | None = None,
    scratch: int | None = None,
    restart: bool = False,
    emit: Emit = silent,
) -> Result:
    """Write the checkpoint that `plan` describes into `out`, or go on with what is there of it.

    `workers`: how many fused sets the streaming engine has under way; None: as many as the cores
    can use. `importance`: a file that says how much an error in each input channel counts where
    scales are searched (see `engines.importance`). `data`: what recipes that need any are
    calibrated with (see `engines.samples`). `scratch`: bytes of a hub repo's files that may lie in
    `out` at a time; None: it is downloaded first, whole. Raises Refused for a plan with errors,
    UsageError and DataFileError for what does not go with it, MissingExtra without the engine's
    packages, OutputError for an OUT that is not ours, is in use or too small, and what the engine
    raises. Until it returns there is no config.json in `out`, so nothing there looks like a
    checkpoint.
    """
    spec = prepare(plan, engine, importance, data)
    if scratch is not None:
        check_engine(spec.engine, "--scratch")
        check_scratch(scratch, least_scratch(plan))
    look = partial(examine, out, spec.local, spec.fingerprint)
    claim = look(restart=restart)
    if claim.state is State.DONE:
        return Result(out, plan, spec.engine, fresh=False)
    check_disk(out, claim.files, spec.file_bytes + (scratch or 0))
    source = spec.source if scratch else materialize(spec.source, emit)
    ledger = Ledger(out)
    try:
        claim = look(restart=restart)  # again: now nobody else can change it
        if claim.state is State.DONE:
            return Result(out, plan, spec.engine, fresh=False)
        run = Run(spec, plan.reading_from(source), out, workers, emit, scratch)
        digests = run.make_shards(ledger, claim, spec.files)
        complete(spec, out, source, digests, emit)
        ledger.complete()
    finally:
        ledger.release()
    return Result(out, plan, spec.engine, fresh=True)


@dataclass(frozen=True)
class Run:
    """The part of a run between claiming OUT and completing it.

    `plan` is the intent's, or a share of it, reading from a folder, or, with `scratch`, from a hub.
    With a `shipper` shards do not stay in OUT.
    """

    spec: RunSpec
    plan: Plan
    out: Path
    workers: int | None
    emit: Emit
    scratch: int | None = None
    shipper: "Shipper | None" = None

    @property
    def source(self) -> Folder:
        """The folder that is read."""
        source = self.plan.survey.checkpoint.source
        if not isinstance(source, Folder):
            raise TypeError(f"{source.name} is no folder")
        return source

    def make_shards(self, ledger: Ledger, claim: Claim, files: tuple[str, ...]) -> dict[str, str]:
        """Make all shards, but for what an earlier run made; returns their sha256, by name.

        `files` are what the ledger names as ours.
        """
        stamps, away = self.spec.stamps, self.shipper.sent if self.shipper else None
        making = Making(self.plan, self.out, files, stamps, self.emit, "quantize", away)
        # oneshot starts over: its modules come in the order of the model, not of the output.
        resume = self.spec.engine is Engine.STREAM
        fingerprint = self.spec.fingerprint
        return making.shards(ledger, claim, fingerprint, self._run_engines, resume=resume)

    def _run_engines(self, output: ShardSet) -> None:
        from mquant.engines import stream  # numba
        from mquant.engines.importance import weigher

        if self.spec.engine is Engine.ONESHOT:
            from mquant.engines import oneshot  # torch and transformers: seconds, and optional

            oneshot.run(self.plan, output.write, self.emit, self._samples())
        # After oneshot, what is left are the tensors that are copied.
        workers = self.workers or default_workers()
        weigh = weigher(self.plan.recipe, self.spec.importance)
        with self._reading(output) as (reader, stops):
            stream.run(reader, output, workers, weigh, stops)

    @contextmanager
    def _reading(
        self, output: ShardSet
    ) -> "Iterator[tuple[Reader | Spool, list[Callable[[], None]]]]":
        """What the engine reads with, and whom to tell when it stops."""
        stops: list[Callable[[], None]] = []
        if self.shipper:
            self.shipper.follow(output)
            stops.append(self.shipper.stop)
        if self.scratch is None:
            with closing(Reader(self.source)) as reader:
                yield reader, stops
        else:
            with spooled(self.plan, self.out, self.scratch, output, self.emit) as spool:
                yield spool, [*stops, spool.stop]

    def _samples(self) -> list[list[int]] | None:
        if self.spec.data is None:
            return None
        from mquant.engines.samples import load_samples

        recipe = self.plan.recipe
        samples = load_samples(self.spec.data, self.source.root, recipe.calibration)
        tokens = sum(len(ids) for ids in samples)
        self.emit(Note("info", f"Calibrating with {len(samples):,} samples, {tokens:,} tokens."))
        return samples


def complete(
    spec: RunSpec,
    out: Path,
    source: Source,
    digests: Mapping[str, str],
    emit: Emit = silent,
    where: Callable[[Source], Source] = lambda local: local,
) -> None:
    """Add to the shards in OUT, with these sha256, all else that makes it a checkpoint, judged.

    Side files come from `source`. What is judged is what `where` makes of the checkpoint in OUT as
    it will be: another place that has it all. Raises EngineError where something is wrong with it.
    """
    plan = spec.plan
    shards = {
        shard.name: {"bytes": shard.file_bytes, "sha256": digests[shard.name]}
        for shard in plan.shards
    }
    sides = dict.fromkeys(spec.sides, source)
    made_by = {"name": spec.engine.value, "versions": spec.versions}
    record = provenance(plan, spec.identity, made_by, spec.fingerprint)

    def judge(local: Source) -> None:
        check_side_files(source, spec.sides, out)
        _judge(spec, source, emit, where(local))

    finish(out, plan.reading_from(source), index_json(plan), shards, sides, record, judge, emit)


def _judge(spec: RunSpec, source: Source, emit: Emit, result: Source) -> None:
    """Judge what was made as `mquant verify OUT --against SRC` does.

    Of what the streaming engine made only the structure: reading all of it back would take longer
    than making it. What was asked for knowingly (--allow-unsafe) does not count, and what the
    parent lacks is told but does not count either: the output has the parent's config.json, key
    by key.
    """
    plan = spec.plan
    families = {plan.family.name: plan.family}
    if spec.engine is Engine.STREAM:
        report = verify(result, families, Depth.STRUCTURE, emit=emit)
    else:
        report = verify(result, families, parent=source, emit=emit)
    known = {finding.rule for finding in plan.findings} | {"config-key-missing"}
    for finding in report.findings:
        if finding.severity == "error" and finding.rule not in known:
            raise EngineError(
                f"What was made is wrong ({finding.rule}): {finding.message}",
                "Please report this; OUT has no config.json, so nothing will load it.",
            )
        fact = finding.severity == "info"
        emit(Note("info" if fact else "warning", finding.message))


__all__ = ["Result", "Run", "complete", "quantize"]
