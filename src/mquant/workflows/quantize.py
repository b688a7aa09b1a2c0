"""Carry out a plan: check what can be checked, claim OUT, run the engine, finish, verify."""

import hashlib
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

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
from mquant.schemes import SCHEMES
from mquant.workflows.making import (
    Making,
    check_disk,
    check_plain,
    default_workers,
    here,
    provenance,
)
from mquant.workflows.verify import Depth, verify

if TYPE_CHECKING:
    from mquant.workflows.importance import Importance


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
    foreign = [name for name in recipe.roles.values() if not SCHEMES[name].streamed]
    if foreign:
        if wanted is Engine.STREAM:
            raise UsageError(
                f"Recipe {recipe.name} stores {foreign[0]}, which the stream engine does not make.",
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
    restart: bool = False,
    emit: Emit = silent,
) -> Result:
    """Write the checkpoint that `plan` describes into `out`, or go on with what is there of it.

    `workers`: how many fused sets the streaming engine has under way; None: as many as the cores
    can use. `importance`: a file that says how much an error in each input channel counts where
    scales are searched (see `workflows.importance`). `data`: what recipes that need any are
    calibrated with (see `engines.samples`). Raises Refused for a plan with errors,
    UsageError and DataFileError for what does not go with it, MissingExtra without the engine's
    packages, OutputError for an OUT that is not ours, is in use or too small, and what the engine
    raises. Until it returns there is no config.json in `out`, so nothing there looks like a
    checkpoint.
    """
    from mquant.workflows.importance import read_importance, stated  # numpy

    if plan.refusals:
        raise Refused(plan.refusals)
    engine = choose_engine(engine, plan.recipe)
    check_data(plan.recipe, data)
    if engine is Engine.ONESHOT:
        check_plain(plan, "The oneshot engine")
    versions = _versions(engine)
    source = plan.survey.checkpoint.source
    local = [source.root] if isinstance(source, Folder) else []
    identity = source.identity()
    fingerprint = {**identity, "plan": plan.fingerprint, "engine": engine.value, **versions}
    weights = read_importance(importance, plan)
    fingerprint |= stated(plan.recipe, weights)
    if data is not None:
        fingerprint["data"] = _identity_of(data)
    look = partial(examine, out, local, fingerprint)
    claim = look(restart=restart)
    if claim.state is State.DONE:
        return Result(out, plan, engine, fresh=False)
    own = side_files(plan.survey.checkpoint)
    check_disk(out, claim.files, plan.file_bytes + sum(source.files[path] for path in own))
    folder = here(source, emit)
    ledger = Ledger(out)
    try:
        claim = look(restart=restart)  # again: now nobody else can change it
        if claim.state is State.DONE:
            return Result(out, plan, engine, fresh=False)
        run = Run(plan.reading_from(folder), out, engine, workers, weights, data, emit)
        sides = dict.fromkeys(own, folder)
        digests = run.make_shards(ledger, claim, fingerprint, file_names(plan, sides))
        shards = {
            shard.name: {"bytes": shard.file_bytes, "sha256": digests[shard.name]}
            for shard in plan.shards
        }
        made_by = {"name": engine.value, "versions": versions}
        record = provenance(plan, identity, made_by, fingerprint)
        finish(out, run.plan, index_json(plan), shards, sides, record, run.judge, emit)
        ledger.complete()
    finally:
        ledger.release()
    return Result(out, plan, engine, fresh=True)


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
    """The part of a run between claiming OUT and finishing it. `plan` reads from a folder."""

    plan: Plan
    out: Path
    engine: Engine
    workers: int | None
    importance: "Importance | None"
    data: str | None
    emit: Emit

    @property
    def source(self) -> Folder:
        """The folder that is read."""
        source = self.plan.survey.checkpoint.source
        if not isinstance(source, Folder):
            raise TypeError(f"{source.name} is no folder")
        return source

    def make_shards(
        self, ledger: Ledger, claim: Claim, fingerprint: dict[str, str], files: tuple[str, ...]
    ) -> dict[str, str]:
        """Make all shards, but for what an earlier run made; returns their sha256, by name."""
        stamps = {name: self.source.stamps[name] for name in self.plan.survey.checkpoint.shards}
        making = Making(self.plan, self.out, files, stamps, self.emit, "quantize")
        # oneshot starts over: its modules come in the order of the model, not of the output.
        resume = self.engine is Engine.STREAM
        return making.shards(ledger, claim, fingerprint, self._run_engines, resume=resume)

    def _run_engines(self, output: ShardSet) -> None:
        from mquant.engines import stream  # numba
        from mquant.workflows.importance import weigher

        if self.engine is Engine.ONESHOT:
            from mquant.engines import oneshot  # torch and transformers: seconds, and optional

            oneshot.run(self.plan, output.write, self.emit, self._samples())
        # After oneshot, what is left are the tensors that are copied.
        with closing(Reader(self.source)) as reader:
            weigh = weigher(self.plan.recipe, self.importance)
            stream.run(reader, output, self.workers or default_workers(), weigh)

    def _samples(self) -> list[list[int]] | None:
        if self.data is None:
            return None
        from mquant.engines.samples import load_samples

        samples = load_samples(self.data, self.source.root, self.plan.recipe.calibration)
        tokens = sum(len(ids) for ids in samples)
        self.emit(Note("info", f"Calibrating with {len(samples):,} samples, {tokens:,} tokens."))
        return samples

    def judge(self, result: Source) -> None:
        """Judge what was made as `mquant verify OUT --against SRC` does.

        Of what the streaming engine made only the structure: reading all of it back would take
        longer than making it. What was asked for knowingly (--allow-unsafe) does not count, and
        what the parent lacks is told but does not count either: the output has the parent's
        config.json, key by key.
        """
        families = {self.plan.family.name: self.plan.family}
        if self.engine is Engine.STREAM:
            report = verify(result, families, Depth.STRUCTURE, emit=self.emit)
        else:
            report = verify(result, families, parent=self.source, emit=self.emit)
        known = {finding.rule for finding in self.plan.findings} | {"config-key-missing"}
        for finding in report.findings:
            if finding.severity == "error" and finding.rule not in known:
                raise EngineError(
                    f"What was made is wrong ({finding.rule}): {finding.message}",
                    "Please report this; OUT has no config.json, so nothing will load it.",
                )
            fact = finding.severity == "info"
            self.emit(Note("info" if fact else "warning", finding.message))


__all__ = ["Engine", "Result", "check_data", "choose_engine", "quantize"]
