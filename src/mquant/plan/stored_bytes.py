"""How a source stores a weight in integers that are an I8 each (`int-quantized`)."""

from collections.abc import Mapping
from typing import Any, Final

from mquant.checkpoint import TensorInfo
from mquant.findings import Finding
from mquant.loader_model.integer_parts import FLOATS
from mquant.loader_model.modules import quantized_suffixes
from mquant.loader_model.storage import StorageFormat, block_of
from mquant.plan.stored_integers import IntegerGroups
from mquant.plan.stored_parts import PART_MISSING, Stored, broken, misfit

_CODES, _SCALE, _ZEROS, _INPUT = "weight", "weight_scale", "weight_zero_point", "input_scale"
INPUT_ZERO: Final = "input_zero_point"
"""The suffix of the zero point of static activations."""


def stored_bytes(
    module: str, tensors: Mapping[str, TensorInfo], declared: IntegerGroups
) -> Stored | Finding | None:
    """Return how integers in I8 are stored, or a finding if their parts do not fit each other.

    None if config.json declares no integers of 4 or 8 bits, or if other tensors may change what
    codes mean.
    """
    known = {_CODES, _SCALE, _ZEROS, _INPUT}
    if not declared.declared or not {*quantized_suffixes(tensors)} <= known:
        return None
    if _SCALE not in tensors:
        present = ", ".join(sorted(tensors))
        return broken(module, PART_MISSING, f"{module} has no {_SCALE} beside {present}")
    codes, scale, zeros = tensors[_CODES], tensors[_SCALE], tensors.get(_ZEROS)
    if len(codes.shape) != 2 or 0 in codes.shape:
        return misfit(codes, "I8 with two dimensions")
    args = declared.of_bytes(module, codes, scale)
    if args is None or scale.dtype not in FLOATS:
        return misfit(
            scale,
            f"{' or '.join(FLOATS)}, and of the shape that config.json declares for codes "
            f"{list(codes.shape)}",
        )
    symmetric = args.get("symmetric") is not False
    if zeros is None and not symmetric:
        return broken(module, PART_MISSING, f"{module} has no {_ZEROS} beside its codes")
    if zeros is not None and symmetric:
        return misfit(zeros, "left out: config.json says that the integers are symmetric")
    if zeros is not None and (zeros.dtype, zeros.shape) != ("I8", scale.shape):
        return misfit(zeros, f"I8 {list(scale.shape)}")
    return Stored(
        StorageFormat.INT8,
        codes,
        scale,
        _block(codes, args),
        input=tensors.get(_INPUT),
        bits=8,
        zeros=zeros,
    )


def _block(codes: TensorInfo, args: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns that share a scale."""
    rows, columns = codes.shape
    match args.get("strategy"):
        case "tensor":
            return rows, columns
        case "group":
            return 1, args["group_size"]
        case "block":
            return block_of(args.get("block_structure")) or (rows, columns)
    return 1, columns
