"""Number formats: E2M1, E4M3, E8M0 as tables of values, BF16, F16, F32 as views of raw bytes."""

from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A number format of weights.

    Without its sign bit, the bit pattern of a value is its magnitude: an integer that grows with
    the absolute value, so that values can be compared without decoding them. `infinity` is the
    magnitude of infinity; NaNs are above infinity, finite values below.
    """

    name: str
    value: "np.dtype[Any]"
    word: "np.dtype[Any]"
    infinity: int

    @property
    def sign(self) -> int:
        """The sign bit; every magnitude is below the sign bit."""
        return 1 << (8 * self.word.itemsize - 1)

    def words(self, raw: bytes | bytearray | memoryview) -> Words:
        """Return the bit patterns of little-endian bytes, flat; a view, read-only if `raw` is."""
        return np.frombuffer(raw, self.word)

    def values(self, words: Array) -> Array:
        """Return bit patterns, of any shape, as numbers; a view if they have the dtype `word`."""
        return words.astype(self.word, copy=False).view(self.value)


BF16: Final = FloatFormat("BF16", np.dtype(ml_dtypes.bfloat16), np.dtype("<u2"), 0x7F80)
F16: Final = FloatFormat("F16", np.dtype("<f2"), np.dtype("<u2"), 0x7C00)
F32: Final = FloatFormat("F32", np.dtype("<f4"), np.dtype("<u4"), 0x7F800000)
FLOATS: Final = {float_format.name: float_format for float_format in (BF16, F16, F32)}
"""Float formats by safetensors' dtype name."""


def _magnitudes(mantissa_bits: int, bias: int, count: int) -> Floats:
    """Return the first `count` non-negative values of a small float format, by code.

    IEEE 754's scheme: a subnormal if the exponent field is 0, otherwise an implied leading 1.
    """
    codes = np.arange(count)
    exponent, mantissa = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    leading = (exponent > 0).astype(np.float64)
    fraction = leading + mantissa / (1 << mantissa_bits)
    values: Floats = (fraction * 2.0 ** (np.maximum(exponent, 1) - bias)).astype(np.float32)
    return values


def _edges(values: Floats) -> Floats:
    """Return, for each value but the first, the smallest float32 that rounds to it or beyond.

    To nearest; a number half way between two values rounds to the value with the even code.
    """
    middle = (values[:-1] + values[1:]) / np.float32(2)  # exact: few bits of mantissa
    even = np.arange(1, len(values)) % 2 == 0
    return np.where(even, middle, np.nextafter(middle, np.float32(np.inf)))


E2M1: Final = _magnitudes(1, bias=1, count=8)
"""float32 [8]: the values of OCP FP4 E2M1 without its sign (bit 3): 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
E2M1_EDGES: Final = _edges(E2M1)
"""float32 [7]: the smallest absolute values that round to codes 1 to 7."""
E4M3: Final = _magnitudes(3, bias=7, count=127)
"""float32 [127]: the values of FP8 E4M3 (`fn`: no infinities) without sign or NaN, 0 to 448."""
E4M3_EDGES: Final = _edges(E4M3)
"""float32 [126]: the smallest numbers that round to codes 1 to 126."""


E8M0: Final[Floats] = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
"""float32 [256]: the value of every OCP E8M0 code, 2^(code - 127); 255 is NaN. 0 is subnormal."""
E8M0_NAN: Final = 255


def e2m1_codes(absolute: Array) -> Bytes:
    """Return codes 0 to 7 of non-negative float32 numbers; numbers above 6 saturate."""
    return np.searchsorted(E2M1_EDGES, absolute, side="right").astype(np.uint8)


def e4m3_codes(absolute: Array) -> Bytes:
    """Return codes 0 to 126 of non-negative float32 numbers; numbers above 448 saturate."""
    return np.searchsorted(E4M3_EDGES, absolute, side="right").astype(np.uint8)
