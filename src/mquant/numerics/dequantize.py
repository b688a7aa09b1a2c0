"""Decode codes and scales to BF16, bit for bit as upstream's dequantizers do.

| layout | a weight is |
| --- | --- |
| FP8 in blocks (`weight_scale_inv`), compressed-tensors FP8 (`weight_scale`) | code * scale |
| compressed-tensors NVFP4 | code * (block scale / global scale) |
| ModelOpt NVFP4 | code * (block scale * second scale) |
| MXFP4, MXFP8, FP8 with E8M0 scales | code * 2^(scale - 127) |
| integers of 4 or 8 bits | (code - zero point) * scale |

Each operation is done in F32, and the result is rounded to BF16, to nearest even, as in
compressed-tensors' `FP8BlockDequantizer`, the `decompress` of its compressors, ModelOpt's
`NVFP4QTensor.dequantize`, and transformers' `convert_moe_packed_tensors` (gpt-oss) and
`Fp8Dequantize` (DeepSeek-V4). (For FP8 with scales in BF16 upstream multiplies in BF16: the result
is the same, because F32 holds the product exactly. For FP8 with scales in F16 upstream rounds the
product, which F32 also holds exactly, to F16 first.)

Engines quantize, and dequantize to, the numbers of this decoder. `verify` has another decoder,
`weights.decode`, which uses nothing of this decoder.

Under one global scale, an FP4 code and a block scale always become the same number, so the kernel
looks the number up in a table that numpy computes. FP8 has too many scales for a table: the kernel
multiplies by the scale, which IEEE 754 defines to the bit, and rounds with integers. The two NaN
codes of FP8 become NaN.
"""

from functools import cache, lru_cache
from typing import Any, Final

import numpy as np

from mquant.compiled import compiled
from mquant.numerics.floats import BF16, E2M1, E4M3, E8M0, Array, Bytes, Floats, Words
from mquant.numerics.nvfp4 import GROUP

_NAN: Final = np.array([np.nan], np.float32)
_NAN_WORD: Final = np.uint16(0x7FC0)
_E4M3_SIGNED: Final[Floats] = np.concatenate([E4M3, _NAN, -E4M3, _NAN])
"""float32 [256]: the value of every FP8 E4M3 code."""
_E2M1_SIGNED: Final[Floats] = np.concatenate([E2M1, -E2M1])
"""float32 [16]: the value of every FP4 E2M1 code."""


def prepare_decoding() -> None:
    """Compile the kernels, or take them from numba's cache."""
    codes, words = np.zeros(GROUP, np.uint8), np.empty(GROUP, np.uint16)
    decode_fp8(codes[None], np.ones((1, 1), np.float32), (1, GROUP), 0, words)
    decode_fp4(codes[: GROUP // 2], codes[:1], nvfp4_table(1.0, divide=True), words)
    scales, zeros = np.ones((1, 1), np.float32), np.zeros((1, 1), np.int8)
    decode_integers(codes[None], 8, scales, zeros, GROUP, words)
    not_finite(words)


@lru_cache(maxsize=256)  # 8 KiB each; a fused set shares a scale, and many sets have the same
def nvfp4_table(second: float, *, divide: bool) -> Words:
    """Return the number of every FP4 code under every FP8 block scale: BF16 words [256, 16].

    `second` is the scale of the whole weight, a float32 number: a divisor or a factor.
    """
    exact = np.float32(second)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        scales = _E4M3_SIGNED / exact if divide else _E4M3_SIGNED * exact
    return _fp4_table(scales)


@cache
def mxfp4_table() -> Words:
    """Return the number of every FP4 code under every E8M0 scale: BF16 words [256, 16]."""
    return _fp4_table(E8M0)


def _fp4_table(scales: Floats) -> Words:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = _E2M1_SIGNED * scales[:, None]
        words = values.astype(BF16.value).view(BF16.word)
    return np.where(np.isnan(values), _NAN_WORD, words)


def decode_fp8(
    codes: Bytes, scales: Array, block: tuple[int, int], first: int, words: Words
) -> None:
    """Decode FP8 codes [rows, columns] to BF16 into `words`, uint16 [rows * columns].

    `scales`, float32 or float16, are the scales of the blocks, of `block` rows and columns, that
    contain these rows; `first` is the number of the first row within its block.
    """
    rows, columns = codes.shape
    high, wide = block
    if scales.shape != (-(-(first + rows) // high), -(-columns // wide)):
        raise ValueError(f"{scales.shape} scales of {block} for {codes.shape} codes from {first}")
    if words.shape != (codes.size,):
        raise ValueError(f"{codes.shape} codes into {words.shape}")
    if scales.dtype == np.float16:
        wider = np.repeat(scales[(first + np.arange(rows)) // high], wide, axis=1)[:, :columns]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            values = (_E4M3_SIGNED[codes] * wider.astype(np.float32)).astype(np.float16)
        bits = values.astype(BF16.value).view(BF16.word)
        words[:] = np.where(np.isnan(values), _NAN_WORD, bits).reshape(-1)
        return
    _decode_fp8(codes, scales, first, high, wide, words.reshape(rows, columns))


def decode_fp4(
    packed: Bytes, scales: Bytes, table: Words, words: Words, group: int = GROUP
) -> None:
    """Decode FP4 codes, uint8 [n / 2], into `words`, BF16 [n]; `scales` are uint8 [n / group].

    `table` has the number of every code under every scale. `group` is a multiple of 16.
    """
    if not len(packed) * 2 == len(scales) * group == len(words):
        raise ValueError(f"{packed.shape} bytes, {scales.shape} scales into {words.shape}")
    if group > GROUP:  # the kernel is fast because its blocks have 16 codes
        scales = np.repeat(scales, group // GROUP)
    _decode_fp4(packed, scales, table, words)


def decode_integers(
    codes: Bytes, bits: int, scales: Array, zeros: Array, wide: int, words: Words
) -> None:
    """Decode integers of 4 or 8 bits, uint8 [rows, bytes], to BF16 into `words` [rows * columns].

    A code is stored plus half of the codes' range; of two codes in a byte the low one is first.
    `scales`, float32 or float16, and `zeros`, the zero points, int8, are [rows, groups]; a group
    has `wide` columns.
    """
    rows, columns = len(codes), codes.shape[1] * 8 // bits
    groups = (rows, -(-columns // wide))
    if scales.shape != groups or zeros.shape != groups:
        raise ValueError(f"{scales.shape} scales and {zeros.shape} zero points for {groups} groups")
    if words.shape != (rows * columns,):
        raise ValueError(f"{codes.shape} codes into {words.shape}")
    if scales.dtype != np.float16:
        _decode_integers(codes, bits, scales, zeros, wide, words.reshape(rows, columns))
        return
    # In F16 upstream rounds the product to F16 first. BF16 and F16 hold code - zero exactly.
    numbers = np.empty((rows, columns), np.uint16)
    _decode_integers(codes, bits, np.ones(groups, np.float32), zeros, wide, numbers)
    wider = np.repeat(scales, wide, axis=1)[:, :columns]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = numbers.view(BF16.value).astype(np.float16) * wider
    rounded = values.astype(BF16.value).view(BF16.word)
    words[:] = np.where(np.isnan(values), _NAN_WORD, rounded).reshape(-1)


@compiled
def not_finite(words: Array) -> int:
    """Return how many BF16 numbers are NaN or infinite: all bits of the exponent are set."""
    count = 0
    for i in range(words.size):
        count += (words[i] & np.uint16(0x7F80)) == np.uint16(0x7F80)
    return count


@compiled
def _decode_fp8(
    codes: Array, scales: Array, first: int, high: int, wide: int, words: Array
) -> None:
    columns = codes.shape[1]
    bits = np.empty(columns, np.uint32)
    values = bits.view(np.float32)
    for row in range(codes.shape[0]):
        _fp8_bits(codes[row], bits)
        for block in range(scales.shape[1]):
            part = values[block * wide : min((block + 1) * wide, columns)]
            _multiply(part, scales[(first + row) // high, block])
        _round(bits, words[row])


@compiled
def _decode_integers(
    codes: Array, bits: int, scales: Array, zeros: Array, wide: int, words: Array
) -> None:
    values = np.empty(words.shape[1], np.float32)
    for row in range(codes.shape[0]):
        if bits == 4:
            _nibbles(codes[row], values)
        else:
            _bytes(codes[row], values)
        for group in range(scales.shape[1]):
            part = values[group * wide : min((group + 1) * wide, values.size)]
            _scale(part, np.float32(zeros[row, group]), scales[row, group])
        _round(values.view(np.uint32), words[row])


@compiled
def _nibbles(codes: Array, values: Array) -> None:
    for i in range(codes.size):
        values[2 * i] = np.float32(codes[i] & np.uint8(15)) - np.float32(8)
        values[2 * i + 1] = np.float32(codes[i] >> np.uint8(4)) - np.float32(8)


@compiled
def _bytes(codes: Array, values: Array) -> None:
    for i in range(codes.size):
        values[i] = np.float32(codes[i]) - np.float32(128)


@compiled
def _scale(values: Array, zero: Any, scale: Any) -> None:
    for i in range(values.size):
        values[i] = (values[i] - zero) * scale


@compiled
def _fp8_bits(codes: Array, bits: Array) -> None:
    """Write FP8 codes as F32 bits without a factor of 2**120: move sign, exponent and mantissa.

    The factor is the difference of the exponents' biases; a multiplication by the factor is right
    for subnormal numbers too.
    """
    for i in range(codes.size):
        code = np.uint32(codes[i])
        magnitude = np.uint32(code & np.uint32(127))
        moved = np.uint32(magnitude << np.uint32(20))
        moved = moved if magnitude < np.uint32(127) else np.uint32(0x7FC00000)
        bits[i] = moved | ((code & np.uint32(128)) << np.uint32(24))


@compiled
def _multiply(values: Array, scale: Any) -> None:
    for i in range(values.size):
        values[i] = values[i] * np.float32(2.0**120) * scale


@compiled
def _round(bits: Array, words: Array) -> None:
    """Round F32 to BF16, to nearest even; every NaN becomes the same NaN."""
    for i in range(bits.size):
        word = bits[i]
        parity = np.uint32((word >> np.uint32(16)) & np.uint32(1))
        upper = np.uint32((word + np.uint32(0x7FFF) + parity) >> np.uint32(16))
        number = (word & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000)
        words[i] = np.uint16(upper if number else np.uint32(0x7FC0))


@compiled
def _decode_fp4(packed: Array, scales: Array, table: Array, words: Array) -> None:
    for block in range(scales.size):
        row = table[scales[block]]
        for i in range(block * 8, block * 8 + 8):
            words[2 * i] = row[packed[i] & np.uint8(15)]
            words[2 * i + 1] = row[packed[i] >> np.uint8(4)]
