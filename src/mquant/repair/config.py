"""Choose a config.json with which vLLM loads the tensors as they are.

The candidates have the keys of the checkpoint or of its parent, and the quantization config of the
checkpoint or one written from the tensors. The model of the loader judges them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mquant.checkpoint import Checkpoint, TensorInfo
from mquant.family import Family, family_of
from mquant.findings import Finding
from mquant.loader_model.modules import ModuleView, declared_config, read_modules
from mquant.output import config_json
from mquant.plan import Plan, declarations
from mquant.verify.against_parent_files import check_config
from mquant.verify.config_json import CONFIG_KEY_MISSING
from mquant.verify.judge import check_headers
from mquant.verify.not_judged import undecided, unknown

_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Judged:
    """A config.json with the errors and warnings of `verify`, given some tensors.

    `loads`: vLLM loads the tensors. `unknown` is a sentence if that is not known.
    """

    config: dict[str, Any]
    loads: bool
    faults: tuple[Finding, ...]
    unknown: str


def choose_config(
    checkpoint: Checkpoint, parent: Checkpoint, families: Mapping[str, Family]
) -> Judged | None:
    """Return the config with the fewest faults among those with which vLLM loads the tensors.

    The checkpoint's own config.json is the first choice. None if vLLM loads the tensors with none.
    """
    best: Judged | None = None
    for config in _candidates(checkpoint, parent, families):
        judged = _judge(replace(checkpoint, config=config), families)
        if judged.loads and (best is None or len(judged.faults) < len(best.faults)):
            best = judged
        if best is not None and not best.faults:
            break
    return best


def judge_plan(right: Plan, plan: Plan, families: Mapping[str, Family]) -> Judged:
    """Judge the tensors of `plan` with the config.json of `right`."""
    parent = right.survey.checkpoint
    tensors = {
        output.name: TensorInfo(
            output.name, output.dtype, output.shape, shard.name, 0, output.nbytes
        )
        for shard in plan.shards
        for unit in shard.units
        for each in unit.outputs
    }
    planned = Checkpoint(
        source=parent.source,
        config=config_json(right),
        tensors=tensors,
        shards=tuple(shard.name for shard in plan.shards),
        findings=(),
    )
    return _judge(planned, families)


def _candidates(
    checkpoint: Checkpoint, parent: Checkpoint, families: Mapping[str, Family]
) -> Iterator[dict[str, Any]]:
    own, theirs = (
        {key: value for key, value in each.config.items() if key not in _KEYS}
        for each in (checkpoint, parent)
    )
    family, declared = family_of(parent.config, families), declared_config(checkpoint)
    written = list(declarations(checkpoint, parent, family)) if family else []
    alike = not any(check_config(own, theirs))
    if alike:
        yield checkpoint.config
    for plain in (own, theirs) if alike else (theirs, own):
        yield {**plain, **({"quantization_config": declared} if declared else {})}
        for config in written:
            yield {**plain, "quantization_config": config}


def _judge(checkpoint: Checkpoint, families: Mapping[str, Family]) -> Judged:
    view = read_modules(checkpoint, families)
    outcome = view.outcome
    if outcome.unknown and not _answers_for_itself(view):
        return Judged(checkpoint.config, False, (), undecided(view, unknown(view)))
    faults = tuple(
        finding
        for finding in check_headers(view)
        if finding.severity != "info" and finding.rule != CONFIG_KEY_MISSING.id
    )
    wrong = any(finding.severity == "error" for finding in faults)
    return Judged(checkpoint.config, not wrong, faults, "")


def _answers_for_itself(view: ModuleView) -> bool:
    """Return whether the user's own family file does not say what vLLM builds."""
    return view.family is not None and view.family.vllm is None
