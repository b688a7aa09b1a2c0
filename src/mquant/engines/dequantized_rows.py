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
from mquant.numerics.dequantize import decode_fp4, decode_fp8, mxfp4_table, nvfp4_table
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


def _of_expert(stored: Stored, expert: int) -> Stored:
    def part(info: TensorInfo) -> TensorInfo:
        size = info.nbytes // info.shape[0]
        start = info.start + expert * size
        return replace(info, shape=info.shape[1:], start=start, end=start + size)

    return replace(stored, codes=part(stored.codes), scale=part(stored.scale))


_WIDTH: Final = BF16.word.itemsize


class _FP8:
    def __init__(self, source: Source, stored: Stored, columns: int, scratch: Bytes) -> None:
        self._source, self._stored, self._columns = source, stored, columns
        self._scratch = scratch
        scales = _read(source, stored.scale)
        if stored.scale.dtype != "F16":  # in F16 upstream rounds twice
            scales = scales.astype(np.float32)
        self._scales = scales.reshape(-1, -(-columns // stored.block[1]))

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


def _read(source: Source, info: TensorInfo) -> Array:
    """Read a small tensor in its own dtype; E8M0 scales in F32."""
    raw = bytearray(info.nbytes)
    read_whole(source, info, memoryview(raw))
    if info.dtype in E8M0S:
        codes = np.frombuffer(raw, np.uint8)
        _refuse_nan(info, codes)
        return E8M0[codes].reshape(info.shape)
    float_format = FLOATS[info.dtype]
    return float_format.values(float_format.words(raw)).reshape(info.shape)


def _refuse_nan(info: TensorInfo, scales: Bytes) -> None:
    """Raise SourceError if an E8M0 scale is NaN: the weights under the scale are unknown."""
    bad = int(np.count_nonzero(scales == E8M0_NAN))
    if bad:
        count = "a scale that is" if bad == 1 else f"{bad:,} scales that are"
        raise SourceError(
            f"{info.name} holds {count} 255, which is NaN in E8M0: the weights are unknown.",
            "Get the checkpoint again.",
        )
