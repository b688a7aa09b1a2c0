"""Judge the parts of quantized modules, and whether fused sets and experts are alike."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from mquant.family import FusedSet
from mquant.family_rows import Role
from mquant.findings import Rule, rule
from mquant.loader_model.modules import Module, ModuleView
from mquant.loader_model.storage import (
    FP8S,
    INPUT_SCALES,
    NVFP4S,
    SUFFIXES,
    StorageFormat,
    activations,
    parts,
    weight_shape,
)
from mquant.plan.build import EXPERTS_MIXED, FUSED_SET_MIXED
from mquant.plan.export import ACTIVATION_SCALES_MISSING
from mquant.plan.never_quantized import EXPERT_BIAS
from mquant.plan.stored import PART_MISSING, PART_SHAPE
from mquant.verify.tally import Tally

PART_UNEXPECTED: Final = rule(
    "part-unexpected",
    "A quantized module has only tensors of its layout.",
    "vLLM refuses parameters that the layer does not have; under experts vLLM drops them.",
    "Remove the tensor, or quantize again.",
    knowing=("layout",),
    if_loads="nothing",
)
PART_DTYPE: Final = rule(
    "part-dtype",
    "Codes and scales have the dtype of their layout.",
    "vLLM converts the numbers by value without an error: U8 scales become other scales.",
    "Quantize again, with a tool that writes the whole module.",
    knowing=("layout",),
    if_loads="nothing",
)
WEIGHT_STORED_TWICE: Final = rule(
    "weight-stored-twice",
    "A module has either a plain weight or a quantized one.",
    "The loader decides which weight is loaded.",
    "Remove the weight that config.json does not describe.",
    knowing=("layout",),
    if_loads="nothing",
)
ACTIVATION_SCALES_UNDECLARED: Final = rule(
    "activation-scales-undeclared",
    "If there are activation scales, config.json declares them.",
    "Loaders of weight-only layouts have no parameter for the scales and refuse them.",
    "Declare input_activations, or remove the tensors.",
    knowing=("layout",),
    if_loads="nothing",
)
Kinds = Mapping[str, StorageFormat]
"""Module name -> storage format, for every quantized module."""


def check_modules(view: ModuleView, kinds: Kinds, tally: Tally) -> None:
    """Judge the parts of every quantized module."""
    declared = {kind: activations(kind, view) for kind in set(kinds.values())}
    for name, kind in kinds.items():
        module = view.modules[name]
        if kind is StorageFormat.OTHER:
            continue
        _inputs(module, kind, declared[kind], tally)
        codes = SUFFIXES[kind].codes
        if codes != "weight" and codes in module.tensors and "weight" in module.tensors:
            tally.add(WEIGHT_STORED_TWICE, name, f"{name} has both weight and {codes}")
        _parts(view, module, kind, tally)


def _parts(view: ModuleView, module: Module, kind: StorageFormat, tally: Tally) -> None:
    shape = weight_shape(kind, module, view)
    # Without codes the shapes of the other parts are unknown.
    expected = parts(kind, shape or (0, 0), module, view)
    present = ", ".join(sorted(s for s in module.tensors if s in expected))
    for suffix, part in expected.items():
        info = module.tensors.get(suffix)
        if info is None:
            if part.required:
                tally.add(
                    PART_MISSING,
                    f"{module.name}.{suffix}",
                    f"{module.name} is quantized ({kind.short}: {present}), but has no {suffix}",
                )
        elif info.dtype not in part.dtypes:
            dtypes = " or ".join(part.dtypes)
            tally.add(
                PART_DTYPE, info.name, f"{info.name} is {info.dtype}; {kind.short} has {dtypes}"
            )
        elif shape and part.shapes and info.shape not in part.shapes:
            shapes = " or ".join(str(list(shape)) for shape in part.shapes)
            tally.add(
                PART_SHAPE,
                info.name,
                f"{info.name} is {list(info.shape)}; a weight of {list(shape)} needs {shapes}",
            )
    known = {*expected, *INPUT_SCALES, "weight"}
    for suffix, info in module.tensors.items():
        if suffix in module.quantized and suffix not in known:
            tally.add(
                PART_UNEXPECTED, info.name, f"{info.name} is no part of a module in {kind.short}"
            )


def _inputs(module: Module, kind: StorageFormat, declared: bool | None, tally: Tally) -> None:
    name = SUFFIXES[kind].input
    has_scales = any(suffix in module.tensors for suffix in INPUT_SCALES)
    if declared and name and name not in module.tensors:
        tally.add(
            ACTIVATION_SCALES_MISSING,
            f"{module.name}.{name}",
            f"config.json declares quantized activations, but {module.name} has no {name}",
        )
    elif declared is False and has_scales:
        tally.add(
            ACTIVATION_SCALES_UNDECLARED,
            module.name,
            f"{module.name} has a scale of its input, but config.json declares no static "
            "scales of activations",
        )


def check_alike(view: ModuleView, kinds: Kinds, tally: Tally) -> None:
    """Judge whether fused sets and experts are quantized alike, and without biases."""
    sets: dict[FusedSet, list[Module]] = defaultdict(list)
    experts: dict[int | None, list[Module]] = defaultdict(list)
    for module in view.modules.values():
        if module.tensor_role is None:
            continue
        row, layer = module.tensor_role.row, module.tensor_role.layer
        if fused_set := module.tensor_role.fused_set:
            sets[fused_set].append(module)
        if row.role is Role.EXPERT:
            experts[layer].append(module)
            if "bias" in module.tensors and kinds.get(module.name) in FP8S | NVFP4S:
                tally.add(EXPERT_BIAS, module.name, f"{module.name} is quantized, and has a bias")
    for broken, groups_ in ((FUSED_SET_MIXED, sets.values()), (EXPERTS_MIXED, experts.values())):
        for group in groups_:
            _alike(broken, group, kinds, tally)


def _alike(broken: Rule, group: list[Module], kinds: Kinds, tally: Tally) -> None:
    def state(module: Module) -> str:
        kind = kinds.get(module.name)
        return kind.short if kind else "not quantized"

    states = [state(module) for module in group]
    common = max(set(states), key=states.count)
    # Name the module that differs; of two modules, the plain one.
    if outlier := next((m for m in group if state(m) != common), None):
        other = next(m for m in group if state(m) == common)
        if states.count(common) == states.count(state(outlier)) and outlier.name in kinds:
            outlier, other = other, outlier
        tally.add(
            broken,
            outlier.name,
            f"{outlier.name} is {_say(state(outlier))}, but {other.name} is {_say(state(other))}",
        )


def _say(state: str) -> str:
    return state if state == "not quantized" else f"quantized ({state})"
