"""From bytes back to numbers: the judge's own decoder, written from the formats' definitions.

NVFP4 and FP8 are decoded twice on purpose. This decoder, and the compiled loops of `kernels` whose
tables it makes, serve `verify`, compare and eval. `numerics.dequantize` is the accused's: engines
make BF16 with it as upstream does. A judge that shared the decoder would repeat its mistakes, so
this knows neither the engines, nor `numerics`, nor ml_dtypes; tests hold it against
compressed-tensors and ml_dtypes. Shared are the headers, and the names, shapes and format of a
module's tensors (`loader_model`).
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

E2M1: Final[Floats] = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _e4m3(code: int) -> float:
    """Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, NaN where all bits are set."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    sign = -1.0 if code & 128 else 1.0
    if exponent == 0:
        return float(sign * mantissa / 8 * 2.0**-6)
    return float(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))


_E4M3: Final[Floats] = np.array([_e4m3(code) for code in range(256)], np.float32)
_E2M1_SIGNED: Final[Floats] = np.concatenate([E2M1, -E2M1])

_DTYPES: Final[dict[str, Any]] = {
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "F8_E4M3": "u1",
    "U8": "u1",
    "I8": "i1",
    "I32": "<i4",
    "I64": "<i8",
}
READABLE: Final = frozenset(_DTYPES)


def floats(raw: bytes, dtype: str) -> Floats:
    """The values of a flat tensor, as float32. `dtype` is one of READABLE."""
    values = np.frombuffer(raw, _DTYPES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        return e4m3(values)
    return values.astype(np.float32)


def e4m3(codes: Bytes) -> Floats:
    """FP8 E4M3 (the `fn` variant, without infinities)."""
    return _E4M3[codes]


def e2m1(packed: Bytes) -> Floats:
    """FP4 E2M1, two codes a byte along the last axis: the even element in the low nibble."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1)
    return _E2M1_SIGNED[codes].reshape(*packed.shape[:-1], -1)


def integers(packed: npt.NDArray[np.int32], bits: int) -> Floats:
    """compressed-tensors' `pack-quantized`: codes of 4 or 8 bits in an int32, lowest first.

    They are stored plus half their range.
    """
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (packed.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1).astype(np.float32) - np.float32(2 ** (bits - 1))


def scaled(values: Floats, scales: Floats, block: tuple[int, int]) -> Floats:
    """Values [rows, columns] times a scale for every `block` of them."""
    rows, columns = values.shape
    wide = np.repeat(np.repeat(scales, block[0], axis=0), block[1], axis=1)
    return values * wide[:rows, :columns]
