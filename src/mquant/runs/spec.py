"""The specification of a `mquant quantize` run: the decisions that do not depend on OUT."""

from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mquant.checkpoint import Source
from mquant.errors import MissingExtra, Refused, UsageError
from mquant.events import Emit
from mquant.output import CALIBRATION, STATES, Recorded, calibration_of, side_files
from mquant.plan import Plan
from mquant.recipe import AS_STORED, Recipe, data_file
from mquant.runs.casts import count_casts
from mquant.runs.checks import check_forward, check_plain
from mquant.runs.cost import measure_cost
from mquant.runs.run_spec import RunSpec
from mquant.schemes import SCHEMES, Scheme
from mquant.tokens.calibration_data import CalibrationData, find_data

if TYPE_CHECKING:
    from mquant.engines.importance import Importance


class Engine(StrEnum):
    """The code that does the arithmetic."""

    AUTO = "auto"
    STREAM = "stream"
    CALIBRATED = "calibrated"
    ONESHOT = "oneshot"


# Packages whose versions can change the bytes that an engine writes.
_DECISIVE: Final[dict[Engine, tuple[str, ...]]] = {
    Engine.STREAM: (),
    Engine.CALIBRATED: ("numpy", "numba"),
    Engine.ONESHOT: ("llmcompressor", "compressed-tensors", "torch", "transformers"),
}


def choose_engine(requested: Engine, plan: Plan) -> Engine:
    """Return the engine that will run; `auto` means one that can do the recipe.

    That is stream, or calibrated for a recipe that needs data. The oneshot engine runs what both
    cannot do: AWQ, and schemes that the stream engine does not make; weights that stay as the
    source stores them do not count. Raises UsageError for an engine that cannot do the recipe.
    """
    recipe = plan.recipe
    if recipe.needs_data:
        return _with_data(requested, plan)
    if requested is Engine.CALIBRATED:
        raise UsageError(
            f"Recipe {recipe.name} needs no data, which the calibrated engine is for.",
            "Leave out --engine.",
        )
    foreign = [scheme.name for scheme in _made(plan) if not scheme.streamed]
    if foreign:
        if requested is Engine.STREAM:
            raise UsageError(
                f"Recipe {recipe.name} stores {foreign[0]}, which the stream engine does not make.",
                "Leave out --engine, or take recipe nvfp4.",
            )
        return Engine.ONESHOT
    if requested is Engine.ONESHOT and recipe.scales == "search":
        raise UsageError(
            f"Recipe {recipe.name} searches scales, which only the stream engine does.",
            "Leave out --engine, or take recipe nvfp4.",
        )
    return Engine.STREAM if requested is Engine.AUTO else requested


def _with_data(requested: Engine, plan: Plan) -> Engine:
    """Return the engine for a recipe that needs data. Raises UsageError as `choose_engine`."""
    recipe = plan.recipe
    if requested is Engine.STREAM:
        raise UsageError(
            f"Recipe {recipe.name} needs the model's own activations, which the stream engine "
            "does not see.",
            "Leave out --engine, or take recipe nvfp4.",
        )
    theirs = recipe.smoothing == "awq"
    if requested is Engine.ONESHOT or (requested is Engine.AUTO and theirs):
        if recipe.sweeps:
            raise UsageError(
                f"Recipe {recipe.name} asks for sweeps, which only the calibrated engine does.",
                "Leave out --engine.",
            )
        return Engine.ONESHOT
    if theirs:
        raise UsageError(
            f"Recipe {recipe.name} asks for AWQ, which only the oneshot engine does.",
            "Leave out --engine.",
        )
    check_forward(plan, "Give --engine oneshot, which builds the model with transformers.")
    return Engine.CALIBRATED


def _made(plan: Plan) -> list[Scheme]:
    """Return the schemes of the recipe, without those that the source already has throughout."""
    kept = {a.role for a in plan.actions if a.already} - {a.role for a in plan.actions if a.scheme}
    schemes = [plan.recipe.roles[role] for role in plan.recipe.roles if role not in kept]
    return [SCHEMES[name] for name in schemes if name != AS_STORED]


@dataclass(frozen=True, kw_only=True)
class QuantizeSpec(RunSpec):
    """The specification of a `mquant quantize` run.

    `kind` is the engine that runs. `importance` weighs errors in a search of scales. `data` is the
    calibration data of the recipe.
    """

    kind: Engine
    importance: "Importance | None"
    data: CalibrationData | None

    def resumable(self, recorded: Recorded | None) -> Recorded | None:
        """Return what counts of an earlier run: of a calibrated one, only if no file was touched.

        What the calibrated engine makes of a weight depends on all files.
        """
        recorded = super().resumable(recorded)
        if self.kind is not Engine.CALIBRATED or recorded is None:
            return recorded
        same = all(sources == self.stamps for sources in recorded.units.values())
        return recorded if same else None

    def measured(self, source: Source, emit: Emit) -> dict[str, Any]:
        """Return what a cast to NVFP4 keeps and loses; tell what a second rounding costs."""
        for cost in measure_cost(self.plan, source, self.importance):
            emit(cost.note)
        casts = count_casts(self.plan, source)
        if casts is None:
            return {}
        for note in casts.notes():
            emit(note)
        return {"cast": casts.to_json()}


def prepare(
    plan: Plan,
    engine: Engine = Engine.AUTO,
    importance: Path | None = None,
    data: str | None = None,
) -> QuantizeSpec:
    """Check the options, and return the specification of the run, without a look at OUT.

    Raises as `quantize`, except the errors about OUT.
    """
    from mquant.engines.importance import importance_fingerprint, read_importance  # numpy

    if plan.refusals:
        raise Refused(plan.refusals)
    kind = choose_engine(engine, plan)
    check_data(plan.recipe, data)
    if kind is Engine.ONESHOT:
        check_plain(plan, "The oneshot engine")
    versions, source = _versions(kind), plan.survey.checkpoint.source
    identity, weights = source.identity(), read_importance(importance, plan)
    fingerprint = {**identity, "plan": plan.fingerprint, "engine": kind.value, **versions}
    fingerprint |= importance_fingerprint(plan.recipe, weights)
    found = None if data is None else find_data(data)
    if found is not None:
        fingerprint["data"] = found.identity
        sampling = plan.recipe.calibration  # the plan's fingerprint has it; a person can read this
        fingerprint["samples"] = f"{sampling.samples:,} of {sampling.length:,} tokens at most"
    return QuantizeSpec(
        plan=plan,
        source=source,
        parent=identity,
        fingerprint=fingerprint,
        side_files=dict.fromkeys(side_files(plan.survey.checkpoint), source),
        engine={"name": kind.value, "versions": versions},
        stage="quantize",
        protected=source.folders,
        # oneshot cannot resume: it quantizes in the model's order, not the output's.
        resumes=kind is not Engine.ONESHOT,
        working=(STATES,) if kind is Engine.CALIBRATED else (),
        kind=kind,
        extra_record=_calibrated(weights) or calibration_of(source),
        importance=weights,
        data=found,
    )


def _calibrated(weights: "Importance | None") -> dict[str, Any]:
    """Return the entry of mquant.json on the data that an importance file was measured on."""
    return {CALIBRATION: weights.calibration} if weights and weights.calibration else {}


def check_engine(engine: Engine, option: str) -> None:
    """Raise UsageError if an option of the stream engine is given and another engine runs."""
    if engine is not Engine.STREAM:
        raise UsageError(
            f"{option} needs the stream engine; this recipe or --engine takes {engine.value}.",
            f"Leave {option} out.",
        )


def check_sampling(recipe: Recipe, **given: int | None) -> None:
    """Raise UsageError if an option of the samples is given, and the recipe needs no data."""
    option = next((name for name, value in given.items() if value is not None), None)
    if option is not None and not recipe.needs_data:
        raise UsageError(
            f"Recipe {recipe.name} needs no data, so --{option} has no effect.",
            f"Leave out --{option}.",
        )


def check_data(recipe: Recipe, data: str | None) -> None:
    """Raise UsageError if the recipe needs data and `data` is None, or the other way round.

    Raises DataFileError as `data_file` does.
    """
    if recipe.needs_data and data is None:
        raise UsageError(
            f"Recipe {recipe.name} needs calibration data, which --data names.",
            "Add --data FILE: .jsonl, .txt or .parquet; or the id of a dataset on the hub.",
        )
    if data is not None and not recipe.needs_data:
        raise UsageError(
            f"Recipe {recipe.name} needs no data, so --data has no effect.", "Leave out --data."
        )
    if data is not None:
        data_file(data)


def _versions(engine: Engine) -> dict[str, str]:
    try:
        return {package: version(package) for package in _DECISIVE[engine]}
    except PackageNotFoundError:
        raise MissingExtra(f"The {engine} engine", engine.value) from None
