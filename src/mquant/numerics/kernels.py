"""Compiled kernels: the reference's bytes at the speed of memory, with the GIL released.

The kernels compare integers, and no kernel rounds; `thresholds` holds all the arithmetic. Loops are
short and without branches, so that LLVM vectorizes them: the condition of a branch would be random,
and a wrong prediction costs more than a block. A loop handles a few hundred blocks at a time, so
that its results stay in the first-level cache for the next loop.

The first call for a dtype compiles for seconds; numba keeps the result on disk. Arrays must be
C-contiguous; a read-only array is another type to numba, which compiles again.
"""

from typing import Any, Final

import numpy as np

from mquant.compiled import compiled
from mquant.numerics.floats import Array, Bytes, FloatFormat, Words
from mquant.numerics.nvfp4 import GROUP, SCALE_OF_ZERO
from mquant.numerics.prefetch import prefetch
from mquant.numerics.thresholds import Magnitudes, Thresholds, thresholds

_AT_ONCE: Final = 512  # blocks: 32 KiB of scratch
_NONE: Final = np.empty(0, np.uint32)


def prepare(float_format: FloatFormat) -> None:
    """Compile the kernels for a format, or take them from numba's cache."""
    words, maxima = np.zeros(GROUP, float_format.word), np.zeros(1, np.uint32)
    packed, scales = np.empty(GROUP // 2, np.uint8), np.empty(1, np.uint8)
    block_maxima(words, float_format, maxima)
    quantize_into(words, maxima, thresholds(float_format.name, 1.0), packed, scales)


def block_maxima(words: Words, float_format: FloatFormat, maxima: Magnitudes) -> tuple[int, int]:
    """Return the largest magnitude of bit patterns [n], and the count of NaN and infinity.

    Fills `maxima`, uint32 [n / 16], with the largest magnitude of each block of 16.
    `float_format.values(np.array([magnitude]))` is the absolute maximum if the count is 0. If the
    count is not 0, the caller must stop: `quantize_into` takes NaN and infinity for large numbers.
    """
    _check(words, float_format)
    if maxima.shape != (len(words) // GROUP,) or len(words) % GROUP:
        raise ValueError(f"{len(words)} elements into {maxima.shape} maxima")
    largest = int(_block_maxima(words, maxima))
    if largest < float_format.infinity:
        return largest, 0
    return largest, int(
        np.count_nonzero((words & (float_format.sign - 1)) >= float_format.infinity)
    )


def quantize_into(
    words: Words, maxima: Magnitudes, steps: Thresholds, packed: Bytes, scales: Bytes
) -> None:
    """Quantize bit patterns [n] of finite numbers, n a multiple of 16, in blocks of 16.

    `maxima`, uint32 [n / 16], are the blocks' largest magnitudes. Fills `packed`, uint8 [n / 2],
    and `scales`, uint8 [n / 16]. A row consists of whole blocks, so `words` can be a flat weight
    [out, in], or any of its rows.
    """
    _check(words, steps.float_format)
    size = len(words)
    if size % GROUP or not len(maxima) * GROUP == len(packed) * 2 == len(scales) * GROUP == size:
        raise ValueError(f"{size} elements into {packed.shape} bytes and {scales.shape} scales")
    _quantize(words, maxima, steps.start, steps.scale, steps.code, packed, scales)


def pack_into(words: Words, steps: Thresholds, scales: Bytes, packed: Bytes) -> None:
    """Quantize as `quantize_into` does, but read the block scales from `scales`."""
    _check(words, steps.float_format)
    size = len(words)
    if size % GROUP or not len(packed) * 2 == len(scales) * GROUP == size:
        raise ValueError(f"{size} elements into {packed.shape} bytes and {scales.shape} scales")
    _quantize(words, _NONE, steps.start, steps.scale, steps.code, packed, scales)


def _check(words: Words, float_format: FloatFormat) -> None:
    if words.dtype != float_format.word or words.ndim != 1 or not words.flags.c_contiguous:
        raise ValueError(
            f"{float_format.name} comes as flat {float_format.word}, not {words.dtype}"
        )


@compiled
def _block_maxima(words: Array, maxima: Array) -> Any:
    # Separate arrays: the compiler sees that the arrays do not alias, and reloads no value.
    wide = np.empty(_AT_ONCE * 8, np.uint32)
    narrow = np.empty(_AT_ONCE * 8, np.uint32)
    largest = np.uint32(0)
    for first in range(0, maxima.size, _AT_ONCE):
        blocks = min(_AT_ONCE, maxima.size - first)
        part = words[first * 16 : (first + blocks) * 16]
        _block_max(part, wide[: blocks * 8], narrow[: blocks * 8])
        for i in range(blocks):
            maxima[first + i] = narrow[i]
            largest = max(largest, narrow[i])
    return largest


@compiled
def _quantize(
    words: Array,
    maxima: Array,
    start: Array,
    steps: Array,
    table: Array,
    packed: Array,
    scales: Array,
) -> None:
    """Quantize blocks; if `maxima` is empty, read `scales` instead of filling `scales`."""
    codes = np.empty((_AT_ONCE, 16), np.uint16)
    pairs = codes.view(np.uint32).reshape(-1)
    for first in range(0, scales.size, _AT_ONCE):
        last = min(first + _AT_ONCE, scales.size)
        blocks = last - first
        part, part_scales = words[first * 16 : last * 16], scales[first:last]
        for line in range(last * 16, (last + blocks) * 16, 64 // words.itemsize):
            prefetch(words, line)
        if maxima.size:
            _block_scales(maxima[first:last], start, steps, words.itemsize == 4, part_scales)
        _codes(part.reshape(blocks, 16), part_scales, table, codes)
        _pack(pairs[: blocks * 8], packed[first * 8 : last * 8])


@compiled
def _block_max(words: Array, wide: Array, narrow: Array) -> None:
    """Write each block's largest magnitude to the front of `narrow`, by halving four times."""
    eighth = wide.size // 8
    if words.itemsize == 2:
        _halve_u16(words.view(np.uint32), wide)
    else:
        _halve_u32(words.view(np.uint64), wide)
    _halve_u32(wide.view(np.uint64), narrow[: eighth * 4])
    _halve_u32(narrow[: eighth * 4].view(np.uint64), wide[: eighth * 2])
    _halve_u32(wide[: eighth * 2].view(np.uint64), narrow[:eighth])


@compiled
def _halve_u16(pairs: Array, out: Array) -> None:
    mask = np.uint32(0x7FFF)
    for i in range(out.size):
        pair = pairs[i]
        out[i] = max(np.uint32(pair & mask), np.uint32((pair >> np.uint32(16)) & mask))


@compiled
def _halve_u32(pairs: Array, out: Array) -> None:
    mask = np.uint64(0x7FFFFFFF)
    for i in range(out.size):
        pair = pairs[i]
        out[i] = max(np.uint32(pair & mask), np.uint32((pair >> np.uint64(32)) & mask))


@compiled
def _block_scales(amax: Array, start: Array, steps: Array, wide: bool, out: Array) -> None:
    """Write the codes of block scales for magnitudes, counting up from the rank of the bucket.

    In a 16-bit format a bucket holds one magnitude, so the bucket's rank is the code. In F32 a
    bucket contains one step at most, except for subnormal numbers.
    """
    if not wide:
        for i in range(out.size):
            rank = start[amax[i]]
            out[i] = rank if rank else np.uint8(SCALE_OF_ZERO)
        return
    for i in range(out.size):
        rank = start[amax[i] >> np.uint32(16)]
        while amax[i] >= steps[rank]:
            rank = np.uint8(rank + np.uint8(1))
        out[i] = rank if rank else np.uint8(SCALE_OF_ZERO)


@compiled
def _codes(words: Array, scales: Array, table: Array, codes: Array) -> None:
    """Write E2M1 codes with their sign, a uint16 each; `words` and `codes` are [blocks, 16]."""
    mask = np.uint32(0x7FFF if words.itemsize == 2 else 0x7FFFFFFF)
    for block in range(scales.size):
        row = scales[block]
        t0, t1, t2, t3 = table[row, 0], table[row, 1], table[row, 2], table[row, 3]
        t4, t5, t6, t7 = table[row, 4], table[row, 5], table[row, 6], table[row, 7]
        for i in range(16):
            word = words[block, i]
            m = words.dtype.type(word & mask)
            code = np.uint16(m >= t1)
            code = np.uint16(code + np.uint16(m >= t2))
            code = np.uint16(code + np.uint16(m >= t3))
            code = np.uint16(code + np.uint16(m >= t4))
            code = np.uint16(code + np.uint16(m >= t5))
            code = np.uint16(code + np.uint16(m >= t6))
            code = np.uint16(code + np.uint16(m >= t7))
            codes[block, i] = np.uint16(code | np.uint16(np.uint16(word >= t0) << np.uint16(3)))


@compiled
def _pack(pairs: Array, packed: Array) -> None:
    """Pack each two codes, read as one uint32, into a byte: the first in the low nibble."""
    for i in range(packed.size):
        packed[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint32(12)))
