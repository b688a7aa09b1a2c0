"""How synthetic checkpoints store weights: the tensors of each weight.

Each format is that of a release: its names, dtypes and shapes.
The values are made up: codes and scales of normally distributed weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cache
from statistics import NormalDist
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np

from mquant.dtypes import nbytes
from mquant.errors import UsageError
from mquant.family import Family
from mquant.family_rows import Role, TensorRow
from mquant.loader_model.stacks import CODED
from mquant.loader_model.storage import MX_GROUP

Shape = tuple[int, ...]
Array = np.ndarray[Any, np.dtype[Any]]
Kind = Literal["numbers", "fp4 pairs", "exponents", "int4 pairs", "int8", "shape", "zeros"]

STD: Final = 0.02
FP8_BLOCK: Final = 128
# The largest number, 4.33 deviations out, is then near 448, the largest E4M3 number.
_FP8_STD: Final = 100.0
# Deviations of the codes under scales for groups of 32: the largest of a group is near the largest
# code. The scales are those that make the weights' deviation STD.
_FP4_STD, _INT4_STD, _INT8_STD = 2.56, 2.6, 40.0
_FP4_EXPONENT, _FP8_EXPONENT = 120.0, 115.0
_LINEAR: Final = (Role.EXPERT, Role.SHARED_EXPERT, Role.MLP, Role.ATTENTION)


class Precision(StrEnum):
    """The dtype or format of the weights. Tensors that the family stores in F32 stay F32.

    The formats are those of releases: FP8_TENSOR of Mistral, MXFP4 of Kimi-K3, MXFP4_BLOCKS of
    gpt-oss, MXFP4_FP8 of DeepSeek-V4, MXFP8 of MiniMax-M3, INT4 of Kimi-K2.5, FP8_STACKS of
    Qwen3-VL. INT8 is compressed-tensors' `pack-quantized`, INT8_CHANNEL its `int-quantized`.
    """

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    FP8_BLOCK = "fp8-block"
    FP8_CHANNEL = "fp8-channel"
    FP8_TENSOR = "fp8-tensor"
    MXFP8 = "mxfp8"
    MXFP4 = "mxfp4"
    MXFP4_BLOCKS = "mxfp4-blocks"
    MXFP4_FP8 = "mxfp4-fp8"
    INT4 = "int4"
    INT8 = "int8"
    INT8_CHANNEL = "int8-channel"
    FP8_STACKS = "fp8-stacks"


PLAIN: Final = (Precision.BF16, Precision.FP16, Precision.FP32)
STACKED: Final = (*PLAIN, Precision.MXFP4_BLOCKS, Precision.FP8_STACKS)
"""The precisions in which releases have one tensor for all experts, if the family has stacks."""
SCALES_OF_STACKS: Final = "_scale_inv"
"""The end of the name of a tensor with the scales of FP8_STACKS."""


@dataclass(frozen=True, slots=True)
class SynthTensor:
    """One tensor of a synthetic checkpoint.

    `kind` says what its bytes are: numbers of its dtype, or codes. `mean` and `std` are those of
    the numbers, of the codes, or of the exponents; of a `shape`, [mean, std].
    """

    name: str
    dtype: str
    shape: Shape
    mean: float
    std: float
    kind: Kind = "numbers"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of a stored weight [out, in]."""

    suffix: str
    dtype: str
    shape: Callable[[int, int], Shape]
    mean: float = 0.0
    std: float = 1.0
    kind: Kind = "numbers"


def _per(high: int, wide: int) -> Callable[[int, int], Shape]:
    return lambda rows, columns: (-(-rows // high), -(-columns // wide))


_GROUPS: Final = _per(1, MX_GROUP)


def _one(*_: int) -> Shape:
    return ()


def _each_row(rows: int, _columns: int) -> Shape:
    return (rows, 1)


def _mxfp4(codes: str, scale: str, codes_dtype: str, scale_dtype: str) -> tuple[_Part, ...]:
    return (
        _Part(codes, codes_dtype, _per(1, 2), 0.0, _FP4_STD, "fp4 pairs"),
        _Part(scale, scale_dtype, _GROUPS, _FP4_EXPONENT, 0.5, "exponents"),
    )


def _fp8(
    suffix: str, dtype: str, shape: Callable[[int, int], Shape], *more: _Part
) -> tuple[_Part, ...]:
    scale = _Part(suffix, dtype, shape, STD / _FP8_STD, STD / _FP8_STD / 20)
    if dtype in ("U8", "F8_E8M0"):
        scale = _Part(suffix, dtype, shape, _FP8_EXPONENT, 0.5, "exponents")
    return (_Part("weight", "F8_E4M3", _per(1, 1), 0.0, _FP8_STD), scale, *more)


def _packed(bits: int, std: float) -> tuple[_Part, ...]:
    kind: Kind = "int4 pairs" if bits == 4 else "int8"
    return (
        _Part("weight_packed", "I32", _per(1, 32 // bits), 0.0, std, kind),
        _Part("weight_scale", "BF16", _GROUPS, STD / std, STD / std / 20),
        _Part("weight_shape", "I64", lambda *_: (2,), kind="shape"),
    )


_ACTIVATIONS: Final = _Part("activation_scale", "F32", _one, 0.05, 1e-12)
"""So small a deviation that F32 has one number for all: modules that share their inputs share the
scale of the inputs."""
_FP8_BLOCKS: Final = _fp8("weight_scale_inv", "F32", _per(FP8_BLOCK, FP8_BLOCK))
_STORED: Final[dict[Precision, tuple[_Part, ...]]] = {
    Precision.FP8_BLOCK: _FP8_BLOCKS,
    Precision.FP8_STACKS: _FP8_BLOCKS,
    Precision.FP8_CHANNEL: _fp8("weight_scale", "BF16", _each_row),
    Precision.FP8_TENSOR: _fp8("weight_scale_inv", "BF16", _one, _ACTIVATIONS),
    Precision.MXFP8: _fp8("weight_scale", "U8", _GROUPS),
    Precision.MXFP4: _mxfp4("weight_packed", "weight_scale", "U8", "U8"),
    Precision.MXFP4_FP8: _fp8("scale", "F8_E8M0", _per(FP8_BLOCK, FP8_BLOCK)),
    Precision.INT4: _packed(4, _INT4_STD),
    Precision.INT8: _packed(8, _INT8_STD),
    Precision.INT8_CHANNEL: (
        _Part("weight", "I8", _per(1, 1), 0.0, _INT8_STD, "int8"),
        _Part("weight_scale", "BF16", _each_row, STD / _INT8_STD, STD / _INT8_STD / 20),
    ),
}
_OF_EXPERTS: Final = {
    Precision.MXFP4_FP8: _mxfp4("weight", "scale", "I8", "F8_E8M0"),
}
"""How experts are stored, if otherwise than other weights."""
_EXPERTS_ONLY: Final = (Precision.MXFP4, Precision.MXFP4_BLOCKS, Precision.INT4)


def quantized_roles(precision: Precision, family: Family) -> tuple[Role, ...]:
    """Return the roles that releases quantize: linear layers but routers, or experts alone."""
    experts = any(row.role is Role.EXPERT for row in family.tensors)
    return (Role.EXPERT,) if precision in _EXPERTS_ONLY and experts else _LINEAR


def is_quantized(precision: Precision, family: Family, row: TensorRow) -> bool:
    """Return whether the family's releases in a format quantize a row's weight."""
    released = family.synth.formats.get(precision)
    also = any(fnmatchcase(row.name, each) for each in released.also) if released else False
    return also or row.role in quantized_roles(precision, family)


def stored_weight(
    precision: Precision, family: Family, row: TensorRow, module: str, shape: tuple[int, int]
) -> Iterator[SynthTensor]:
    """Yield the tensors that store a weight [out, in]. Each has a seed of its own: its name.

    Raises UsageError if groups do not divide the columns.
    """
    parts = _STORED[precision]
    if row.role is Role.EXPERT:
        parts = _OF_EXPERTS.get(precision, parts)
    released = family.synth.formats.get(precision)
    if released and released.scale:
        parts = (parts[0], replace(parts[1], suffix=released.scale), *parts[2:])
    if any(part.shape is _GROUPS for part in parts):
        check_groups(module, shape[1])
    for part in parts:
        mean, std = shape if part.kind == "shape" else (part.mean, part.std)
        name = f"{module}.{part.suffix}"
        yield SynthTensor(name, part.dtype, part.shape(*shape), mean, std, part.kind)


def check_groups(module: str, columns: int) -> None:
    """Raise UsageError if groups of 32 do not divide the columns of a weight."""
    if columns % MX_GROUP:
        raise UsageError(
            f"{module} has {columns} columns, which do not divide into groups of {MX_GROUP}.",
            f"Take multiples of {MX_GROUP}: --hidden, --intermediate.",
        )


def in_blocks(tensor: SynthTensor, name: str, experts: int, rows: int) -> Iterator[SynthTensor]:
    """Yield blocks and scales of a stack of MXFP4 weights; `tensor` is one of the weights."""
    groups = tensor.shape[1] // MX_GROUP
    codes, scale = _mxfp4(*CODED, "U8", "U8")
    for part, shape in ((codes, (rows, groups, MX_GROUP // 2)), (scale, (rows, groups))):
        own = f"{name}_{part.suffix}"
        yield SynthTensor(own, part.dtype, (experts, *shape), part.mean, part.std, part.kind)


_NUMPY: Final = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


@cache
def value_table(dtype: str, mean: float, std: float, kind: Kind) -> Array:
    """Return 65,536 equally likely values of a tensor, as bits: of one element, or of one byte."""
    if kind in ("shape", "zeros"):
        return np.array([mean, std], "<i8")
    if kind in ("fp4 pairs", "int4 pairs"):
        codes = _nibbles(kind, NormalDist(mean, std))
        pairs: Array = (codes[None, :] | codes[:, None] << 4).astype(np.uint8).reshape(-1)
        return pairs
    values = np.array(_quantiles(NormalDist(mean, std), 65536), np.float32)
    if kind == "exponents":
        return np.clip(np.rint(values), 0, 254).astype(np.uint8)
    if kind == "int8":
        codes = np.clip(np.rint(values), -128, 127).astype(np.int8).view(np.uint8)
        return codes if dtype == "I8" else codes ^ np.uint8(128)
    return values.astype(_NUMPY[dtype]).view(f"u{nbytes(dtype, (1,))}")


def _nibbles(kind: Kind, normal: NormalDist) -> Array:
    """Return 256 equally likely codes of 4 bits."""
    values = np.array(_quantiles(normal, 256), np.float32)
    if kind == "fp4 pairs":
        return values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & np.uint8(15)
    return (np.clip(np.rint(values), -8, 7) + 8).astype(np.uint8)


def _quantiles(normal: NormalDist, count: int) -> list[float]:
    return [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
