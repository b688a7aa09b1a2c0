"""Compiled loops: decode stored weights to float32, and sum the differences of two weights.

The loops look codes up in the tables of `decode`; this module has no decoder of its own.
The first call compiles for seconds; numba keeps the result on disk. Arrays are C-contiguous.
"""

from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mquant.compiled import compiled
from mquant.loader_model.storage import GROUP, MX_GROUP
from mquant.weights.decode import Floats, e2m1, e4m3, e8m0

Array = npt.NDArray[Any]

SUMS: Final = 3
"""Sums of squared differences, of the parent's squares, and of this checkpoint's squares."""

_BYTES: Final = np.arange(256, dtype=np.uint8)
_PAIRS: Final[Array] = e2m1(_BYTES[:, None]).view(np.uint64).reshape(256)
"""The two E2M1 values of a byte, as one word."""
_E4M3: Final[Floats] = e4m3(_BYTES)
_E8M0: Final[Floats] = e8m0(_BYTES)


Stored = tuple[Array, Array, float]
"""NVFP4: packed codes, uint8 [rows, columns / 2], scales [rows, columns / 16], and their factor."""


def unpack_bf16(words: Array, out: Floats) -> None:
    """Decode BF16, uint16 [n], into float32 [n]."""
    _bf16(words, out.view(np.uint32))


def unpack_nvfp4(packed: Array, scales: Array, factor: float, out: Floats) -> None:
    """Decode E2M1 codes [n / 2] under E4M3 codes [n / 16], times `factor`, into float32 [n]."""
    if not len(packed) * 2 == len(scales) * GROUP == len(out):
        raise ValueError(f"{len(packed)} bytes and {len(scales)} scales into {len(out)}")
    _nvfp4(packed, scales, np.float32(factor), _PAIRS, _E4M3, out.view(np.uint64), out)


def unpack_mxfp4(packed: Array, scales: Array, out: Floats) -> None:
    """Decode E2M1 codes [n / 2] under E8M0 codes [n / 32] into float32 [n]."""
    if not len(packed) * 2 == len(scales) * MX_GROUP == len(out):
        raise ValueError(f"{len(packed)} bytes and {len(scales)} scales into {len(out)}")
    twice = np.repeat(scales, MX_GROUP // GROUP)
    _nvfp4(packed, twice, np.float32(1), _PAIRS, _E8M0, out.view(np.uint64), out)


def unpack_e4m3(codes: Array, out: Floats) -> None:
    """Decode E4M3 codes [n] into float32 [n], without a scale."""
    _lookup(codes, _E4M3, out)


def add_sums(reference: Floats, weight: Floats, sums: Array, blocks: Floats) -> None:
    """Add to `sums`, float64 [3]; fill `blocks` with squared differences of each 16 columns.

    The weights are [rows, columns], `blocks` is [rows, ceil(columns / 16)]. Rows are added in
    order: the sums do not depend on the number of rows of a call.
    """
    _sums(reference, weight, sums, blocks)


def add_nvfp4_sums(words: Array, stored: Stored, sums: Array, blocks: Floats) -> None:
    """Do `unpack_bf16`, `unpack_nvfp4` and `add_sums` in one pass, a row at a time.

    A row of float32 then stays in the first-level cache. `words` is uint16 [rows, columns].
    """
    packed, scales, factor = stored
    _nvfp4_sums(words, packed, scales, np.float32(factor), _PAIRS, _E4M3, sums, blocks)


@compiled
def _bf16(words: Array, out: Array) -> None:
    for i in range(words.size):
        out[i] = np.uint32(words[i]) << np.uint32(16)


@compiled
def _nvfp4(
    packed: Array, scales: Array, factor: Any, pairs: Array, table: Array, out: Array, flat: Array
) -> None:
    for block in range(scales.size):
        for i in range(8):
            out[block * 8 + i] = pairs[packed[block * 8 + i]]
        scale = table[scales[block]]
        for i in range(16):
            flat[block * 16 + i] = flat[block * 16 + i] * scale * factor


@compiled
def _lookup(codes: Array, table: Array, out: Array) -> None:
    for i in range(codes.size):
        out[i] = table[codes[i]]


# One loop per function: LLVM vectorizes no function with several loops.
# The order of additions inside a loop is the same at every call.
_reordering = partial(compiled, fastmath={"reassoc"})


@compiled
def _sums(reference: Array, weight: Array, sums: Array, blocks: Array) -> None:
    rows, columns = reference.shape
    padded = blocks.shape[1] * 16
    squares, halves = np.zeros(padded, np.float32), np.empty(padded // 2, np.float32)
    for row in range(rows):
        x, y = reference[row], weight[row]
        error, power, own = _row_sums(x, y)
        sums[0] += error
        sums[1] += power
        sums[2] += own
        for i in range(columns):
            difference = x[i] - y[i]
            squares[i] = difference * difference
        squares[columns:] = 0
        _halve(squares, halves)
        _halve(halves, squares[: padded // 4])
        _halve(squares[: padded // 4], halves[: padded // 8])
        _halve(halves[: padded // 8], blocks[row])


@_reordering
def _row_sums(x: Array, y: Array) -> tuple[float, float, float]:
    error = power = own = 0.0
    for i in range(x.size):
        a, b = np.float64(x[i]), np.float64(y[i])
        difference = a - b
        error += difference * difference
        power += a * a
        own += b * b
    return error, power, own


@compiled
def _halve(values: Array, out: Array) -> None:
    for i in range(out.size):
        out[i] = values[2 * i] + values[2 * i + 1]


@compiled
def _nvfp4_sums(
    words: Array,
    packed: Array,
    scales: Array,
    factor: Any,
    pairs: Array,
    table: Array,
    sums: Array,
    blocks: Array,
) -> None:
    rows, columns = words.shape
    x, y = np.empty((1, columns), np.float32), np.empty((1, columns), np.float32)
    bits, halves, flat = x.view(np.uint32)[0], y.view(np.uint64)[0], y[0]
    for row in range(rows):
        _bf16(words[row], bits)
        _nvfp4(packed[row], scales[row], factor, pairs, table, halves, flat)
        _sums(x, y, sums, blocks[row : row + 1])
