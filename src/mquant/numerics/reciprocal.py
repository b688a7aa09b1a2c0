"""Global scales in two conventions: a divisor in compressed-tensors, a factor in ModelOpt.

In F32 the reciprocal of a reciprocal is not always the number itself: the result is the neighbour
for 26 of the 128 mantissas of BF16, and for one in six of all F32 numbers. But no two BF16 numbers
share a reciprocal, so the scales of BF16 weights can be recovered exactly.
"""

import numpy as np

from mquant.numerics.floats import BF16


def reciprocal(scale: np.float32) -> np.float32:
    """Return 1 / scale, rounded; infinity if the quotient is too large."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.float32(1) / scale


def recovered(factor: np.float32) -> np.float32:
    """Return the BF16 number whose reciprocal is `factor`; 1 / factor without such a number."""
    plain = reciprocal(factor)
    short = np.float32(plain.astype(BF16.value))
    return short if reciprocal(short) == factor else plain
