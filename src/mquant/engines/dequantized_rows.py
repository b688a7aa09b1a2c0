"""Rows, in BF16, of weights that the source stores quantized.

The scales of FP8 and the global scale of NVFP4 are read when a work unit begins. Codes, and the
scales of FP4's blocks, are read with their rows. `numerics.dequantize` decodes the rows, never
`weights.decode`, with which `verify` judges the result.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, Protocol

import numpy as np

from mquant.checkpoint import TensorInfo
from mquant.checkpoint.slices import read_part, read_whole
from mquant.errors import SourceError
from mquant.loader_model.storage import E8M0S, FP4S, GROUP, MX_GROUP, MXFP4S, StorageFormat
from mquant.numerics.dequantize import (
    decode_fp4,
    decode_fp8,
    decode_integers,
    mxfp4_table,
    nvfp4_table,
)
from mquant.numerics.floats import BF16, E8M0, E8M0_NAN, FLOATS, Array, Bytes, Words
from mquant.plan import Action, Stored


class Source(Protocol):
    """The source of bytes."""

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on."""


class Rows(Protocol):
    """A stored weight that can be read by rows."""

    def read(self, first: int, last: int, words: Words) -> None:
        """Fill `words`, uint16 [rows * columns], with rows [first, last)."""


def open_rows(source: Source, stored: Stored, columns: int, scratch: Bytes) -> Rows:
    """Open a weight of `columns` columns.

    `scratch` must be large enough for the codes (and scales of FP4's blocks) of the rows of one
    read.

    Raises SourceError, as reading rows does, if the source cannot be read, or an E8M0 scale is NaN.
    """
    if stored.format in FP4S:
        return _FP4(source, stored, columns, scratch)
    if stored.format is StorageFormat.INT:
        return _Integers(source, stored, columns, scratch)
    if stored.format is StorageFormat.INT8:
        return _Int8(source, stored, columns, scratch)
    return _FP8(source, stored, columns, scratch)


def decoded(
    source: Source, action: Action, weight: Bytes, scratch: Bytes, piece: int, *, again: bool
) -> Iterator[Bytes]:
    """Yield a weight that is stored quantized, in BF16, in pieces of at most `piece` bytes of rows.

    `again`: every piece is written to the front of `weight`, over the previous piece. `weight` has
    room for all pieces, or for one; a piece has at least one row. Of weights of all experts in one
    tensor, [experts, columns, rows], a piece is one expert; `weight` then has room for an expert,
    and a piece.
    """
    if action.stored is None:
        raise TypeError(f"{action.source.name} is not stored quantized")
    if len(action.source.shape) == 3:
        yield from _experts(source, action.source, action.stored, weight, scratch, piece)
        return
    rows, columns = action.source.shape
    stored, width = open_rows(source, action.stored, columns, scratch), columns * _WIDTH
    at_once = max(1, piece // width)
    for first in range(0, rows, at_once):
        last = min(first + at_once, rows)
        place = 0 if again else first * width
        part = weight[place : place + (last - first) * width]
        stored.read(first, last, part.view(BF16.word))
        yield part


def room(action: Action, piece: int) -> int:
    """Return the bytes of `weight` that `decoded` needs to yield one piece at a time."""
    if len(action.source.shape) == 3:
        _, columns, rows = action.source.shape
        return rows * columns * _WIDTH + max(piece, columns * _WIDTH)
    return max(piece, action.source.shape[1] * _WIDTH)


def _experts(
    source: Source, info: TensorInfo, stored: Stored, weight: Bytes, scratch: Bytes, piece: int
) -> Iterator[Bytes]:
    if stored.format is not StorageFormat.MXFP4_BLOCKS:
        yield from _experts_as_stored(source, info, stored, weight, scratch, piece)
        return
    experts, columns, rows = info.shape
    size = rows * columns * _WIDTH
    whole = weight[:size]
    turned, rest = whole.view(BF16.word).reshape(columns, rows), weight[size:]
    at_once = max(1, piece // (columns * _WIDTH))
    for expert in range(experts):
        own = open_rows(source, _of_expert(stored, expert), columns, scratch)
        for first in range(0, rows, at_once):
            last = min(first + at_once, rows)
            words = rest[: (last - first) * columns * _WIDTH].view(BF16.word)
            own.read(first, last, words)
            turned[:, first:last] = words.reshape(last - first, columns).T
        yield whole


def _experts_as_stored(
    source: Source, info: TensorInfo, stored: Stored, weight: Bytes, scratch: Bytes, piece: int
) -> Iterator[Bytes]:
    experts, rows, columns = info.shape
    width = columns * _WIDTH
    at_once = max(1, piece // width)
    for expert in range(experts):
        own = open_rows(source, _of_expert(stored, expert), columns, scratch)
        for first in range(0, rows, at_once):
            last = min(first + at_once, rows)
            words = weight[first * width : last * width].view(BF16.word)
            own.read(first, last, words)
        yield weight[: rows * width]


def _of_expert(stored: Stored, expert: int) -> Stored:
    def part(info: TensorInfo) -> TensorInfo:
        size = info.nbytes // info.shape[0]
        start = info.start + expert * size
        return replace(info, shape=info.shape[1:], start=start, end=start + size)

    scale = stored.scale if stored.scale.elements == 1 else part(stored.scale)
    return replace(stored, codes=part(stored.codes), scale=scale)


_SIZES: Final = {"I64": "<i8", "I32": "<i4"}
_WIDTH: Final = BF16.word.itemsize


class _FP8:
    def __init__(self, source: Source, stored: Stored, columns: int, scratch: Bytes) -> None:
        self._source, self._stored, self._columns = source, stored, columns
        self._scratch = scratch
        self._scales = _scales(source, stored, columns)

    def read(self, first: int, last: int, words: Words) -> None:
        high = self._stored.block[0]
        codes = self._scratch[: (last - first) * self._columns]
        read_part(self._source, self._stored.codes, first * self._columns, codes.data)
        scales = self._scales[first // high : -(-last // high)]
        codes = codes.reshape(last - first, self._columns)
        decode_fp8(codes, scales, self._stored.block, first % high, words)


class _FP4:
    def __init__(self, source: Source, stored: Stored, columns: int, scratch: Bytes) -> None:
        self._source, self._stored, self._scratch = source, stored, scratch
        self._mx = stored.format in MXFP4S
        self._group = MX_GROUP if self._mx else GROUP
        self._packed, self._groups = columns // 2, columns // self._group
        if self._mx:
            self._table = mxfp4_table()
            return
        if stored.second is None:
            raise TypeError(f"{stored.codes.name} has no second scale")
        second = float(_read(source, stored.second).reshape(-1)[0])
        if not 0 < second < np.inf:
            raise SourceError(
                f"{stored.second.name} is {second:g}, and must be a number above zero.",
                "Get the checkpoint again.",
            )
        self._table = nvfp4_table(second, divide=stored.format is StorageFormat.NVFP4)

    def read(self, first: int, last: int, words: Words) -> None:
        rows = last - first
        packed = self._scratch[: rows * self._packed]
        scales = self._scratch[len(packed) : len(packed) + rows * self._groups]
        for info, part, width in (
            (self._stored.codes, packed, self._packed),
            (self._stored.scale, scales, self._groups),
        ):
            read_part(self._source, info, first * width, part.data)
        if self._mx:
            _refuse_nan(self._stored.scale, scales)
        decode_fp4(packed, scales, self._table, words, self._group)


class _Integers:
    def __init__(self, source: Source, stored: Stored, columns: int, scratch: Bytes) -> None:
        self._source, self._stored, self._scratch = source, stored, scratch
        self._packed, self._wide = columns * stored.bits // 8, stored.block[1]
        self._groups: Array | None = None
        if stored.size is not None:
            wrong = wrong_size(stored, _bytes(source, stored.size))
            if wrong:
                raise SourceError(f"{wrong}.", "Get the checkpoint again.")
        rows, scales = stored.codes.shape[0], stored.scale.shape[1]
        self._zeros = np.zeros((rows, scales), np.int8)
        if stored.zeros is not None:
            raw = _bytes(source, stored.zeros)
            self._zeros = _zero_points(raw, stored.zeros, stored.bits, rows)
        if stored.order is not None:
            groups = _bytes(source, stored.order).view("<i4")
            if (groups >= scales).any():
                raise SourceError(
                    f"{stored.order.name} holds {groups.max()}; there are {scales} groups.",
                    "Get the checkpoint again.",
                )
            # -1 stands for the order of the columns, as in compressed-tensors.
            self._groups = None if (groups < 0).any() else groups

    def read(self, first: int, last: int, words: Words) -> None:
        stored, rows = self._stored, last - first
        codes = self._scratch[: rows * self._packed]
        read_part(self._source, stored.codes, first * self._packed, codes.data)
        scales = _read_rows(self._source, stored.scale, first, last)
        zeros, wide = self._zeros[first:last], self._wide
        if self._groups is not None:  # each column has a scale of its own
            scales, zeros, wide = scales[:, self._groups], zeros[:, self._groups], 1
        decode_integers(codes.reshape(rows, -1), stored.bits, scales, zeros, wide, words)


class _Int8:
    def __init__(self, source: Source, stored: Stored, columns: int, scratch: Bytes) -> None:
        self._source, self._stored, self._columns = source, stored, columns
        self._scratch = scratch
        self._scales = _scales(source, stored, columns)
        self._zeros = np.zeros(self._scales.shape, np.int8)
        if stored.zeros is not None:
            zeros = _bytes(source, stored.zeros).view(np.int8)
            self._zeros = zeros.reshape(self._scales.shape)

    def read(self, first: int, last: int, words: Words) -> None:
        high, wide = self._stored.block
        codes = self._scratch[: (last - first) * self._columns]
        read_part(self._source, self._stored.codes, first * self._columns, codes.data)
        codes ^= 128  # two's complement becomes the code plus half of the codes' range
        blocks = np.arange(first, last) // high
        codes = codes.reshape(last - first, self._columns)
        decode_integers(codes, 8, self._scales[blocks], self._zeros[blocks], wide, words)


def _scales(source: Source, stored: Stored, columns: int) -> Array:
    """Return all scales of a weight [out, columns], a row for each block of rows."""
    scales = _read(source, stored.scale)
    if stored.scale.dtype != "F16":  # in F16 upstream rounds twice
        scales = scales.astype(np.float32)
    return scales.reshape(-1, -(-columns // stored.block[1]))


def wrong_size(stored: Stored, raw: Bytes) -> str:
    """Return how the stated [out, in] of packed integers differs from that of the codes, or ''.

    `raw` are the bytes of `stored.size`, two integers.
    """
    if stored.size is None:
        return ""
    stated = raw.view(_SIZES[stored.size.dtype]).tolist()
    if stated == [*stored.shape]:
        return ""
    return (
        f"{stored.size.name} is {stated}; the codes unpack to {[*stored.shape]}, with num_bits "
        f"{stored.bits} of config.json"
    )


def _zero_points(raw: Bytes, info: TensorInfo, bits: int, rows: int) -> Array:
    """Return zero points, int8 [rows, groups]; an int32 holds those of several rows."""
    groups = info.shape[1]
    if info.dtype == "I8":
        return raw.view(np.int8).reshape(rows, groups)
    packed = raw.view("<u4").reshape(-1, 1, groups)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    codes = (packed >> shifts) & np.uint32(2**bits - 1)
    signed = codes.astype(np.int32) - (1 << (bits - 1))
    return signed.astype(np.int8).reshape(-1, groups)[:rows]


def _read_rows(source: Source, info: TensorInfo, first: int, last: int) -> Array:
    """Read rows of scales: F16 in F16, because upstream rounds twice, all others in F32."""
    float_format, columns = FLOATS[info.dtype], info.shape[1]
    width = columns * float_format.word.itemsize
    raw = bytearray((last - first) * width)
    read_part(source, info, first * width, memoryview(raw))
    values = float_format.values(float_format.words(raw)).reshape(-1, columns)
    _refuse_not_finite(info, values)
    return values if info.dtype == "F16" else values.astype(np.float32)


def _bytes(source: Source, info: TensorInfo) -> Bytes:
    raw = np.empty(info.nbytes, np.uint8)
    read_whole(source, info, raw.data)
    return raw


def _read(source: Source, info: TensorInfo) -> Array:
    """Read a small tensor in its own dtype; E8M0 scales in F32."""
    raw = _bytes(source, info)
    if info.dtype in E8M0S:
        _refuse_nan(info, raw)
        return E8M0[raw].reshape(info.shape)
    float_format = FLOATS[info.dtype]
    values = float_format.values(float_format.words(raw.data)).reshape(info.shape)
    _refuse_not_finite(info, values)
    return values


def _refuse_not_finite(info: TensorInfo, scales: Array) -> None:
    """Raise SourceError if a scale is NaN or infinite: the weights under the scale are unknown."""
    if bad := int(np.count_nonzero(~np.isfinite(scales.astype(np.float32)))):
        count = "a scale that is" if bad == 1 else f"{bad:,} scales that are"
        raise SourceError(
            f"{info.name} holds {count} NaN or infinite: the weights are unknown.",
            "Get the checkpoint again.",
        )


def _refuse_nan(info: TensorInfo, scales: Bytes) -> None:
    """Raise SourceError if an E8M0 scale is NaN: the weights under the scale are unknown."""
    bad = int(np.count_nonzero(scales == E8M0_NAN))
    if bad:
        count = "a scale that is" if bad == 1 else f"{bad:,} scales that are"
        raise SourceError(
            f"{info.name} holds {count} 255, which is NaN in E8M0: the weights are unknown.",
            "Get the checkpoint again.",
        )
