"""Carry out a plan: check what can be checked, claim OUT, run the engine, finish, verify."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mquant.checkpoint import Folder, Reader, Source
from mquant.errors import DataFileError, EngineError, MissingExtra, Refused, UsageError
from mquant.events import Emit, Note, silent
from mquant.output import (
    Claim,
    Ledger,
    ShardSet,
    State,
    examine,
    file_names,
    finish,
    index_json,
    side_files,
)
from mquant.plan import Plan
from mquant.recipe import Recipe
from mquant.workflows.making import (
    Making,
    check_disk,
    check_plain,
    default_workers,
    here,
    provenance,
)
from mquant.workflows.spooling import (
    SCRATCH,
    check_scratch,
    check_side_files,
    least_scratch,
    spooled,
    stamps_of,
)
from mquant.workflows.verify import Depth, verify

if TYPE_CHECKING:
    from mquant.checkpoint.spool import Spool
    from mquant.workflows.importance import Importance
    from mquant.workflows.shipping import Shipper


class Engine(StrEnum):
    """What does the arithmetic."""

    AUTO = "auto"
    STREAM = "stream"
    ONESHOT = "oneshot"


# Packages whose versions can change the bytes an engine makes.
_DECISIVE: Final[dict[Engine, tuple[str, ...]]] = {
    Engine.STREAM: (),
    Engine.ONESHOT: ("llmcompressor", "compressed-tensors", "torch", "transformers"),
}


@dataclass(frozen=True)
class Result:
    """A finished output folder. `fresh` is False where an earlier run had made it already."""

    out: Path
    plan: Plan
    engine: Engine
    fresh: bool


def choose_engine(wanted: Engine, recipe: Recipe) -> Engine:
    """The engine that will run: `auto` takes the streaming one, unless the recipe needs data.

    Raises UsageError for one that cannot do what the recipe asks for.
    """
    if recipe.needs_data:
        if wanted is Engine.STREAM:
            raise UsageError(
                f"Recipe {recipe.name} needs the model's own activations, which the stream engine "
                "does not see.",
                "Leave out --engine, or take recipe nvfp4.",
            )
        return Engine.ONESHOT
    if wanted is Engine.ONESHOT and recipe.scales == "search":
        raise UsageError(
            f"Recipe {recipe.name} has its scales searched, which only the stream engine does.",
            "Leave out --engine, or take recipe nvfp4.",
        )
    return Engine.STREAM if wanted is Engine.AUTO else wanted


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
    scales are searched (see `workflows.importance`). `data`: what recipes that need any are
    calibrated with (see `engines.samples`). `scratch`: bytes of a hub repo's files that may lie in
    `out` at a time; None: it is downloaded first, whole. Raises Refused for a plan with errors,
    UsageError and DataFileError for what does not go with it, MissingExtra without the engine's
    packages, OutputError for an OUT that is not ours, is in use or too small, and what the engine
    raises. Until it returns there is no config.json in `out`, so nothing there looks like a
    checkpoint.
    """
    run = prepare(
        plan,
        out,
        engine=engine,
        importance=importance,
        data=data,
        workers=workers,
        scratch=scratch,
        emit=emit,
    )
    if scratch is not None:
        check_scratch(scratch, least_scratch(plan))
    claim = run.look(restart=restart)
    if claim.state is State.DONE:
        return Result(out, plan, run.engine, fresh=False)
    check_disk(out, claim.files, run.file_bytes + (scratch or 0))
    run = run.fetched()
    ledger = Ledger(out)
    try:
        claim = run.look(restart=restart)  # again: now nobody else can change it
        if claim.state is State.DONE:
            return Result(out, plan, run.engine, fresh=False)
        run.finish(run.make_shards(ledger, claim), run.judge)
        ledger.complete()
    finally:
        ledger.release()
    return Result(out, plan, run.engine, fresh=True)


def prepare(
    plan: Plan,
    out: Path,
    *,
    engine: Engine,
    importance: Path | None,
    data: str | None,
    workers: int | None,
    scratch: int | None,
    emit: Emit,
) -> "Run":
    """What is to be done, after everything is checked that can be without looking at OUT.

    Raises as `quantize`.
    """
    from mquant.workflows.importance import read_importance, stated  # numpy

    if plan.refusals:
        raise Refused(plan.refusals)
    engine = choose_engine(engine, plan.recipe)
    check_data(plan.recipe, data)
    if engine is Engine.ONESHOT:
        check_plain(plan, "The oneshot engine")
    if scratch is not None:
        check_engine(engine, "--scratch")
    versions = _versions(engine)
    identity = plan.survey.checkpoint.source.identity()
    fingerprint = {**identity, "plan": plan.fingerprint, "engine": engine.value, **versions}
    weights = read_importance(importance, plan)
    fingerprint |= stated(plan.recipe, weights)
    if data is not None:
        fingerprint["data"] = _identity_of(data)
    made_by = {"name": engine.value, "versions": versions}
    record = provenance(plan, identity, made_by, fingerprint)
    return Run(plan, out, engine, workers, weights, data, scratch, emit, fingerprint, record)


def check_engine(engine: Engine, option: str) -> None:
    """Raise UsageError where an option is of the streaming engine, and another one runs."""
    if engine is not Engine.STREAM:
        raise UsageError(
            f"{option} is of the stream engine; this recipe or --engine takes {engine.value}.",
            f"Leave {option} out.",
        )


def check_data(recipe: Recipe, data: str | None) -> None:
    """Raise UsageError where a recipe lacks calibration data, or there is some for no use."""
    if recipe.needs_data and data is None:
        raise UsageError(
            f"Recipe {recipe.name} needs calibration data, which --data names.",
            "Add --data FILE: .jsonl, .txt or .parquet; or the id of a dataset on the hub.",
        )
    if data is not None and not recipe.needs_data:
        raise UsageError(
            f"Recipe {recipe.name} needs no data, so --data says nothing.", "Leave out --data."
        )


def _identity_of(data: str) -> str:
    """sha256 of a file; the id of a dataset. Raises DataFileError for a file that is not there."""
    path = Path(data)
    if not path.suffix:
        return data
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataFileError(
            f"{data} cannot be read: {error.strerror}.", "Correct the path after --data."
        ) from error


def _versions(engine: Engine) -> dict[str, str]:
    try:
        return {package: version(package) for package in _DECISIVE[engine]}
    except PackageNotFoundError:
        raise MissingExtra(f"The {engine} engine", engine.value) from None


@dataclass(frozen=True)
class Run:
    """A run that was asked for. `plan` reads from a folder, or, with `scratch`, from a hub.

    `fingerprint` tells it from others, `record` is what mquant.json says besides the files.
    """

    plan: Plan
    out: Path
    engine: Engine
    workers: int | None
    importance: "Importance | None"
    data: str | None
    scratch: int | None
    emit: Emit
    fingerprint: Mapping[str, str]
    record: Mapping[str, Any]

    @property
    def source(self) -> Source:
        """What is read."""
        return self.plan.survey.checkpoint.source

    @property
    def folder(self) -> Folder:
        """What is read, where that is a folder."""
        if not isinstance(self.source, Folder):
            raise TypeError(f"{self.source.name} is no folder")
        return self.source

    @property
    def side_files(self) -> tuple[str, ...]:
        """The files of the source that go along."""
        return side_files(self.plan.survey.checkpoint)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that the result will have."""
        return file_names(self.plan, self.side_files)

    @property
    def file_bytes(self) -> int:
        """Bytes of the shards and side files."""
        return self.plan.file_bytes + sum(self.source.files[path] for path in self.side_files)

    def fetched(self) -> "Run":
        """The same run, whose source is here, unless its files are to pass through the scratch."""
        if self.scratch is not None:
            return self
        return replace(self, plan=self.plan.reading_from(here(self.source, self.emit)))

    def look(self, *, restart: bool) -> Claim:
        """What OUT holds. Raises as `mquant.output.examine`."""
        local = [self.source.root] if isinstance(self.source, Folder) else []
        return examine(self.out, local, dict(self.fingerprint), restart=restart)

    def make_shards(
        self, ledger: Ledger, claim: Claim, shipper: "Shipper | None" = None
    ) -> dict[str, str]:
        """Make all shards, but for what an earlier run made; returns their sha256, by name.

        With a `shipper` they do not stay here.
        """
        stamps = stamps_of(self.source, self.plan.survey.checkpoint.shards)
        making = Making(
            self.plan,
            self.out,
            self.files,
            stamps,
            self.emit,
            "quantize",
            away=shipper.sent if shipper else None,
        )
        # oneshot starts over: its modules come in the order of the model, not of the output.
        resume = self.engine is Engine.STREAM
        run = partial(self._run_engines, shipper=shipper)
        return making.shards(ledger, claim, dict(self.fingerprint), run, resume=resume)

    def finish(self, digests: Mapping[str, str], judge: Callable[[Source], None]) -> None:
        """Write all other files, config.json last, when `judge` has seen what it will be."""
        shards = {
            shard.name: {"bytes": shard.file_bytes, "sha256": digests[shard.name]}
            for shard in self.plan.shards
        }
        sides = dict.fromkeys(self.side_files, self.source)
        index = index_json(self.plan)
        finish(self.out, self.plan, index, shards, sides, self.record, judge, self.emit)

    def _run_engines(self, output: ShardSet, shipper: "Shipper | None") -> None:
        from mquant.engines import stream  # numba
        from mquant.workflows.importance import weigher

        if self.engine is Engine.ONESHOT:
            from mquant.engines import oneshot  # torch and transformers: seconds, and optional

            oneshot.run(self.plan, output.write, self.emit, self._samples())
        # After oneshot, what is left are the tensors that are copied.
        workers = self.workers or default_workers()
        weigh = weigher(self.plan.recipe, self.importance)
        with ExitStack() as stack:
            reader: Reader | Spool
            stops: list[Callable[[], None]] = []
            if self.scratch is None:
                reader = stack.enter_context(closing(Reader(self.folder)))
            else:
                folder = self.out / SCRATCH
                spool = spooled(self.plan, folder, self.scratch, output, self.emit)
                reader = stack.enter_context(spool)
                stops.append(reader.stop)
            if shipper:
                shipper.follow(output)
                stops.append(shipper.stop)
            stream.run(reader, output, workers, weigh, on_stop=stops)

    def _samples(self) -> list[list[int]] | None:
        if self.data is None:
            return None
        from mquant.engines.samples import load_samples

        samples = load_samples(self.data, self.folder.root, self.plan.recipe.calibration)
        tokens = sum(len(ids) for ids in samples)
        self.emit(Note("info", f"Calibrating with {len(samples):,} samples, {tokens:,} tokens."))
        return samples

    def judge(self, result: Source) -> None:
        """Judge what was made as `mquant verify OUT --against SRC` does.

        Of what the streaming engine made only the structure: reading all of it back would take
        longer than making it. What was asked for knowingly (--allow-unsafe) does not count, and
        what the parent lacks is told but does not count either: the output has the parent's
        config.json, key by key. Side files that came from a hub must be what it lists.
        """
        check_side_files(self.source, self.side_files, self.out)
        families = {self.plan.family.name: self.plan.family}
        if self.engine is Engine.STREAM:
            report = verify(result, families, Depth.STRUCTURE, emit=self.emit)
        else:
            report = verify(result, families, parent=self.folder, emit=self.emit)
        known = {finding.rule for finding in self.plan.findings} | {"config-key-missing"}
        for finding in report.findings:
            if finding.severity == "error" and finding.rule not in known:
                raise EngineError(
                    f"What was made is wrong ({finding.rule}): {finding.message}",
                    "Please report this; OUT has no config.json, so nothing will load it.",
                )
            fact = finding.severity == "info"
            self.emit(Note("info" if fact else "warning", finding.message))


__all__ = ["Engine", "Result", "Run", "check_data", "choose_engine", "prepare", "quantize"]
