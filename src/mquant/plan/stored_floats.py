"""How a source stores a weight in FP4 or FP8: the tensors must define the weight for certain."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from mquant.checkpoint import TensorInfo
from mquant.findings import Finding
from mquant.loader_model.integer_parts import SCALAR
from mquant.loader_model.modules import FP8_DTYPES, quantized_suffixes
from mquant.loader_model.storage import (
    E4M3S,
    E8M0S,
    FP4S,
    GROUP,
    MX_GROUP,
    MXFP4S,
    SUFFIXES,
    StorageFormat,
    block_of,
    groups,
    says_nvfp4,
)
from mquant.plan.stored_parts import PART_MISSING, Stored, broken, misfit

_CODES: Final = {
    **dict.fromkeys(FP4S, ("U8",)),
    StorageFormat.MXFP4_SCALE: ("I8", "U8"),
    **dict.fromkeys(E4M3S, ("F8_E4M3",)),
}
# llmcompressor writes F16 scales for models in F16; nobody writes them under other names. Bytes
# under weight_scale are not taken for E8M0, but in groups of 32 (MXFP8).
_FP8_SCALES: Final = {
    StorageFormat.FP8: ("F32", "BF16", "F16", "F8_E8M0"),
    StorageFormat.FP8_BLOCK: ("F32", "BF16", *E8M0S),
    StorageFormat.FP8_SCALE: ("F32", "BF16", *E8M0S),
    StorageFormat.MXFP8: E8M0S,
}
_E4M3: Final[tuple[str, ...]] = ("F8_E4M3",)
_FP8_METHODS: Final = ("compressed-tensors", "modelopt", "fp8", "fbgemm_fp8")
"""The methods under which `weight_scale` is the factor of FP8 codes."""


def _readable(
    storage: StorageFormat, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> bool:
    """Return whether tensors and config.json define a module's weight for certain.

    This check is stricter than `verify`, which must report on any module: config.json has to
    declare what the tensors leave open, and a module with other quantized tensors is not readable,
    because these tensors may change what codes mean.
    """
    method = config.get("quant_method")
    match storage:
        case StorageFormat.FP8_BLOCK | StorageFormat.FP8_SCALE:
            block = block_of(config.get("weight_block_size")) or _simple(storage, tensors)
            certain = method == "mxfp8" or (method == "fp8" and block is not None)
        case StorageFormat.FP8:
            codes = "weight" in tensors and tensors["weight"].dtype in FP8_DTYPES
            certain = codes and (method in _FP8_METHODS or config.get("quant_algo") == "FP8")
        case StorageFormat.NVFP4:
            certain = says_nvfp4(tensors, config)
        case _:
            certain = True
    return certain and {*quantized_suffixes(tensors)} <= {
        *SUFFIXES[storage],
        "weight",
        "activation_scale",
    }


def stored_floats(
    storage: StorageFormat,
    module: str,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
) -> Stored | Finding | None:
    """Return how a module's weight is stored, or a finding if its parts do not fit each other.

    None if tensors and config.json do not define the weight for certain.
    """
    if not _readable(storage, tensors, config):
        return None
    suffix, scale_suffix, second_suffix, input_suffix = SUFFIXES[storage]
    for needed in filter(None, (suffix, scale_suffix, second_suffix)):
        if needed not in tensors:
            present = ", ".join(sorted(tensors))
            return broken(module, PART_MISSING, f"{module} has no {needed} beside {present}")
    codes, scale, second = tensors[suffix], tensors[scale_suffix], tensors.get(second_suffix)
    inputs = tensors.get(input_suffix) or tensors.get("activation_scale")
    if codes.dtype not in _CODES[storage] or len(codes.shape) != 2 or 0 in codes.shape:
        return misfit(codes, f"{_either(_CODES[storage])} with two dimensions")
    if (codes.held is None) is not (scale.held is None):
        return misfit(scale, "stored as its codes: both in a tensor of all experts, or neither")
    if storage in FP4S:
        group, dtypes = (MX_GROUP, E8M0S) if storage in MXFP4S else (GROUP, _E4M3)
        expected = (codes.shape[0], codes.shape[1] * 2 // group)
        if codes.shape[1] * 2 % group or scale.dtype not in dtypes or scale.shape != expected:
            fit = f"{_either(dtypes)} {list(expected)} for codes {list(codes.shape)}"
            return misfit(scale, fit)
        for scalar in filter(None, (second, inputs)):
            if scalar.dtype != "F32" or scalar.shape not in SCALAR:
                return misfit(scalar, "F32 [1]")
        return Stored(storage, codes, scale, (1, group), second, inputs)
    block = _fp8_block(storage, codes, scale, config)
    if block is None or scale.dtype not in _FP8_SCALES[storage]:
        kinds = _either(_FP8_SCALES[storage])
        return misfit(scale, f"{kinds}, one for each block of {list(codes.shape)}")
    stored = Stored(storage, codes, scale, block, None, inputs)
    if not stored.fits_whole and codes.held and scale.held:
        wanted = f"one for each block {list(block)} of each weight in {codes.held.by.name}"
        return misfit(scale.held.by, f"{wanted}, {list(codes.held.by.shape)}")
    return stored


def _simple(storage: StorageFormat, tensors: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """Return the block of FP8 codes with a scale for the weight or for each row; else None."""
    codes, scale = (tensors.get(suffix) for suffix in SUFFIXES[storage][:2])
    if codes is None or scale is None or len(codes.shape) != 2:
        return None
    rows, columns = codes.shape
    by_shape = {**dict.fromkeys(SCALAR, (rows, columns)), (rows, 1): (1, columns)}
    return by_shape.get(scale.shape)


def _fp8_block(
    storage: StorageFormat, codes: TensorInfo, scale: TensorInfo, config: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Return the block of FP8 codes that shares a scale; None if no block fits the scales."""
    rows, columns = codes.shape
    suffixes = SUFFIXES[storage]
    simple = _simple(storage, {suffixes.codes: codes, suffixes.scale: scale})
    blocks: Iterable[tuple[int, int] | None]
    if storage is StorageFormat.MXFP8 or config.get("quant_method") == "mxfp8":
        blocks = [(1, MX_GROUP)]
    elif storage is StorageFormat.FP8:
        weights = (group.get("weights") for group in groups(config))
        blocks = [simple, *(_declared_block(args) for args in weights if isinstance(args, dict))]
    else:
        blocks = [block_of(config.get("weight_block_size")) or simple]
    for block in filter(None, blocks):
        if block == simple or scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
            return block
    return None


def _declared_block(args: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, as a config group declares them."""
    size = args.get("group_size")
    if args.get("strategy") == "group" and type(size) is int and size > 0:
        return 1, size
    return block_of(args.get("block_structure"))


def _either(dtypes: Iterable[str]) -> str:
    return " or ".join(dtypes)
