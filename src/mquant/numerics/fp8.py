"""FP8 weights (E4M3 codes under a scale for every block): the reference, and its kernel.

The results are bit for bit those of llmcompressor's `memoryless_minmax` observer and
compressed-tensors' `float-quantized` compressor on a CPU. "Own dtype" is the weight's: BF16, F16 or
F32. Every operation rounds to nearest even in the dtype of the operation.

| step | dtype |
| --- | --- |
| scale: amax of a block / 448; the dtype's epsilon if the quotient is 0 | own |
| element / scale, at most 448 | own |
| code of the quotient, with the element's sign, of -0.0 too | E4M3 |

A block is a row (FP8_DYNAMIC) or 128 x 128 elements, fewer at the edges (FP8_BLOCK). Weights must
be finite.

The kernel divides, which IEEE 754 defines to the bit, and rounds by adding to bit patterns.
"""

from typing import Any, Final

import numpy as np

from mquant.compiled import compiled
from mquant.numerics.floats import E4M3, FLOATS, Array, Bytes, FloatFormat, Floats, e4m3_codes
from mquant.numerics.thresholds import Magnitudes

_LARGEST: Final = E4M3[-1]
EPSILON: Final = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23}
_ONES: Final = np.float32(1.5 * 2**23)
"""Adding and subtracting _ONES rounds a number to the nearest integer, half to even."""
# _AS_FLOAT turns a magnitude into a float32: a shift and a factor. _ROUNDED rounds a float32 to the
# format: the number of mantissa bits to drop, half of the last kept bit less one, 1 if ties occur,
# and the mask of the kept bits.
_AS_FLOAT: Final = {
    "BF16": (np.uint32(16), np.float32(1)),
    "F16": (np.uint32(13), np.float32(2.0**112)),
    "F32": (np.uint32(0), np.float32(1)),
}
_ROUNDED: Final = {
    "BF16": (np.uint32(16), np.uint32(0x7FFF), np.uint32(1), np.uint32(0xFFFF0000)),
    "F16": (np.uint32(13), np.uint32(0x0FFF), np.uint32(1), np.uint32(0xFFFFE000)),
    "F32": (np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0xFFFFFFFF)),
}


def quantize(weight: Array, block: tuple[int, int]) -> tuple[Bytes, Array]:
    """Return codes, uint8 [out, in], and block scales, in the own dtype, of a weight [out, in]."""
    high, wide = block
    rows, columns = weight.shape
    down, across = -(-rows // high), -(-columns // wide)
    padded = np.zeros((down * high, across * wide), weight.dtype)
    padded[:rows, :columns] = weight
    blocks = padded.reshape(down, high, across, wide)
    scales = scales_of(np.abs(blocks).max(axis=(1, 3)))
    with np.errstate(over="ignore", under="ignore"):
        quotients = blocks / scales[:, None, :, None]
    codes = e4m3_codes(np.abs(quotients).astype(np.float32))
    codes |= np.signbit(blocks).astype(np.uint8) << np.uint8(7)
    return codes.reshape(padded.shape)[:rows, :columns], scales


def scales_of(amax: Array) -> Array:
    """Return the scales of blocks from their amax, of any shape, in the own dtype."""
    with np.errstate(under="ignore"):
        scales: Array = amax / amax.dtype.type(_LARGEST)
    float_format = next(known for known in FLOATS.values() if known.value == amax.dtype)
    scales[scales == 0] = EPSILON[float_format.name]
    return scales


def prepare_fp8(float_format: FloatFormat) -> None:
    """Compile the kernel for a format, or take it from numba's cache."""
    words, codes = np.zeros((1, 1), float_format.word), np.empty((1, 1), np.uint8)
    encode_into(words, float_format, (1, 1), codes)


def encode_into(
    words: Array, float_format: FloatFormat, block: tuple[int, int], codes: Bytes
) -> tuple[Array, int]:
    """Quantize bit patterns [out, in] into `codes`, uint8 [out, in].

    Returns the blocks' scales, in the format's dtype, and the count of numbers that are NaN or
    infinite; if the count is not 0, codes and scales mean nothing.
    """
    rows, columns = words.shape
    if words.dtype != float_format.word or codes.shape != words.shape:
        raise ValueError(f"{words.dtype} {words.shape} into {codes.shape} codes")
    high, wide = block
    magnitudes = np.zeros((-(-rows // high), -(-columns // wide)), np.uint32)
    _block_maxima(words, high, wide, magnitudes)
    if magnitudes.max() >= float_format.infinity:
        bad = (words & float_format.word.type(float_format.sign - 1)) >= float_format.infinity
        return magnitudes, int(np.count_nonzero(bad))
    scales = scales_of(float_format.values(magnitudes))
    as_float, rounded = _AS_FLOAT[float_format.name], _ROUNDED[float_format.name]
    _encode(words, high, wide, scales.astype(np.float32), as_float, rounded, codes)
    return scales, 0


@compiled
def _block_maxima(words: Array, high: int, wide: int, magnitudes: Magnitudes) -> None:
    mask = words.dtype.type(0x7FFF if words.itemsize == 2 else 0x7FFFFFFF)
    for row in range(words.shape[0]):
        line = words[row]
        for block in range(magnitudes.shape[1]):
            part = line[block * wide : (block + 1) * wide]
            largest = words.dtype.type(0)
            for i in range(part.size):
                largest = max(largest, words.dtype.type(part[i] & mask))
            maxima = magnitudes[row // high]
            maxima[block] = max(maxima[block], np.uint32(largest))


@compiled
def _encode(
    words: Array, high: int, wide: int, scales: Floats, as_float: Any, rounded: Any, codes: Bytes
) -> None:
    for row in range(words.shape[0]):
        for block in range(scales.shape[1]):
            _encode_some(
                words[row, block * wide : (block + 1) * wide],
                scales[row // high, block],
                as_float,
                rounded,
                codes[row, block * wide : (block + 1) * wide],
            )


@compiled
def _encode_some(words: Array, scale: Any, as_float: Any, rounded: Any, codes: Array) -> None:
    shift, unit = as_float
    gone, half, tie, kept = rounded
    mask = np.uint32(0x7FFF if words.itemsize == 2 else 0x7FFFFFFF)
    to_sign = np.uint32(8 * words.itemsize - 8)
    for i in range(words.size):
        word = np.uint32(words[i])
        x = np.uint32((word & mask) << shift).view(np.float32) * unit
        bits = np.float32(x / scale).view(np.uint32)
        # Wrong for F16's subnormal numbers, which are far below half of E4M3's smallest number.
        bits = np.uint32((bits + half + ((bits >> gone) & tie)) & kept)
        quotient = min(np.uint32(bits).view(np.float32), np.float32(448))
        bits = np.float32(quotient).view(np.uint32)
        bits = np.uint32(bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1)))
        normal = np.uint32(bits >> np.uint32(20)) - np.uint32((127 - 7) << 3)
        small = np.uint32((quotient * np.float32(512) + _ONES) - _ONES)
        code = normal if quotient >= np.float32(2.0**-6) else small
        codes[i] = np.uint8(code | ((word >> to_sign) & np.uint32(0x80)))
