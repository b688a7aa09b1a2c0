"""NVFP4 block scales found by search: the smallest error of the outputs, block by block.

For a block x of 16 weights and the Hessian B [16, 16] of its inputs, factored into A @ D @ A.T
(`hessian`), every block takes the E4M3 code c of the smallest

    error(c) = e @ B @ e = sum over j of D[j] * (e @ A)[j]**2,    e = x - q * d,    d = E4M3[c] / G.

There are two ways to choose q. Rounded to nearest, q[j] is the E2M1 value next to x[j] / d, as in a
weight that is only rounded. Compensated, q[j] is the value next to the target that cancels the
errors of the elements before it, (x[j] + sum over k < j of e[k] * A[k, j]) / d, which foretells
what a sweep of `sweeps` will choose: then the error is D[j] times the square of what is left.

The codes that are tried, and those that are refused, are those of `scale_search`, whose search also
gives the global scale G. Under a Hessian a code further above can be the best: one block in forty,
by a tenth of its error.
"""

from typing import Any, Final, NamedTuple

import numpy as np

from mquant.compiled import compiled
from mquant.numerics.floats import Array, Bytes, Floats
from mquant.numerics.nvfp4 import GROUP
from mquant.numerics.scale_search import (
    BELOW,
    centers,
    divisors_under,
    keep,
    look_up,
    power_of,
)
from mquant.numerics.sweeps import E2M1_GRID, contract, nearest

_TILE: Final = 128  # blocks at once, of the same columns


class BlockHessians(NamedTuple):
    """Factored Hessians of the blocks of 16 columns, elements by descending diagonal.

    `order`, intp [in / 16, 16]: the element at each place. `feedback`, float32 [in / 16, 16, 16]: A
    less the identity, upper triangular. `pivots`, float32 [in / 16, 16]: the diagonals of D, whose
    largest number is 1.
    """

    order: Array
    feedback: Floats
    pivots: Floats


def factored(blocks: Array) -> BlockHessians:
    """Factor Hessians, [in / 16, 16, 16], that are positive definite."""
    blocks = blocks.astype(np.float64)
    order = np.argsort(-np.diagonal(blocks, axis1=1, axis2=2), axis=1, kind="stable")
    ordered = np.take_along_axis(blocks, order[:, :, None], 1)
    ordered = np.take_along_axis(ordered, order[:, None, :], 2)
    roots = np.linalg.cholesky(ordered[:, ::-1, ::-1])[:, ::-1, ::-1]
    diagonal = np.diagonal(roots, axis1=1, axis2=2)
    feedback = (roots / diagonal[:, None, :] - np.eye(GROUP)).astype(np.float32)
    return BlockHessians(order, feedback, np.square(diagonal / diagonal.max()).astype(np.float32))


def search_codes(
    weight: Floats, hessians: BlockHessians, shared: np.float32, *, compensated: bool
) -> Bytes:
    """Return E4M3 codes, uint8 [out, in / 16], of a weight, float32 [out, in], of finite numbers.

    `shared` is the global scale of the fused set.
    """
    power = power_of(shared)
    codes = np.empty((len(weight), len(hessians.order)), np.uint8)
    under = (shared / power, *divisors_under(np.asarray(shared), power))
    _search(np.ascontiguousarray(weight), power, hessians, under, compensated, codes)
    return codes


@compiled
def _search(
    weight: Array, power: Any, hessians: Any, under: Any, compensated: bool, codes: Array
) -> None:
    orders, feedbacks, pivots = hessians
    ratio, divisors, inverse = under
    x, e = np.empty((GROUP, _TILE), np.float32), np.zeros((GROUP, _TILE), np.float32)
    largest, best = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    chosen = np.empty(_TILE, np.uint8)
    for block in range(codes.shape[1]):
        feedback, pivot = feedbacks[block], pivots[block]
        columns = block * GROUP + orders[block]
        for first in range(0, codes.shape[0], _TILE):
            n = min(_TILE, codes.shape[0] - first)
            _load(weight[first : first + n], columns, power, x, largest)
            found = largest[:n], best[:n], chosen[:n]
            _choose(x, e, (feedback, pivot, compensated), ratio, divisors, inverse, found)
            for r in range(n):
                codes[first + r, block] = chosen[r]


@compiled
def _load(weight: Array, columns: Array, power: Any, x: Array, largest: Array) -> None:
    """Write blocks to `x`, a block per column, and their largest magnitudes to `largest`."""
    for r in range(weight.shape[0]):
        row, most = weight[r], np.float32(0)
        for i in range(GROUP):
            value = row[columns[i]] * power
            x[i, r] = value
            most = max(most, abs(value))
        largest[r] = most


@compiled
def _choose(
    x: Array, e: Array, hessian: Any, ratio: Any, divisors: Array, inverse: Array, found: Any
) -> None:
    """Write the best codes of blocks, a column of `x` each, to the last of `found`."""
    largest, best, codes = found
    errors, d = np.empty(best.size, np.float32), np.empty(best.size, np.float32)
    over_d, center = np.empty(best.size, np.float32), np.empty(best.size, np.int32)
    above = centers(largest, ratio, center, codes)
    look_up(codes, divisors, inverse, 0, d, over_d)
    _errors(x, e, hessian, d, over_d, best)
    for number in range(1, above + BELOW + 1):
        step = number if number <= above else above - number
        look_up(center, divisors, inverse, step, d, over_d)
        _errors(x, e, hessian, d, over_d, errors)
        keep(errors, d, largest, center, step, best, codes)


@contract
def _errors(x: Array, e: Array, hessian: Any, d: Array, over_d: Array, errors: Array) -> None:
    """Write the errors of blocks, a column of `x` each, under their scales `d`."""
    feedback, pivots, compensated = hessian
    low, high, normal, ones = E2M1_GRID
    target = np.empty(errors.size, np.float32)
    for r in range(errors.size):
        errors[r] = 0
    for j in range(GROUP):
        element, error, pivot = x[j], e[j], pivots[j]
        for r in range(errors.size):
            target[r] = element[r]
        for k in range(0, j, 4):  # four at once; the factors from row j on are zero
            f0, f1, f2, f3 = (
                feedback[k, j],
                feedback[k + 1, j],
                feedback[k + 2, j],
                feedback[k + 3, j],
            )
            e0, e1, e2, e3 = e[k], e[k + 1], e[k + 2], e[k + 3]
            for r in range(errors.size):
                target[r] = target[r] + f0 * e0[r] + f1 * e1[r] + f2 * e2[r] + f3 * e3[r]
        for r in range(errors.size):
            wanted = target[r] if compensated else element[r]
            value = nearest(wanted * over_d[r], low, high, normal, ones) * d[r]
            error[r] = element[r] - value
            left = target[r] - value
            errors[r] += pivot * (left * left)
