"""From codes and scales back to BF16: what upstream's dequantizers compute, as tables.

Under one scale a code can only become one number. So the arithmetic is done once for every code
there is, in numpy, and the compiled kernels only look up: like those that quantize they have no
arithmetic that could round in another way.

| layout | a weight is | computed in |
| --- | --- | --- |
| FP8 in blocks (`weight_scale_inv`) | code * scale | F32 |
| compressed-tensors FP8 (`weight_scale`) | code * scale | the scale's own dtype |
| compressed-tensors NVFP4 | code * (block scale / global scale) | F32 |
| ModelOpt NVFP4 | code * (block scale * second scale) | F32 |

and then rounded to BF16, to nearest even. That is compressed-tensors' `FP8BlockDequantizer`, the
`decompress` of its compressors, and ModelOpt's `NVFP4QTensor.dequantize`. NaN, of which FP8 has two
codes, stays NaN.
"""

from functools import lru_cache
from typing import Final

import numpy as np

from mquant.numerics.formats import BF16, E2M1, E4M3, Array, Bytes, Floats, Words
from mquant.numerics.kernels import compiled, compiling
from mquant.numerics.nvfp4 import GROUP

_NAN: Final = np.array([np.nan], np.float32)
E4M3_SIGNED: Final[Floats] = np.concatenate([E4M3, _NAN, -E4M3, _NAN])
"""float32 [256]: the value of every FP8 E4M3 code."""
E2M1_SIGNED: Final[Floats] = np.concatenate([E2M1, -E2M1])
"""float32 [16]: the value of every FP4 E2M1 code."""


def prepare_decoding() -> None:
    """Compile the kernels, or take them from numba's cache. Raises as `kernels.prepare`."""
    codes, words = np.zeros(GROUP, np.uint8), np.empty(GROUP, np.uint16)
    with compiling():
        decode_fp8(codes[None], fp8_tables(np.ones((1, 1), np.float32)), (1, GROUP), 0, words)
        decode_nvfp4(codes[: GROUP // 2], codes[:1], nvfp4_table(1.0, divide=True), words)


def fp8_tables(scales: Array) -> Words:
    """What every FP8 code stands for under each of `scales`, of any shape: BF16 [..., 256].

    The product is taken in the scales' dtype.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        products = E4M3_SIGNED.astype(scales.dtype) * scales[..., None]
        return _bf16(products)


@lru_cache(maxsize=256)  # 8 KiB each; fused sets share a scale, and many sets do
def nvfp4_table(second: float, *, divide: bool) -> Words:
    """What every FP4 code stands for under every FP8 block scale: BF16 [256, 16].

    `second` is the scale of the whole weight, a float32 number: a divisor or a factor.
    """
    exact = np.float32(second)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        scales = E4M3_SIGNED / exact if divide else E4M3_SIGNED * exact
        return _bf16(E2M1_SIGNED * scales[:, None])


def decode_fp8(
    codes: Bytes, tables: Words, block: tuple[int, int], first: int, words: Words
) -> None:
    """FP8 codes [rows, columns] as BF16 into `words`, uint16 [rows * columns].

    `tables` are of the blocks, of `block` rows and columns, that these rows lie in; `first` is the
    number of the first row in the first of them.
    """
    rows, columns = codes.shape
    high, wide = block
    needed = (-(-(first + rows) // high), -(-columns // wide), 256)
    if tables.shape != needed or words.shape != (codes.size,):
        raise ValueError(f"{codes.shape} codes, {tables.shape} tables into {words.shape}")
    _decode_fp8(codes, tables, first, high, wide, words.reshape(rows, columns))


def decode_nvfp4(packed: Bytes, scales: Bytes, table: Words, words: Words) -> None:
    """FP4 codes, uint8 [n / 2], as BF16 into `words`, uint16 [n]; `scales` are uint8 [n / 16]."""
    if not len(packed) * 2 == len(scales) * GROUP == len(words):
        raise ValueError(f"{packed.shape} bytes, {scales.shape} scales into {words.shape}")
    _decode_nvfp4(packed, scales, table, words)


def _bf16(values: Array) -> Words:
    words: Words = values.astype(BF16.value).view(BF16.word)
    return words


@compiled
def _decode_fp8(
    codes: Array, tables: Array, first: int, high: int, wide: int, words: Array
) -> None:
    columns = codes.shape[1]
    for row in range(codes.shape[0]):
        for block in range(tables.shape[1]):
            table = tables[(first + row) // high, block]
            for i in range(block * wide, min((block + 1) * wide, columns)):
                words[row, i] = table[codes[row, i]]


@compiled
def _decode_nvfp4(packed: Array, scales: Array, table: Array, words: Array) -> None:
    for block in range(scales.size):
        row = table[scales[block]]
        for i in range(block * 8, block * 8 + 8):
            words[2 * i] = row[packed[i] & np.uint8(15)]
            words[2 * i + 1] = row[packed[i] >> np.uint8(4)]


__all__ = [
    "E2M1_SIGNED",
    "E4M3_SIGNED",
    "decode_fp8",
    "decode_nvfp4",
    "fp8_tables",
    "nvfp4_table",
    "prepare_decoding",
]
