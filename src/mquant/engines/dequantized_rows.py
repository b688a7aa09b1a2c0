"""Rows, in BF16, of weights that the source stores quantized.

The scales of FP8 and the global scale of NVFP4 are read when a work unit begins. Codes, and the
block scales of NVFP4, are read with their rows. `numerics.dequantize` decodes the rows, never
`weights.decode`, with which `verify` judges the result.
"""

from typing import Protocol

import numpy as np

from mquant.checkpoint import TensorInfo
from mquant.loader_model.storage import NVFP4S, StorageFormat
from mquant.numerics.dequantize import decode_fp8, decode_nvfp4, nvfp4_table
from mquant.numerics.floats import FLOATS, Array, Bytes, Words
from mquant.numerics.nvfp4 import GROUP
from mquant.plan import Action, Stored


class Source(Protocol):
    """The source of bytes."""

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on."""


class Rows(Protocol):
    """A stored weight that can be read by rows."""

    def read(self, first: int, last: int, words: Words) -> None:
        """Fill `words`, uint16 [rows * columns], with rows [first, last)."""


def open_rows(source: Source, action: Action, scratch: Bytes) -> Rows:
    """Open the weight that `action.stored` describes.

    `scratch` must be large enough for the codes (and NVFP4 block scales) of the rows of one read.

    Raises SourceError, as reading rows does, if the source cannot be read.
    """
    stored = action.stored
    if stored is None:
        raise TypeError(f"{action.source.name} is not stored quantized")
    columns = action.source.shape[1]
    if stored.format in NVFP4S:
        return _NVFP4(source, stored, columns, scratch)
    return _FP8(source, stored, columns, scratch)


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
        start = self._stored.codes.start + first * self._columns
        self._source.read_into(self._stored.codes.shard, start, codes.data)
        scales = self._scales[first // high : -(-last // high)]
        codes = codes.reshape(last - first, self._columns)
        decode_fp8(codes, scales, self._stored.block, first % high, words)


class _NVFP4:
    def __init__(self, source: Source, stored: Stored, columns: int, scratch: Bytes) -> None:
        if stored.second is None:
            raise TypeError(f"{stored.codes.name} has no second scale")
        self._source, self._stored = source, stored
        self._packed, self._groups = columns // 2, columns // GROUP
        self._scratch = scratch
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
            self._source.read_into(info.shard, info.start + first * width, part.data)
        decode_nvfp4(packed, scales, self._table, words)


def _read(source: Source, info: TensorInfo) -> Array:
    """Read a small tensor in its own dtype."""
    raw = bytearray(info.nbytes)
    source.read_into(info.shard, info.start, memoryview(raw))
    float_format = FLOATS[info.dtype]
    return float_format.values(float_format.words(raw)).reshape(info.shape)
