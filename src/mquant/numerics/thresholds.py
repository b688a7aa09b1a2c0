"""The reference's arithmetic as tables of integers, for one dtype and one global scale.

Block scales and E2M1 codes never fall as an absolute value grows: rounding and division by a
positive number are monotonic. So the kernels find a scale or a code by comparing a magnitude (an
absolute value's bit pattern, see `FloatFormat`) with thresholds: the smallest magnitudes that reach
the next scale or code. A bisection with the reference itself finds the thresholds: there is no
second arithmetic that could disagree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from mquant.numerics.floats import E2M1_EDGES, E4M3, FLOATS, Array, Bytes, FloatFormat, Words
from mquant.numerics.nvfp4 import quotients, rounded_scales

Magnitudes = npt.NDArray[np.uint32]

BUCKETS: Final = 1 << 15
"""The number of magnitudes of a 16-bit format; F32 is bucketed by its upper 15 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Thresholds:
    """The tables that decide the codes of weights of one dtype under one global scale.

    A block's rank is the E4M3 code that its scale rounds to: 0 to 126; rank 0 is stored as 0x20.
    A threshold that no finite magnitude reaches is the magnitude of infinity.

    `start`, uint8 [32768]: the rank of the smallest magnitude of each bucket.
    `scale`, uint32 [127]: the smallest block amax of a rank above the index.
    `code`, uint16 or uint32 [127, 8], by the block scale's code: in columns 1 to 7 the smallest
    magnitude with that E2M1 code; in column 0 the smallest bit pattern with a negative code.
    """

    float_format: FloatFormat
    start: Bytes
    scale: Magnitudes
    code: Words


@lru_cache(maxsize=256)  # 36 KiB each; a model in BF16 has few different global scales
def thresholds(dtype: str, scale: float) -> Thresholds:
    """Return the tables for weights of safetensors `dtype` under a global scale, a float32."""
    float_format, exact = FLOATS[dtype], np.float32(scale)
    steps = _scale_steps(float_format, exact)
    width = (float_format.sign // BUCKETS).bit_length() - 1
    ranks = np.searchsorted(steps, np.arange(BUCKETS) << width, side="right")
    return Thresholds(float_format, ranks.astype(np.uint8), steps, _code_steps(float_format, exact))


def _scale_steps(float_format: FloatFormat, scale: np.float32) -> Magnitudes:
    """Return the smallest magnitudes of blocks' amax with ranks 1 to 126, then infinity."""
    ranks = np.arange(1, len(E4M3) + 1)

    return _first(float_format, lambda amax: rounded_scales(amax, scale) >= ranks, ranks.shape)


def _code_steps(float_format: FloatFormat, scale: np.float32) -> Words:
    """Return `Thresholds.code`. Row 0 is never used: no block scale is 0."""
    scales = np.maximum(np.arange(len(E4M3)), 1).astype(np.uint8)[:, None]
    # The sign is kept if the quotient is not zero.
    edges = np.concatenate([[np.nextafter(np.float32(0), np.float32(1))], E2M1_EDGES])
    steps = _first(
        float_format, lambda x: quotients(x, scales, scale) >= edges, (len(scales), len(edges))
    )
    steps[:, 0] |= float_format.sign
    return steps.astype(float_format.word)


def _first(
    float_format: FloatFormat, reached: Callable[[Array], Array], shape: tuple[int, ...]
) -> Magnitudes:
    """Return the smallest magnitudes whose values are `reached`; infinity if no value is."""
    low = np.zeros(shape, np.uint32)
    high = np.full(shape, float_format.infinity, np.uint32)
    for _ in range(float_format.infinity.bit_length()):
        middle = (low + high) >> np.uint32(1)
        # A finished search does not change: its `low` and `high` are equal, and may be infinity.
        done = reached(float_format.values(middle)) | (low == high)
        high = np.where(done, middle, high)
        low = np.where(done, low, middle + np.uint32(1))
    return high
