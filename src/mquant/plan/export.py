"""The plan of an export: NVFP4 under another layout's names. Pure: scales are read elsewhere.

The export has the source's shards, with the same order of tensors. So a checkpoint that is exported
and then exported back has the same files.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from itertools import groupby
from typing import Any, Final

from mquant.checkpoint import Checkpoint, TensorInfo
from mquant.errors import Refused
from mquant.family import Family
from mquant.findings import Finding, rule
from mquant.loader_model.storage import GROUP, SUFFIXES, StorageFormat
from mquant.plan.action import Action, OutputTensor, WorkUnit
from mquant.plan.build import kept_modules
from mquant.plan.loadable import checked
from mquant.plan.members import Member, as_stored
from mquant.plan.model import Plan, ShardPlan, declaration
from mquant.plan.stored import READABLE
from mquant.plan.survey import SOURCE_QUANTIZED, Survey, survey
from mquant.recipe import Recipe
from mquant.schemes import NVFP4, NVFP4A16
from mquant.text import names


class Target(StrEnum):
    """The layouts to export to, as config.json's `quant_method` calls them."""

    MODELOPT = "modelopt"
    COMPRESSED_TENSORS = "compressed-tensors"


NOTHING_TO_EXPORT: Final = rule(
    "nothing-to-export",
    "The checkpoint is in a layout that can be exported.",
    "mquant exports NVFP4 only.",
    "Quantize the checkpoint first: mquant quantize --recipe nvfp4.",
    needs="plan",
)
NOT_EXPORTABLE: Final = rule(
    "not-exportable",
    "The other layout can store every tensor of the checkpoint.",
    "A tensor that the layout cannot store would be missing from the export.",
    "Export a checkpoint without a quantized KV cache.",
    needs="plan",
)
ACTIVATION_SCALES_MISSING: Final = rule(
    "activation-scales-missing",
    "If config.json declares static activation scales, the shards hold these scales.",
    "vLLM loads without the scales and multiplies by uninitialised memory.",
    "Calibrate again, or declare weights only (input_activations: null).",
    knowing=("layout",),
    if_loads="nothing",
)


SOURCE: Final = {
    Target.MODELOPT: StorageFormat.NVFP4,
    Target.COMPRESSED_TENSORS: StorageFormat.MODELOPT_NVFP4,
}
"""The format that a source must have, for each target."""
_RECIPES: Final = {
    Target.MODELOPT: Recipe(name="export", suffix="ModelOpt", roles={}),
    Target.COMPRESSED_TENSORS: Recipe(name="export", suffix="CT", roles={}),
}
_MADE: Final = {
    Target.MODELOPT: StorageFormat.MODELOPT_NVFP4,
    Target.COMPRESSED_TENSORS: StorageFormat.NVFP4,
}
# The shapes of a per-tensor weight scale and input scale.
_SCALAR: Final[dict[Target, tuple[int, ...]]] = {
    Target.MODELOPT: (),
    Target.COMPRESSED_TENSORS: (1,),
}
# Loaders know the layout by this producer's name, and TensorRT-LLM's AutoDeploy refuses any other
# name; mquant.json names mquant. The version is a ModelOpt version that writes this layout.
_LAYOUT: Final = {"name": "modelopt", "version": "0.39.0"}
# 4-bit weights or activations in a config group, as ModelOpt writes them
# (`modelopt/torch/export/convert_hf_config.py`).
_FP4: Final = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP}


def survey_for(checkpoint: Checkpoint, families: Mapping[str, Family], target: Target) -> Survey:
    """Survey a checkpoint that is to be exported.

    Raises Refused if the checkpoint is not whole, has no weight in the format that `target` is made
    from, or has a tensor that the other layout cannot store.
    """
    surveyed = survey(checkpoint, families, (SOURCE[target],))
    if any(finding.rule == SOURCE_QUANTIZED.id for finding in surveyed.findings):
        raise Refused([_other_format(checkpoint, families, target)])
    stored = [member.stored for member in surveyed.members if member.stored]
    known = {info.name for member in as_stored(surveyed.members) for info in _parts(member)}
    unstorable = [name for name in checkpoint.tensors if name not in known]
    with_input = [weight for weight in stored if weight.input]
    findings = [finding for finding in surveyed.findings if finding.severity == "error"]
    if findings or surveyed.family is None:
        raise Refused(findings)
    if not stored:
        findings.append(
            NOTHING_TO_EXPORT.finding(
                "config.json",
                f"{checkpoint.source.name} is not {SOURCE[target]}, the source of {target}.",
                "Quantize the checkpoint first: mquant quantize --recipe nvfp4.",
            )
        )
    if unstorable:
        findings.append(
            NOT_EXPORTABLE.finding(
                unstorable[0],
                f"mquant does not export {names(unstorable)}.",
                "Export a checkpoint without a quantized KV cache.",
            )
        )
    if with_input and len(with_input) < len(stored):
        lacking = next(weight for weight in stored if not weight.input).codes.name
        findings.append(
            ACTIVATION_SCALES_MISSING.finding(
                lacking,
                f"{lacking} has no input scale, but {len(with_input):,} other weights have one.",
                "Get the checkpoint again; mquant verify lists all faults.",
            )
        )
    if findings:
        raise Refused(findings)
    return surveyed


def _other_format(
    checkpoint: Checkpoint, families: Mapping[str, Family], target: Target
) -> Finding:
    """Return the finding that a quantized checkpoint is not, or not all, in NVFP4."""
    name = checkpoint.source.name
    members = survey(checkpoint, families, READABLE).members
    formats = sorted({member.stored.described for member in members if member.stored})
    how = " and ".join(formats) if formats else "something that mquant cannot read"
    again = f"mquant quantize {name if formats else 'PARENT'} --recipe nvfp4"
    return NOTHING_TO_EXPORT.finding(
        "config.json",
        f"{name} is already quantized, as {how}; mquant exports NVFP4 only, and to {target} only "
        f"checkpoints whose quantized weights are all {SOURCE[target]}.",
        f"Make such a checkpoint first: {again}."
        if target is Target.MODELOPT
        else "Give a checkpoint that mquant exported to ModelOpt, or that ModelOpt made.",
    )


def scalars(surveyed: Survey) -> Iterator[TensorInfo]:
    """Yield the tensors whose reciprocals an export holds."""
    for stored in (member.stored for member in surveyed.members if member.stored):
        yield from filter(None, (stored.second, stored.input))


def make_export_plan(
    surveyed: Survey,
    target: Target,
    values: Mapping[str, bytes],
    declared: Mapping[str, Any] | None = None,
) -> Plan:
    """Return the plan that stores a checkpoint in another layout.

    `values` maps each scalar to the bytes that replace the scalar. `declared` is the quantization
    config, if the config is known.
    """
    family = surveyed.family
    if family is None:
        raise Refused(surveyed.findings)
    plain = [member for member in surveyed.members if not member.stored]
    kept = ((m.module, m.tensor_role.expert, m.info) for m in plain)
    ignore = kept_modules(kept, family, surveyed.checkpoint.config)
    w4a4 = any(member.stored and member.stored.input for member in surveyed.members)
    if declared is None:
        declared = (modelopt_config if target is Target.MODELOPT else _to_ct)(ignore, w4a4=w4a4)
    actions = {
        action.source.name: action
        for member in as_stored(surveyed.members)
        for action in _actions(member, target, values)
    }
    tensors = (actions[name] for name in surveyed.checkpoint.tensors)
    shards = tuple(
        ShardPlan(name, tuple(_work_units(group)))
        for name, group in groupby(tensors, key=lambda action: action.source.shard)
    )
    plan = Plan(
        survey=surveyed,
        family=family,
        recipe=_RECIPES[target],
        shards=shards,
        ignore=ignore,
        findings=surveyed.findings,
        declared=declared,
    )
    return checked(plan)


def hf_quant_config(plan: Plan) -> dict[str, Any]:
    """Return the content of ModelOpt's own file: what its `quantization_config` says, regrouped."""
    declared = plan.quantization_config
    return {
        "producer": declared["producer"],
        "quantization": {
            "quant_algo": declared["quant_algo"],
            "kv_cache_quant_algo": None,
            "group_size": declared["group_size"],
            "exclude_modules": declared["ignore"],
        },
    }


def modelopt_config(ignore: tuple[str, ...], *, w4a4: bool) -> dict[str, Any]:
    """Return the config of ModelOpt for NVFP4, with or without quantized activations."""
    group = {"input_activations": _FP4} if w4a4 else {}
    return {
        "config_groups": {"group_0": {**group, "weights": _FP4, "targets": ["Linear"]}},
        "group_size": GROUP,
        "ignore": list(ignore),
        "producer": _LAYOUT,
        "quant_algo": "NVFP4" if w4a4 else "W4A16_NVFP4",
        "quant_method": "modelopt",
    }


def _to_ct(ignore: tuple[str, ...], *, w4a4: bool) -> dict[str, Any]:
    scheme = NVFP4 if w4a4 else NVFP4A16
    return declaration([{**scheme.config_group, "targets": ["Linear"]}], scheme.format, ignore)


def _parts(member: Member) -> Iterator[TensorInfo]:
    """Yield all tensors of the source that a member is made of."""
    if member.stored is None:
        yield member.info
        return
    stored = member.stored
    yield from filter(None, (stored.codes, stored.scale, stored.second, stored.input))


def _actions(member: Member, target: Target, values: Mapping[str, bytes]) -> Iterator[Action]:
    suffixes: Iterable[str] = SUFFIXES[_MADE[target]] if member.stored else ("",)
    # If the weight has no input scale, the last suffix is unused.
    for info, suffix in zip(_parts(member), suffixes, strict=False):
        value = values.get(info.name)
        shape = info.shape if value is None else _SCALAR[target]
        name = f"{member.module}.{suffix}" if suffix else info.name
        yield replace(
            Action.kept(member, "as it is" if value is None else "the reciprocal"),
            source=info,
            made=(OutputTensor(name, info.dtype, shape),),
            stored=None,
            value=value,
        )


def _work_units(actions: Iterable[Action]) -> Iterator[WorkUnit]:
    """Yield a work unit for each run of a module's tensors, in the order of the source."""
    for _, run in groupby(actions, key=lambda action: action.module):
        yield WorkUnit(tuple(run))
