"""The number of a checkpoint's parameters, from headers and config.json alone.

Codes count as the weights that the codes hold. Scales, zero points and orders of columns are no
parameters.
"""

from collections.abc import Mapping
from typing import Any, Final

from mquant.checkpoint import TensorInfo
from mquant.loader_model.modules import FP8_DTYPES, Module, ModuleView
from mquant.loader_model.storage import groups
from mquant.schemes import QUANTIZED_SUFFIXES

_CODES: Final = frozenset({"weight", "weight_packed", "qweight"})
_NO_PARAMETERS: Final = frozenset(suffix[1:] for suffix in QUANTIZED_SUFFIXES) - _CODES | {
    *("weight_g_idx", "input_zero_point", "pre_quant_scale", "output_scale", "activation_scale"),
    *("k_scale", "v_scale", "q_scale", "prob_scale", "kv_scale"),
    # bitsandbytes' tables of a weight
    *("absmax", "nested_absmax", "quant_map", "nested_quant_map", "SCB"),
    *("bitsandbytes__nf4", "bitsandbytes__fp4"),
}


def count_parameters(view: ModuleView) -> int | None:
    """Return the number of parameters; None if config.json does not say how wide codes are."""
    total = 0
    for module in view.modules.values():
        for suffix, info in module.tensors.items():
            count = _count(module, suffix, info, view.config)
            if count is None:
                return None
            total += count
    return total


def _count(module: Module, suffix: str, info: TensorInfo, config: Mapping[str, Any]) -> int | None:
    """Return the number of parameters that one tensor of a module holds."""
    if suffix in _NO_PARAMETERS:
        return 0
    tensors, elements = module.tensors, info.elements
    weight = tensors.get("weight")
    if suffix == "scale" and weight is not None and weight.dtype in ("U8", "I8", *FP8_DTYPES):
        return 0
    # Of all experts, or of one expert if the family is known: gate_up_proj_blocks, blocks.
    if suffix.endswith("scales") and suffix.removesuffix("scales") + "blocks" in tensors:
        return 0
    if suffix.endswith("blocks") and suffix.removesuffix("blocks") + "scales" in tensors:
        return elements * 2  # MXFP4
    if suffix not in _CODES or info.dtype not in ("U8", "I8", "I32", "U32"):
        return elements
    if info.dtype == "U8":
        return elements * 2  # every format in bytes has 4 bits
    if info.dtype == "I8":
        scale = tensors.get("scale") or tensors.get("weight_scale")
        return elements * 2 if scale is not None and scale.dtype == "F8_E8M0" else elements
    bits = _bits(info, tensors.get("weight_scale"), config)
    return elements * 32 // bits if bits else None


def _bits(codes: TensorInfo, scale: TensorInfo | None, config: Mapping[str, Any]) -> int | None:
    """Return the bits of a code in int32 words; None if config.json does not say.

    If groups of several widths may describe the module, its scales decide.
    """
    if codes.name.endswith(".qweight"):
        bits = config.get("bits", config.get("w_bit"))
        return bits if type(bits) is int and bits in range(1, 33) else None
    args = [group.get("weights") for group in groups(config)]
    wide = {
        (bits, each.get("group_size"))
        for each in args
        if isinstance(each, dict) and each.get("type") == "int"
        if type(bits := each.get("num_bits")) is int and bits in range(1, 33)
    }
    if len({bits for bits, _ in wide}) > 1 and scale is not None and codes.shape and scale.shape:
        groups_of_row = scale.shape[-1]
        wide = {
            (bits, size)
            for bits, size in wide
            if type(size) is int and codes.shape[-1] * 32 // bits == groups_of_row * size
        }
    distinct = {bits for bits, _ in wide}
    return distinct.pop() if len(distinct) == 1 else None
