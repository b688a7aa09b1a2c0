"""Choose a config.json with which vLLM loads the tensors as they are.

The candidates have the keys of the checkpoint or of its parent, and the quantization config of the
checkpoint or one written from the tensors. The model of the loader judges them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from mquant.checkpoint import Checkpoint, TensorInfo
from mquant.family import Family
from mquant.family_files import family_of
from mquant.findings import Finding
from mquant.loader_model.declared import declared_config
from mquant.loader_model.modules import ModuleView, read_modules
from mquant.output import config_json
from mquant.plan import Plan, declarations
from mquant.verify.against_parent_files import check_config
from mquant.verify.config_json import CONFIG_KEY_MISSING
from mquant.verify.judge import check_headers
from mquant.verify.not_judged import undecided, unknown

_KEYS: Final = ("quantization_config", "compression_config")
_LISTS: Final = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")
_CACHE: Final = "kv_cache_scheme"


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

    The less a config changes of the checkpoint's own, the earlier it is asked: a config that is
    written from the tensors counts only if vLLM loads them with no config group of the checkpoint.
    None if vLLM loads the tensors with no config.
    """
    for configs in _candidates(checkpoint, parent, families):
        best: Judged | None = None
        for config in configs:
            judged = _judge(replace(checkpoint, config=config), families)
            if judged.loads and (best is None or len(judged.faults) < len(best.faults)):
                best = judged
            if best is not None and not best.faults:
                break
        if best is not None:
            return best
    return None


def judge_plan(right: Plan, plan: Plan, families: Mapping[str, Family]) -> Judged:
    """Judge the tensors of `plan` with the config.json of `right`."""
    parent = right.survey.checkpoint
    tensors = {
        each.name: TensorInfo(each.name, each.dtype, each.shape, shard.name, 0, each.nbytes)
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
        index={each.name: each.shard for each in tensors.values()},
    )
    return _judge(planned, families)


def _candidates(
    checkpoint: Checkpoint, parent: Checkpoint, families: Mapping[str, Family]
) -> Iterator[list[dict[str, Any]]]:
    """Yield configs with the checkpoint's own groups, then configs written from the tensors."""
    family, declared = (
        family_of(parent.config, families, parent.tensors),
        declared_config(checkpoint),
    )
    own, theirs = (
        {key: value for key, value in each.config.items() if key not in _KEYS}
        for each in (checkpoint, parent)
    )
    alike = not any(check_config(_renamed(own, family), _renamed(theirs, family)))
    plains = (own, theirs) if alike else (theirs, own)
    written = list(declarations(checkpoint, parent, family)) if family else []
    kept = [declared, *(_with_lists(declared, written) if declared else ())]
    first = [checkpoint.config] if alike else []
    yield [*first, *(_with(plain, config) for plain in plains for config in kept)]
    yield [_with(plain, config) for plain in plains for config in written]


def _with(plain: Mapping[str, Any], declared: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**plain, **({"quantization_config": dict(declared)} if declared else {})}


def _with_lists(
    declared: Mapping[str, Any], written: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the checkpoint's config with what a config of the same method says besides groups.

    That is the list of plain modules, under the key that the method reads, and the KV cache.
    """
    others = [each for each in written if each["quant_method"] == declared.get("quant_method")]
    for other in others[:1]:
        groups = {key: value for key, value in declared.items() if key not in _LISTS}
        yield {**groups, **{key: other[key] for key in (*_LISTS, _CACHE) if key in other}}


def _renamed(config: Mapping[str, Any], family: Family | None) -> Mapping[str, Any]:
    """Return config.json with the hub's name of each key that transformers writes under another."""
    aliases = family.vllm.aliases if family and family.vllm else {}
    free = {key: name for key, name in aliases.items() if name not in config}
    return {free.get(key, key): value for key, value in config.items()}


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
