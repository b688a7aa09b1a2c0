"""The tensors of a module in integers, packed or an I8 for each weight, with dtypes and shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

Shape = tuple[int, ...]
SCALAR: Final[tuple[Shape, ...]] = ((1,), ())
FLOATS: Final = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor of a quantized module: the dtypes and shapes it may have."""

    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    required: bool = True


def packed_parts(
    rows: int, columns: int, bits: int | None, args: Mapping[str, Any]
) -> dict[str, ExpectedTensor]:
    """Return the tensors of packed integers, by suffix. `args` are those of the config group.

    `bits` is None if the number of codes per integer is unknown.
    """
    size = args.get("group_size")
    if bits is None or not columns:
        # The number of codes per integer is unknown, or the codes are missing.
        scales: tuple[Shape, ...] = ()
        zeros: tuple[Shape, ...] = ()
        packed: tuple[Shape, ...] = ()
    else:
        count = -(-columns // (size if type(size) is int and size > 0 else columns))
        scales = ((rows, count),)
        zeros = ((-(-rows * bits // 32), count), (rows, count))
        packed = ((rows, columns * bits // 32),)
    symmetric = args.get("symmetric") is not False
    return {
        "weight_packed": ExpectedTensor(("I32",), packed),
        "weight_scale": ExpectedTensor(FLOATS, scales),
        "weight_shape": ExpectedTensor(("I64", "I32"), ((2,),)),
        "weight_zero_point": ExpectedTensor((*FLOATS, "I32", "I8"), zeros, not symmetric),
        "weight_g_idx": ExpectedTensor(("I32",), ((columns,),) if packed else (), False),
    }


def byte_parts(rows: int, columns: int, args: Mapping[str, Any]) -> dict[str, ExpectedTensor]:
    """Return the tensors of integers that are stored as an I8 each, by suffix.

    `args` are those of the config group; empty if the groups disagree.
    """
    scales = byte_scales(rows, columns, args)
    symmetric = args.get("symmetric") is not False
    return {
        "weight": ExpectedTensor(("I8",), ((rows, columns),)),
        "weight_scale": ExpectedTensor(FLOATS, scales),
        "weight_zero_point": ExpectedTensor((*FLOATS, "I8"), scales, not symmetric),
        "input_scale": ExpectedTensor(FLOATS, SCALAR, False),
        "input_zero_point": ExpectedTensor((*FLOATS, "I8"), SCALAR, False),
    }


def byte_scales(rows: int, columns: int, args: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Return the shapes that scales of integers [rows, columns] may have; none if unknown."""
    size, block = args.get("group_size"), args.get("block_structure")
    match args.get("strategy"):
        case "tensor":
            return SCALAR
        case "channel":
            return ((rows, 1), (rows,))
        case "group" if type(size) is int and size > 0:
            return ((rows, -(-columns // size)),)
        case "block" if isinstance(block, list) and len(block) == 2:
            high, wide = block
            if type(high) is int and type(wide) is int and high > 0 and wide > 0:
                return ((-(-rows // high), -(-columns // wide)),)
    return ()
