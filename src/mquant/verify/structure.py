"""Judge headers and JSON: whether the model is complete, and every part has its dtype and shape."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from mquant.family import Family, TensorRole
from mquant.findings import Finding, in_context, rule
from mquant.loader_model.modules import ModuleView
from mquant.loader_model.storage import format_of, weight_shape
from mquant.plan import Member, completeness
from mquant.plan.build import FUSED_SET_MIXED
from mquant.plan.completeness import SHAPE_DISAGREES, layouts
from mquant.plan.stored import PART_MISSING
from mquant.plan.survey import FAMILY_UNKNOWN
from mquant.verify.config_json import check_config_json
from mquant.verify.mtp import check_mtp
from mquant.verify.names import check_names
from mquant.verify.parts import Kinds, check_alike, check_modules
from mquant.verify.tally import Tally

TOTAL_SIZE_WRONG: Final = rule(
    "total-size-wrong",
    "The index's total_size is the bytes of all tensors.",
    "Tools plan memory by total_size.",
    "Set metadata.total_size in the index to the true number.",
    severity="warning",
)


def check_structure(view: ModuleView) -> tuple[Finding, ...]:
    """Judge a checkpoint by its headers, index and config.json."""
    modules = view.modules.values()
    kinds = {m.name: kind for m in modules if (kind := format_of(view, m)) is not None}
    tally = Tally()
    check_modules(view, kinds, tally)
    check_config_json(view, kinds, tally)
    # `quantize` refuses a checkpoint with these findings, but a loader can still load the
    # checkpoint, so the severity is that of a judged checkpoint.
    findings = [in_context(f, "judged") for f in view.checkpoint.findings]
    findings += _total_size(view)
    if view.family is None:
        findings.append(_unknown_family(view))
        return (*findings, *tally.findings())
    check_names(view, view.family, tally)
    check_alike(view, kinds, tally)
    findings += layouts(view.family, view.checkpoint)
    whole = [*completeness(view.family, _members(view, kinds), view.checkpoint.config)]
    if view.checkpoint.lost_shards:
        # Tensors of a lost shard are not reported one by one.
        whole = [f for f in whole if f.rule == SHAPE_DISAGREES.id]
        rest = [f for f in tally.findings() if f.rule not in (PART_MISSING.id, FUSED_SET_MIXED.id)]
        return (*findings, *whole, *rest)
    findings += [*whole, *tally.findings()]
    named = ((name, module.tensor_role) for name, module in view.modules.items())
    findings += check_mtp(view.family, view.checkpoint.config, named)
    return tuple(findings)


def _members(view: ModuleView, kinds: Kinds) -> list[Member]:
    """Return every known tensor as if no module were quantized, with one weight for each module.

    A tensor with a loaded model's name counts under the name that the family gives the tensor on
    disk; another rule judges the name.
    """
    members: list[Member] = []
    family, config = view.family, view.checkpoint.config
    if family is None:
        return members
    for module in view.modules.values():
        kind = kinds.get(module.name)
        for suffix, info in module.tensors.items():
            tensor_role = _classify(family, info.name)
            # A weight beside codes breaks a rule of its own; the codes stand for the weight.
            of_codes = kind and (suffix in module.quantized or suffix == "weight")
            if tensor_role is not None and not of_codes:
                name = tensor_role.row.format(tensor_role.layer, tensor_role.expert)
                members.append(Member(replace(info, name=name), tensor_role))
        tensor_role = _classify(family, f"{module.name}.weight")
        if kind is not None and tensor_role is not None:
            shape = weight_shape(kind, module, view) or family.shape(
                tensor_role.row, config, tensor_role.layer
            )
            name = tensor_role.row.format(tensor_role.layer, tensor_role.expert)
            any_part = next(iter(module.tensors.values()))
            members.append(Member(replace(any_part, name=name, shape=shape or ()), tensor_role))
    return members


def _classify(family: Family, name: str) -> TensorRole | None:
    return family.classify(name) or family.classify_in_memory(name)


def _total_size(view: ModuleView) -> Iterator[Finding]:
    checkpoint = view.checkpoint
    if checkpoint.total_size not in (None, checkpoint.nbytes) and not view.checkpoint.lost_shards:
        yield TOTAL_SIZE_WRONG.finding(
            "model.safetensors.index.json",
            f"The index says total_size {checkpoint.total_size:,}; the tensors are "
            f"{checkpoint.nbytes:,} bytes.",
        )


def _unknown_family(view: ModuleView) -> Finding:
    kind = str(view.checkpoint.config.get("model_type"))[:60]
    return FAMILY_UNKNOWN.finding(
        "config.json",
        f"config.json says model_type {kind!r}, a family mquant does not know: only rules "
        "that hold for every model were checked.",
    )
