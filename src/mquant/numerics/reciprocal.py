"""Global scales in two conventions: a divisor in compressed-tensors, a factor in ModelOpt.

In F32 the reciprocal of a reciprocal is not always the number itself: of 26 of the 128 mantissas
of BF16 it is the neighbour, and of one in six of all F32. But no two BF16 numbers share a
reciprocal; so of those that come from BF16 weights nothing is lost.
"""

import numpy as np

from mquant.numerics.formats import BF16


def reciprocal(scale: np.float32) -> np.float32:
    """1 / scale, rounded; infinite if that is too large."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.float32(1) / scale


def recovered(factor: np.float32) -> np.float32:
    """A number whose reciprocal is `factor`; a BF16 number if there is one."""
    plain = reciprocal(factor)
    short = np.float32(plain.astype(BF16.value))
    return short if reciprocal(short) == factor else plain
