"""Read rows of a module's weight as numbers, and bound how far rounding may move the numbers.

The bounds. Rounding to nearest in NVFP4 moves an element by half a step at most: by the block's
scale s in the widest gap of E2M1 (4 to 6). s is amax / 6 rounded to E4M3, by 1/16 at most: the
bound is amax / 6 * 17/16. Tools that search for better scales go up to 2 s (half a step is then
amax / 3) and down to 0.65 s (which clips 0.35 amax: recipe nvfp4-opt's limit, beyond which no scale
has a block's smallest squared error). So no choice of scale moves an element further than
amax / 3 * 17/16 from the parent's. The scales of blocks far below the tensor's amax are below the
smallest E4M3 scale, 2**-9, or below half of it and become zero: this adds 6 * 2**-9 / global scale.

MXFP4 has scales of powers of two, of which amax / 6 needs two thirds to four thirds: the bound is
NVFP4's, without that of small scales.

FP8 moves an element by 1/16 of itself (3 bits of mantissa), or by half of the smallest step, 2**-9
of the scale; integers of b bits by amax / (2**b - 1). The bounds are twice as large, for searched
scales, and FP8's bound has 2**-8 of the scale in addition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from mquant.checkpoint import TensorInfo
from mquant.checkpoint.slices import read_bytes
from mquant.errors import SourceError
from mquant.loader_model.modules import Module, ModuleView
from mquant.loader_model.storage import (
    E4M3S,
    E8M0S,
    GROUP,
    INTEGERS,
    MX_GROUP,
    MXFP4S,
    SUFFIXES,
    StorageFormat,
    block_of,
    format_of,
    fp8_block,
    integer_bits,
    parts,
    weight_args,
    weight_shape,
)
from mquant.weights.decode import READABLE, Floats, e2m1, e4m3, floats, integers, scaled

Groups = npt.NDArray[np.int32]
SEARCHED: Final = 17 / 16 / 3
TYPICAL: Final[dict[StorageFormat | None, float]] = {
    StorageFormat.NVFP4: 0.25,
    StorageFormat.MODELOPT_NVFP4: 0.25,
    **dict.fromkeys(INTEGERS, 0.25),
    StorageFormat.FP8_BLOCK: 0.08,
    StorageFormat.FP8: 0.08,
    StorageFormat.FP8_SCALE: 0.08,
    StorageFormat.MXFP8: 0.08,
    **dict.fromkeys(MXFP4S, 0.25),
    None: 0.01,
}
"""The relative L2 error that no rounding of a whole weight reaches; NVFP4's error is about 0.1."""


@dataclass(frozen=True)
class Rows:
    """Values [rows, columns] of a weight, and the bound on their distance to the parent's."""

    values: Floats
    allowed: Callable[[Floats], Floats]
    """The function from the parent's values of the same rows to the bound."""


@dataclass(frozen=True)
class StoredWeight:
    """A module's weight that can be read by rows."""

    view: ModuleView
    module: Module
    format: StorageFormat | None
    shape: tuple[int, int]

    def rows(self, first: int, last: int) -> Rows:
        """Read rows [first, last)."""
        read_rows = {
            StorageFormat.NVFP4: self._nvfp4,
            StorageFormat.MODELOPT_NVFP4: self._nvfp4,
            **dict.fromkeys(MXFP4S, self._mxfp4),
            **dict.fromkeys(E4M3S, self._fp8),
            StorageFormat.INT: self._integers,
            StorageFormat.INT8: self._int8,
        }
        if self.format is None:
            values = self._part("weight", first, last)
            # Only for a quantized parent: tensors that are plain in both are compared bit by bit.
            return Rows(values, lambda parent: np.abs(parent) * np.float32(1 / 128))
        return read_rows[self.format](first, last)

    def _raw(self, suffix: str, first: int, last: int) -> tuple[TensorInfo, bytes]:
        info = self.module.tensors[suffix]
        row = info.nbytes // info.shape[0]
        return info, read(self.view, info, first * row, last * row)

    def _part(self, suffix: str, first: int, last: int) -> Floats:
        info, raw = self._raw(suffix, first, last)
        return floats(raw, info.dtype).reshape(last - first, -1)

    def _scales(self, suffix: str, first: int, last: int) -> Floats:
        info, raw = self._raw(suffix, first, last)
        return floats(raw, scale_dtype(info)).reshape(last - first, -1)

    def _scalar(self, suffix: str) -> float:
        info = self.module.tensors[suffix]
        return float(floats(read(self.view, info), scale_dtype(info))[0])

    def _nvfp4(self, first: int, last: int) -> Rows:
        suffixes = SUFFIXES[self.format or StorageFormat.NVFP4]
        factor = self._scalar(suffixes.second)
        if self.format is StorageFormat.NVFP4:
            # The reciprocal of zero is infinity, which is out of every bound.
            factor = float(np.float64(1) / np.float64(factor))
        _, raw = self._raw(suffixes.codes, first, last)
        codes = e2m1(np.frombuffer(raw, np.uint8).reshape(last - first, -1))
        scales = self._part("weight_scale", first, last)
        values = scaled(codes, scales, (1, GROUP)) * np.float32(factor)
        floor = 6 * 2.0**-9 * factor
        return Rows(values, lambda parent: _amax(parent, GROUP) * SEARCHED + np.float32(floor))

    def _mxfp4(self, first: int, last: int) -> Rows:
        suffixes = SUFFIXES[self.format or StorageFormat.MXFP4]
        _, raw = self._raw(suffixes.codes, first, last)
        codes = e2m1(np.frombuffer(raw, np.uint8).reshape(last - first, -1))
        values = scaled(codes, self._scales(suffixes.scale, first, last), (1, MX_GROUP))
        return Rows(values, lambda parent: _amax(parent, MX_GROUP) * np.float32(SEARCHED))

    def _fp8(self, first: int, last: int) -> Rows:
        _, raw = self._raw("weight", first, last)
        codes = e4m3(np.frombuffer(raw, np.uint8).reshape(last - first, -1))
        scales = self._fp8_scales(first, last)
        floor: Floats = np.abs(scales) * np.float32(1 / 256)
        return Rows(codes * scales, lambda parent: np.abs(parent) * np.float32(1 / 8) + floor)

    def _int8(self, first: int, last: int) -> Rows:
        codes = self._part("weight", first, last)
        scales = self._of_blocks("weight_scale", first, last)
        if "weight_zero_point" in self.module.tensors:
            codes = codes - self._of_blocks("weight_zero_point", first, last)
        # Of 4 bits or 8, rounded to nearest: half a step, and twice that for searched scales.
        step: Floats = np.abs(scales)
        return Rows(codes * scales, lambda _: step)

    def _fp8_scales(self, first: int, last: int) -> Floats:
        return self._of_blocks(SUFFIXES[self.format or StorageFormat.FP8].scale, first, last)

    def _of_blocks(self, suffix: str, first: int, last: int) -> Floats:
        """Return scales, or zero points, of rows: one for the weight, each row, or each block."""
        info = self.module.tensors[suffix]
        if info.elements == 1:
            return np.full((1, 1), self._scalar(suffix), np.float32)
        if info.shape in ((self.shape[0],), (self.shape[0], 1)):
            return self._scales(suffix, first, last)
        high, wide = byte_block(self.format, self.shape, self.view)
        table = self._scales(suffix, first // high, -(-last // high))
        # The block size is config.json's; the lookup gives a result of the size of the rows.
        rows = np.arange(first, last) // high - first // high
        columns = np.arange(self.shape[1]) // wide
        return table[rows[:, None], columns]

    def _integers(self, first: int, last: int) -> Rows:
        _, raw = self._raw("weight_packed", first, last)
        bits = integer_bits(self.module, self.view) or 4
        codes = integers(np.frombuffer(raw, "<i4").reshape(last - first, -1), bits)
        scales = self._part("weight_scale", first, last)
        group = -(-codes.shape[1] // scales.shape[1])
        step = np.float32(2 / (2**bits - 1))
        order = self._order(scales.shape[1])
        if "weight_zero_point" in self.module.tensors:
            zeros = self._zero_points(first, last, bits)
            wide = np.arange(codes.shape[1]) // group if order is None else order
            codes -= zeros[:, wide]
        if order is None:
            values = scaled(codes, scales, (1, group))
            return Rows(values, lambda parent: _amax(parent, group) * step)
        return Rows(codes * scales[:, order], lambda parent: _amax_of_groups(parent, order) * step)

    def _order(self, groups: int) -> Groups | None:
        """Return the group of each column; None if they follow each other, for which -1 stands."""
        info = self.module.tensors.get("weight_g_idx")
        if info is None:
            return None
        order = np.frombuffer(read(self.view, info), "<i4")
        if (order < 0).any():
            return None
        if order.max() >= groups:
            raise SourceError(
                f"{info.name} holds {order.max()}, but there are {groups} groups.",
                "Get the checkpoint again.",
            )
        return order

    def _zero_points(self, first: int, last: int, bits: int) -> Floats:
        """Return the zero points of rows; packed ones have several rows in an int32."""
        info = self.module.tensors["weight_zero_point"]
        if info.dtype == "I8":
            return self._part("weight_zero_point", first, last)
        per = 32 // bits
        width = info.nbytes // info.shape[0]
        raw = read(self.view, info, first // per * width, -(-last // per) * width)
        packed = np.ascontiguousarray(np.frombuffer(raw, "<i4").reshape(-1, info.shape[1]).T)
        start = first - first // per * per
        return integers(packed, bits).T[start : start + last - first]


def weight_of(view: ModuleView, module: Module) -> StoredWeight | None:
    """Return the weight of a module; None if the weight cannot be read by rows.

    Vectors, layouts that are not `decodable`, and parts whose shapes contradict each other cannot
    be read; structure rules report such parts.
    """
    kind = format_of(view, module)
    if kind is None:
        info = module.tensors.get("weight")
        if info is None or len(info.shape) != 2 or info.dtype not in READABLE:
            return None
        return StoredWeight(view, module, None, (info.shape[0], info.shape[1]))
    shape = weight_shape(kind, module, view)
    if shape is None or 0 in shape or not decodable(kind, module, view):
        return None
    for suffix, part in parts(kind, shape, module, view).items():
        info = module.tensors.get(suffix)
        if info is None and part.required:
            return None
        if info and (
            info.dtype not in part.dtypes or (part.shapes and info.shape not in part.shapes)
        ):
            return None
    return StoredWeight(view, module, kind, shape)


def scale_dtype(info: TensorInfo) -> str:
    """Return the dtype by which a tensor of scales is decoded: bytes are E8M0."""
    return "F8_E8M0" if info.dtype in E8M0S else info.dtype


def byte_block(
    kind: StorageFormat | None, shape: tuple[int, int], view: ModuleView
) -> tuple[int, int]:
    """Return the rows and columns that share a scale, in a format with a byte for each code."""
    if kind is not StorageFormat.INT8:
        return (1, MX_GROUP) if kind is StorageFormat.MXFP8 else fp8_block(view)
    args = weight_args(kind, view)
    size, block = args.get("group_size"), block_of(args.get("block_structure"))
    if args.get("strategy") == "group" and type(size) is int:
        return 1, size
    return block or shape


def decodable(kind: StorageFormat | None, module: Module, view: ModuleView) -> bool:
    """Return whether the module's layout and parts can be decoded."""
    if kind is StorageFormat.INT:
        bits, codes = integer_bits(module, view), module.tensors.get("weight_packed")
        zeros = module.tensors.get("weight_zero_point")
        if bits not in (4, 8) or codes is None or zeros is None:
            return bits in (4, 8)
        rows = {"I32": -(-codes.shape[0] * bits // 32), "I8": codes.shape[0]}
        return len(zeros.shape) == 2 and zeros.shape[0] == rows.get(zeros.dtype)
    if kind is StorageFormat.INT8:
        return bool(weight_args(kind, view).get("strategy"))
    if kind in E4M3S:
        return "weight" not in module.tensors or module.tensors["weight"].dtype == "F8_E4M3"
    return kind is not StorageFormat.OTHER


def _amax_of_groups(values: Floats, order: Groups) -> Floats:
    """Return, for every element, the largest magnitude of its group; `order` has the groups."""
    columns = np.argsort(order, kind="stable")
    _, starts, place = np.unique(order[columns], return_index=True, return_inverse=True)
    largest = np.maximum.reduceat(np.abs(values)[:, columns], starts, axis=1)
    return largest[:, place[np.argsort(columns)]]


def _amax(values: Floats, group: int) -> Floats:
    """Return, for every element, the largest magnitude of its group along the row."""
    rows, columns = values.shape
    padded = np.zeros((rows, -(-columns // group) * group), np.float32)
    padded[:, :columns] = np.abs(values)
    largest = padded.reshape(rows, -1, group).max(axis=2)
    return np.repeat(largest, group, axis=1)[:, :columns]


def read(view: ModuleView, info: TensorInfo, start: int = 0, end: int | None = None) -> bytes:
    """Read bytes [start, end) of a tensor's data."""
    return read_bytes(view.checkpoint.source, info, start, end)
