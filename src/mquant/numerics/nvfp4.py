"""NVFP4 weights with min-max scales: the reference, in plain numpy.

The results are bit for bit those of llmcompressor's `memoryless_minmax` observer
(`observers/base.py`) and compressed-tensors' `nvfp4-pack-quantized` compressor
(`quantization/utils/helpers.py`, `quantization/lifecycle/forward_helpers.py`, `compressors/nvfp4`)
on a CPU. "Own dtype" is the weight's: BF16, F16 or F32. Every operation rounds to nearest even in
the dtype of the operation.

| step | dtype |
| --- | --- |
| amax of the tensors of a fused set, at least the smallest normal number | own |
| 1 / amax, rounded, times 2688 (448 * 6), rounded; infinity becomes 1 | own |
| global scale: the number above | F32 |
| amax of a block / 6 | own |
| the quotient times the global scale, at most 448 | F32 |
| block scale: the product rounded; 0.125 if the product rounds to 0 | E4M3 |
| divisor: block scale / global scale | F32 |
| element / divisor, at most 6 | F32 |
| code, with the sign of the quotient; zero is positive | E2M1 |

Weights must be finite: upstream's results for NaN and infinity are not reproduced.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from mquant.numerics.floats import E2M1, E4M3, Array, Bytes, Floats, e2m1_codes, e4m3_codes

GROUP: Final = 16
"""Elements along a row that share a block scale."""
SCALE_OF_ZERO: Final = 0x20
"""The E4M3 code of 0.125, which stands in for a block scale of 0 (upstream's `_get_dtype_eps`)."""


def global_scale(weights: Sequence[Array]) -> np.float32:
    """Return the global scale that the weights (of any shapes) of a fused set share."""
    return global_scale_of(np.abs(weight).max() for weight in weights)


def global_scale_of(amaxes: Iterable[Array]) -> np.float32:
    """Return the global scale from each weight's amax, a scalar in the weight's dtype.

    Scalars of different dtypes become F32, which holds all of them exactly.
    """
    scalars = [np.asarray(amax) for amax in amaxes]
    dtypes = {scalar.dtype for scalar in scalars}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    tiny = np.float32(2.0**-14 if dtype == np.float16 else 2.0**-126)
    largest = np.max([tiny, *(scalar.astype(np.float32) for scalar in scalars)]).astype(dtype)
    with np.errstate(over="ignore", under="ignore"):  # F16 overflows below an amax of 0.041
        scale = dtype.type(1) / largest * dtype.type(E4M3[-1] * E2M1[-1])
    as_float32 = np.float32(scale)
    return as_float32 if np.isfinite(as_float32) else np.float32(1)


def quantize(weight: Array, scale: np.float32) -> tuple[Bytes, Bytes]:
    """Quantize a weight [out, in], `in` a multiple of 16, with its global scale.

    Returns `weight_packed` uint8 [out, in / 2], the even element in the low nibble, and the bytes
    of `weight_scale` uint8 [out, in / 16].
    """
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // GROUP, GROUP)
    scales = block_scales(np.abs(blocks).max(axis=-1), scale)
    codes = element_codes(quotients(blocks, scales[..., None], scale)).reshape(rows, columns)
    packed: Bytes = codes[:, ::2] | codes[:, 1::2] << np.uint8(4)
    return packed, scales


def rounded_scales(amax: Array, scale: np.float32) -> Bytes:
    """Return the E4M3 codes that the scales of blocks round to, which may be 0.

    `amax` holds the blocks' largest absolute values, in the own dtype.
    """
    with np.errstate(over="ignore", under="ignore"):
        sixth = amax / amax.dtype.type(E2M1[-1])
        return e4m3_codes(sixth.astype(np.float32) * scale)


def block_scales(amax: Array, scale: np.float32) -> Bytes:
    """Return the E4M3 codes of the scales of blocks, as stored."""
    codes = rounded_scales(amax, scale)
    return np.where(codes == 0, np.uint8(SCALE_OF_ZERO), codes)


def quotients(elements: Array, scales: Bytes, scale: np.float32) -> Floats:
    """Return elements in units of E2M1. Shapes broadcast; `scales` are E4M3 codes other than 0."""
    with np.errstate(over="ignore", under="ignore"):
        divisor: Floats = E4M3[scales] / scale
        return elements.astype(np.float32) / divisor


def element_codes(quotient: Floats) -> Bytes:
    """Return E2M1 codes with the sign in bit 3: tiny numbers keep their sign, zeros lose it."""
    negative = (quotient < 0).astype(np.uint8)
    codes: Bytes = e2m1_codes(np.abs(quotient)) | negative << np.uint8(3)
    return codes
