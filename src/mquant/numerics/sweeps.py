"""Sweeps over the columns of a weight: each is rounded given the errors of all other columns.

For errors E = W - Q [out, in] and a matrix A with ones on its diagonal, a sweep visits one column
after another and rounds

    target[j] = W[:, j] + sum over k != j of E[:, k] * A[k, j]

to the nearest point of the grid. With A = the unit upper triangular factor of the Hessian H
(`hessian.Curvature`) a sweep is GPTQ: the errors of the columns before are compensated (this form,
without an inverse of H, is LDLQ of QuIP, arXiv 2307.13304, which proves the two the same). With
A = H / its diagonal, `target` is where the trace of E @ H @ E.T is smallest if only column j
changes: so the sweep is a step of coordinate descent, and no sweep makes the trace larger.

The sum over the columns outside of a block of columns is a product by BLAS, and nearly all of the
work. Arrays are transposed, [in, out], so that loops over rows of the weight are vectorized.
"""

from typing import Any, Final, NamedTuple

import numpy as np

from mquant.compiled import compiled
from mquant.numerics.floats import Array, Floats

_COLUMNS: Final = 128
"""Columns of a block: fewer make the products slow, more the compiled loops."""
_TILE: Final = 64  # rows of the weight at once: a block of their errors stays in the nearest cache
_AT_ONCE: Final = 16  # rows that are turned at once: a cache line
_ONES: Final = np.float32(1.5 * 2**23)
"""Adding and subtracting _ONES rounds a number to the nearest integer, half to even."""


class Grid(NamedTuple):
    """The numbers that a code can mean, before scaling: those of a small float, or integers.

    `low` and `high` are the ends. Between a power of two and the next there are `_ONES / ones`
    steps of equal size; below the power of two `normal` the step stays the same. Integers are all
    below.
    """

    low: np.float32
    high: np.float32
    normal: np.float32
    ones: np.float32


def _grid(low: float, high: float, normal: float, steps: int) -> Grid:
    return Grid(np.float32(low), np.float32(high), np.float32(normal), np.float32(_ONES / steps))


E2M1_GRID: Final = _grid(-6, 6, 1, steps=2)
E4M3_GRID: Final = _grid(-448, 448, 2.0**-6, steps=8)


def integers(bits: int) -> Grid:
    """Return the grid of signed integers of some bits."""
    half = 1 << (bits - 1)
    return _grid(-half, half - 1, half, steps=half)


class Divisors(NamedTuple):
    """What a number's code is multiplied by: `scales[group[j]]` for column j.

    `scales`, float32 [groups, out]; `group`, intp [in].
    """

    scales: Floats
    group: Array


def sweep(
    weights: Floats,
    errors: Floats,
    feedback: Floats,
    divisors: Divisors,
    grid: Grid,
    *,
    upper: bool,
) -> None:
    """Sweep once over the columns of `weights`, float32 [in, out], and update `errors`.

    `feedback`, float32 [in, in], is A. `upper`: A is zero below its diagonal, whatever is stored
    there, and `errors` must be zero before the sweep.
    """
    columns, rows = weights.shape
    products = np.empty((_COLUMNS, rows), np.float32)
    for start in range(0, columns, _COLUMNS):
        end = min(start + _COLUMNS, columns)
        others = start if upper else columns
        sums = products[: end - start]
        np.matmul(feedback[:others, start:end].T, errors[:others], out=sums)
        block = slice(start, end)
        _sweep(
            weights[block],
            errors[block],
            sums,
            np.ascontiguousarray(feedback[block, block]),
            divisors.scales,
            divisors.group[block],
            grid,
        )


def contract(function: Any) -> Any:
    """Compile a function whose products and sums may be fused."""
    return compiled(function, fastmath={"contract"})


@contract
def _sweep(
    weights: Array,
    errors: Array,
    sums: Array,
    feedback: Array,
    scales: Array,
    group: Array,
    grid: Any,
) -> None:
    """Round the columns of a block; `sums` hold all products with the errors before the sweep.

    What changes within the block is added here: a column's changes times A.
    """
    columns, rows = weights.shape
    changes = np.empty((columns, _TILE), np.float32)
    target = np.empty(_TILE, np.float32)
    for first in range(0, rows, _TILE):
        n = min(_TILE, rows - first)
        part = slice(first, first + n)
        for j in range(columns):
            old, weight = errors[j, part], weights[j, part]
            _start(weight, old, sums[j, part], target[:n])
            _add_products(changes, feedback, j, target[:n])
            _round(target[:n], weight, scales[group[j], part], grid, old, changes[j, :n])


@contract
def _start(weight: Array, old: Array, sums: Array, target: Array) -> None:
    for r in range(target.size):
        target[r] = (weight[r] - old[r]) + sums[r]


@contract
def _add_products(changes: Array, feedback: Array, j: int, target: Array) -> None:
    """Add the changes of the columns before column j, times A, to column j's target."""
    fours = j // 4 * 4
    for k in range(0, fours, 4):  # four at once, so that targets are stored less often
        a0, a1, a2, a3 = feedback[k, j], feedback[k + 1, j], feedback[k + 2, j], feedback[k + 3, j]
        c0, c1, c2, c3 = changes[k], changes[k + 1], changes[k + 2], changes[k + 3]
        for r in range(target.size):
            target[r] = target[r] + c0[r] * a0 + c1[r] * a1 + c2[r] * a2 + c3[r] * a3
    for k in range(fours, j):
        a, c = feedback[k, j], changes[k]
        for r in range(target.size):
            target[r] = target[r] + c[r] * a


@contract
def _round(
    target: Array, weight: Array, scale: Array, grid: Any, errors: Array, changes: Array
) -> None:
    low, high, normal, ones = grid
    for r in range(target.size):
        error = weight[r] - nearest(target[r] / scale[r], low, high, normal, ones) * scale[r]
        changes[r] = error - errors[r]
        errors[r] = error


@compiled
def nearest(x: Any, low: Any, high: Any, normal: Any, ones: Any) -> Any:
    """Return the nearest point of a grid: adding a far larger number rounds to the grid's step."""
    x = min(max(x, low), high)
    binade = np.float32(max(abs(x), normal)).view(np.uint32) & np.uint32(0x7F800000)
    shift = np.uint32(binade).view(np.float32) * ones
    return (x + shift) - shift


@compiled
def turn(weight: Array, order: Array, turned: Array) -> None:
    """Write the columns of a weight [out, in], in some order, to the rows of `turned` [in, out]."""
    rows = weight.shape[0]
    for first in range(0, rows, _AT_ONCE):
        n = min(_AT_ONCE, rows - first)
        for j in range(order.size):
            column, row = order[j], turned[j, first : first + n]
            for r in range(n):
                row[r] = weight[first + r, column]


@compiled
def nearest_points(
    weights: Array, errors: Array, divisors: Any, grid: Any, order: Array, points: Array
) -> None:
    """Write the grid points of (weights - errors) / scale, and undo `turn`.

    `weights` and `errors` are float32 [in, out], `points` is float32 [out, in]. A tiny negative
    number becomes -0.0.
    """
    scales, group = divisors
    low, high, normal, ones = grid
    rows = points.shape[0]
    found = np.empty(_AT_ONCE, np.float32)
    for first in range(0, rows, _AT_ONCE):
        n = min(_AT_ONCE, rows - first)
        part = slice(first, first + n)
        for j in range(order.size):
            column = order[j]
            w, e, s = weights[j, part], errors[j, part], scales[group[j], part]
            for r in range(n):
                value = w[r] - e[r]
                point = nearest(value / s[r], low, high, normal, ones)
                found[r] = -abs(point) if value < np.float32(0) else point
            for r in range(n):
                points[first + r, column] = found[r]
