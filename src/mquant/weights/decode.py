"""Decode bytes to numbers for `verify`, as the formats' definitions say.

mquant has two decoders of each format on purpose. This decoder, and the compiled loops of
`kernels`, which use its tables, serve `verify`, `compare` and `eval`. With the other decoder,
`numerics.dequantize`, engines write BF16 as upstream does. A verifier that shared the engines'
decoder would repeat its mistakes. So this module imports neither the engines, nor `numerics`, nor
ml_dtypes; tests compare this decoder with compressed-tensors and ml_dtypes. The two decoders share
the headers, and the names, shapes and format of a module's tensors (`loader_model`).
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

E2M1: Final[Floats] = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _e4m3(code: int) -> float:
    """Return a code's value: sign, 4 bits of exponent (bias 7), 3 of mantissa.

    There is no infinity; a code is NaN if all bits of exponent and mantissa are set.
    """
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    sign = -1.0 if code & 128 else 1.0
    if exponent == 0:
        return float(sign * mantissa / 8 * 2.0**-6)
    return float(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))


_E4M3: Final[Floats] = np.array([_e4m3(code) for code in range(256)], np.float32)
_E8M0: Final[Floats] = np.array([2.0 ** (code - 127) for code in range(255)] + [np.nan], np.float32)
_E2M1_SIGNED: Final[Floats] = np.concatenate([E2M1, -E2M1])

_DTYPES: Final[dict[str, Any]] = {
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "F8_E4M3": "u1",
    "F8_E8M0": "u1",
    "U8": "u1",
    "I8": "i1",
    "I32": "<i4",
    "I64": "<i8",
}
READABLE: Final = frozenset(_DTYPES)


def floats(raw: bytes, dtype: str) -> Floats:
    """Return the values of a flat tensor as float32. `dtype` is one of READABLE."""
    values = np.frombuffer(raw, _DTYPES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        return e4m3(values)
    if dtype == "F8_E8M0":
        return e8m0(values)
    return values.astype(np.float32)


def e4m3(codes: Bytes) -> Floats:
    """Return the values of FP8 E4M3 codes (the `fn` variant, without infinities)."""
    return _E4M3[codes]


def e8m0(codes: Bytes) -> Floats:
    """Return the values of E8M0 codes: 2 to the power of code - 127; 255 is NaN."""
    return _E8M0[codes]


def e2m1(packed: Bytes) -> Floats:
    """Return FP4 E2M1 values, two per byte along the last axis: the even one in the low nibble."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1)
    return _E2M1_SIGNED[codes].reshape(*packed.shape[:-1], -1)


def integers(packed: npt.NDArray[np.int32], bits: int) -> Floats:
    """Return the codes of compressed-tensors' `pack-quantized`: 4 or 8 bits each, lowest first.

    An int32 holds several codes; a code is stored plus half of the codes' range.
    """
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (packed.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1).astype(np.float32) - np.float32(2 ** (bits - 1))


def scaled(values: Floats, scales: Floats, block: tuple[int, int]) -> Floats:
    """Return values [rows, columns] times the scale of each block of `block` rows and columns."""
    rows, columns = values.shape
    wide = np.repeat(np.repeat(scales, block[0], axis=0), block[1], axis=1)
    return values * wide[:rows, :columns]
