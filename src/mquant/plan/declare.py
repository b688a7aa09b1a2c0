"""The quantization configs that describe tensors as they are stored. Pure.

The tensors on disk say how each module is quantized; the family says what the modules are called in
`targets` and `ignore`. What neither says, such as whether activations are quantized without stored
scales, is as mquant's own recipes have it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mquant.checkpoint import Checkpoint, TensorInfo
from mquant.family import Family, TensorRole
from mquant.family_rows import Role
from mquant.loader_model.modules import by_module, quantized_suffixes
from mquant.loader_model.stacks import unstacked
from mquant.loader_model.storage import (
    GROUP,
    SUFFIXES,
    StorageFormat,
    recognize,
)
from mquant.plan.build import kept_modules
from mquant.plan.export import modelopt_config
from mquant.plan.model import declaration
from mquant.schemes import FP8_BLOCK, FP8_DYNAMIC, NVFP4, NVFP4A16, W4A16

KV_SCALES: Final = frozenset({"k_scale", "v_scale", "kv_scale"})
"""The suffixes of the scales of a quantized KV cache."""
_TENSOR: Final = {**FP8_DYNAMIC.config_group["weights"], "strategy": "tensor"}
KV_CACHE: Final = dict(_TENSOR)
"""The `kv_cache_scheme` of static scales in FP8."""
_KV_CACHE_OF_MODELOPT: Final = {"dynamic": False, "num_bits": 8, "type": "float"}
_INT8: Final = {
    **FP8_DYNAMIC.config_group,
    "format": "int-quantized",
    "weights": {**FP8_DYNAMIC.config_group["weights"], "type": "int"},
    "input_activations": {**FP8_DYNAMIC.config_group["input_activations"], "type": "int"},
}
_BITS_OF_I32: Final = 32
_BLOCKS: Final = (128, 64, 32, 16, 256, 512)
"""The sizes of a block, the usual size first; small weights do not tell sizes apart."""
_MODELOPT: Final = frozenset({StorageFormat.MODELOPT_NVFP4, StorageFormat.FP8})
_PRODUCER: Final = {"name": "modelopt", "version": "0.41.0"}


@dataclass(frozen=True)
class _Stored:
    """A quantized module: its format, its role, and its group of compressed-tensors, if any."""

    module: str
    format: StorageFormat
    tensor_role: TensorRole
    tensors: Mapping[str, TensorInfo]
    group: Mapping[str, Any] | None


def declarations(
    checkpoint: Checkpoint, parent: Checkpoint, family: Family
) -> Iterator[dict[str, Any]]:
    """Yield quantization configs that may describe stored tensors, the likeliest first.

    `parent` has the shapes of the weights before quantization. Nothing is yielded if a quantized
    module is in a layout without a config known here, if the family does not know the module, or if
    only some modules of a role have an input scale.
    """
    stored: list[_Stored] = []
    kept: list[tuple[str, int | None, TensorInfo]] = []
    scaled = False
    originals = unstacked(parent, family)
    for module, tensors in by_module(unstacked(checkpoint, family)).items():
        scaled |= not KV_SCALES.isdisjoint(tensors)
        tensor_role = family.classify(f"{module}.weight")
        if not quantized_suffixes(tensors):
            expert = tensor_role.expert if tensor_role else None
            kept += [(module, expert, info) for info in tensors.values()]
        elif tensor_role is None:
            if not KV_SCALES.issuperset(quantized_suffixes(tensors)):
                return
        elif (storage := recognize(tensors, {})) is not None:
            group = _group(storage, tensors, originals.get(f"{module}.weight"))
            stored.append(_Stored(module, storage, tensor_role, tensors, group))
    if not stored or _some_inputs(stored):
        return
    ignore = kept_modules(kept, family, parent.config)
    formats = {each.format for each in stored}
    if all(each.group for each in stored):
        yield from _compressed(stored, ignore, family, scaled=scaled)
    if StorageFormat.MODELOPT_NVFP4 in formats and formats <= _MODELOPT:
        yield _of_modelopt(stored, ignore, family, scaled=scaled)
    if formats <= {StorageFormat.FP8, StorageFormat.FP8_BLOCK}:
        yield _fp8(stored, ignore)


def _some_inputs(stored: Sequence[_Stored]) -> bool:
    """Return whether only some modules of a role have an input scale: one is stray, or lost."""
    having: dict[Role, set[bool]] = {}
    for each in stored:
        name = SUFFIXES[each.format].input if each.format in SUFFIXES else ""
        having.setdefault(each.tensor_role.row.role, set()).add(name in each.tensors)
    return any(len(answers) > 1 for answers in having.values())


def _group(
    storage: StorageFormat, tensors: Mapping[str, TensorInfo], weight: TensorInfo | None
) -> Mapping[str, Any] | None:
    """Return the config group of compressed-tensors for one module; None if there is none."""
    match storage:
        case StorageFormat.NVFP4:
            with_input = SUFFIXES[storage].input in tensors
            return (NVFP4 if with_input else NVFP4A16).config_group
        case StorageFormat.FP8:
            return _fp8_group(tensors)
        case StorageFormat.INT:
            return _integer_group(tensors, weight)
        case _:
            return None


def _fp8_group(tensors: Mapping[str, TensorInfo]) -> Mapping[str, Any] | None:
    codes, scale = tensors.get("weight"), tensors.get("weight_scale")
    if codes is None or scale is None or len(codes.shape) != 2:
        return None
    if codes.dtype == "I8":
        return _INT8 if scale.shape == (codes.shape[0], 1) else None
    inputs: Mapping[str, Any] = FP8_DYNAMIC.config_group["input_activations"]
    if "input_scale" in tensors:
        inputs = _TENSOR
    if scale.elements == 1:
        return {**FP8_DYNAMIC.config_group, "weights": _TENSOR, "input_activations": inputs}
    if scale.shape == (codes.shape[0], 1):
        return {**FP8_DYNAMIC.config_group, "input_activations": inputs}
    blocks = tuple(-(-size // 128) for size in codes.shape)
    return FP8_BLOCK.config_group if scale.shape == blocks else None


def _integer_group(
    tensors: Mapping[str, TensorInfo], weight: TensorInfo | None
) -> Mapping[str, Any] | None:
    codes, scale = tensors.get("weight_packed"), tensors.get("weight_scale")
    if codes is None or scale is None or weight is None:
        return None
    if len(codes.shape) != 2 or len(scale.shape) != 2 or len(weight.shape) != 2:
        return None
    columns, packed, groups = weight.shape[1], codes.shape[1], scale.shape[1]
    if not packed or not groups or _BITS_OF_I32 * packed % columns or columns % groups:
        return None
    args = {
        **W4A16.config_group["weights"],
        "num_bits": _BITS_OF_I32 * packed // columns,
        "symmetric": "weight_zero_point" not in tensors,
        "strategy": "channel" if groups == 1 else "group",
        "group_size": None if groups == 1 else columns // groups,
        "actorder": "group" if "weight_g_idx" in tensors else None,
    }
    return {**W4A16.config_group, "weights": args}


def _compressed(
    stored: Sequence[_Stored], ignore: Sequence[str], family: Family, *, scaled: bool
) -> Iterator[dict[str, Any]]:
    """Yield configs of compressed-tensors: with `Linear` as the only target, and with names."""
    groups: list[Mapping[str, Any]] = []
    for each in stored:
        if each.group and each.group not in groups:
            groups.append(each.group)
    formats = {str(group["format"]) for group in groups}
    used = formats.pop() if len(formats) == 1 else "mixed-precision"
    named = [{**group, "targets": _targets(stored, group, family)} for group in groups]
    for choice in ([{**groups[0], "targets": ["Linear"]}] if len(groups) == 1 else [], named):
        if choice:
            config = declaration(choice, used, ignore)
            yield {**config, "kv_cache_scheme": KV_CACHE if scaled else None}


def _targets(stored: Sequence[_Stored], group: Mapping[str, Any], family: Family) -> list[str]:
    """Return names that only modules of a group have: whole rows of the family, or rows by layer.

    The names are those of the hub, of vLLM and of transformers, as a plan writes them.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for each in stored:
        of_row = groups.setdefault(each.tensor_role.row.name, [])
        if each.group and each.group not in of_row:
            of_row.append(each.group)
    targets: dict[str, None] = {}
    for each in (each for each in stored if each.group == group):
        row = each.tensor_role.row
        if len(groups[row.name]) > 1:
            name = row.name.replace("{layer}", str(each.tensor_role.layer))
            row = row.model_copy(update={"name": name})
        targets |= dict.fromkeys(row.patterns(*family.looked_up_by))
    return list(targets)


def _of_modelopt(
    stored: Sequence[_Stored], ignore: tuple[str, ...], family: Family, *, scaled: bool
) -> dict[str, Any]:
    """Return ModelOpt's config: of one algorithm, or a list of the layers with their algorithms."""
    formats = {each.format for each in stored}
    cache = {"kv_cache_scheme": _KV_CACHE_OF_MODELOPT} if scaled else {}
    if formats == {StorageFormat.MODELOPT_NVFP4}:
        w4a4 = all("input_scale" in each.tensors for each in stored)
        return {**modelopt_config(ignore, w4a4=w4a4), **cache}
    layers: dict[str, dict[str, Any]] = {}
    for each in stored:
        fp8 = each.format is StorageFormat.FP8
        algorithm = {"quant_algo": "FP8"} if fp8 else {"quant_algo": "NVFP4", "group_size": GROUP}
        layers |= {each.module: algorithm, family.in_vllm_name(each.module): algorithm}
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers,
        "ignore": list(ignore),
        "producer": _PRODUCER,
        **cache,
    }


def _fp8(stored: Sequence[_Stored], ignore: Sequence[str]) -> dict[str, Any]:
    """Return the config of the method fp8, as original releases have it."""
    blocks = any(each.format is StorageFormat.FP8_BLOCK for each in stored)
    block = next((size for size in _BLOCKS if all(_in_blocks(s, size) for s in stored)), 128)
    static = not blocks and all("input_scale" in each.tensors for each in stored)
    return {
        "activation_scheme": "static" if static else "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        **({"weight_block_size": [block, block]} if blocks else {}),
        "modules_to_not_convert": list(ignore),
    }


def _in_blocks(stored: _Stored, block: int) -> bool:
    """Return whether a module has a scale for each block of a size, or has no blocks."""
    codes, scale = stored.tensors.get("weight"), stored.tensors.get("weight_scale_inv")
    if codes is None or scale is None:
        return True
    return scale.shape == tuple(-(-size // block) for size in codes.shape)
