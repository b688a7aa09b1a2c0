"""GPTQ, and coordinate descent after GPTQ: rounding with the least error of the outputs.

Scales are fixed before codes: columns are rounded in any order, and stay in their groups, so the
format does not change. `hessian` and `sweeps` have the arithmetic.

The result is deterministic: rows are computed in slices of a fixed size, and nothing depends on
which thread computes a slice. BLAS must use one thread (`weights.matrix.Workers` sees to that).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np

from mquant.numerics.floats import BF16, Array, FloatFormat, Floats
from mquant.numerics.hessian import Curvature, Map, curvature, extra_damp, hessian_of
from mquant.numerics.scaled import Scaled, grid_of, scaled, stored
from mquant.numerics.sweeps import Divisors, Grid, nearest_points, sweep, turn
from mquant.schemes import Scheme

__all__ = ["Map", "Rounded", "Rounding", "hessian_of", "prepare_rounding", "round_set"]

_ROWS: Final = 1536
"""Rows of a slice. Slices are the same whatever the number of threads."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How codes are chosen.

    `order`: "descending" rounds columns with the largest inputs first, "stored" from the first to
    the last. `sweeps`: how often, after GPTQ, each code is chosen anew, given all other codes of
    its row. `scales`: "minmax", "search" (the smallest error of the weights) or "hessian" (the
    smallest error of the outputs, block by block). `damp`: the part of the Hessian's mean diagonal
    that is added to the diagonal, besides what few tokens ask for.
    """

    scales: Literal["minmax", "search", "hessian"] = "hessian"
    order: Literal["stored", "descending"] = "descending"
    sweeps: int = 0
    damp: float = 0.02


class Rounded(NamedTuple):
    """A quantized weight: its tensors by suffix, and the numbers that the tensors mean.

    `tensors` are those of the scheme's parts, in the parts' order, except `input_global_scale`.
    `values`, float32 [out, in], are not rounded to BF16 as loaders' are.
    """

    tensors: dict[str, Array]
    values: Floats


def round_set(
    weights: Sequence[Floats],
    hessian: Floats | None,
    scheme: Scheme,
    rounding: Rounding,
    *,
    rows: Map = map,
    own: FloatFormat = BF16,
    tokens: int | None = None,
) -> list[Rounded]:
    """Quantize the weights of a fused set, float32 [out, in] each, of finite numbers.

    `hessian`, float32 [in, in], is that of the inputs that the weights share (`hessian_of`); None
    if no inputs are known: then each weight is rounded to the nearest number. `rows`: the function
    that maps work over slices of rows, which may use threads. `own`: the weights' dtype on disk,
    which is that of some schemes' scales. `tokens`: the number of inputs of the Hessian; None if
    there are more than enough. Raises ValueError if the Hessian is not finite.
    """
    grid, curved = grid_of(scheme), None
    if hessian is not None:
        damp = rounding.damp + (extra_damp(tokens, len(hessian)) if tokens else 0)
        curved = curvature(hessian, damp, descending=rounding.order == "descending")
    alone = curved is None and rounding.scales == "hessian"
    scales = "search" if alone else rounding.scales
    sets = scaled(weights, scheme, own, scales, curved)
    work = _Work(curved, grid, rounding.sweeps)
    slices = [
        (number, slice(first, first + _ROWS))
        for number, weight in enumerate(weights)
        for first in range(0, len(weight), _ROWS)
    ]
    points = [np.empty(weight.shape, np.float32) for weight in weights]

    def one(piece: tuple[int, slice]) -> None:
        number, part = piece
        work.round(weights[number][part], sets[number], part, points[number][part])

    for _ in rows(one, slices):
        pass
    return [_rounded(p, s, scheme) for p, s in zip(points, sets, strict=True)]


def prepare_rounding(scheme: Scheme, rounding: Rounding) -> None:
    """Compile what a scheme needs, or take it from numba's cache."""
    columns = 128  # a multiple of every scheme's
    weights = [np.ones((1, columns), np.float32)]
    for hessian in (None, np.eye(columns, dtype=np.float32)):
        round_set(weights, hessian, scheme, rounding)


class _Work:
    """The rounding of rows under one Hessian."""

    def __init__(self, curved: Curvature | None, grid: Grid, sweeps: int) -> None:
        self._curved, self._grid, self._sweeps = curved, grid, sweeps
        self._full: Floats | None = None
        if curved and sweeps:
            self._full = curved.hessian / curved.hessian.diagonal()

    def round(self, weight: Floats, scales: Scaled, part: slice, points: Floats) -> None:
        """Write the grid points of a slice of rows, float32 [n, in], to `points`."""
        columns = weight.shape[1]
        curved, grid = self._curved, self._grid
        order = curved.order if curved else np.arange(columns)
        turned = np.empty((columns, len(weight)), np.float32)
        turn(weight, order, turned)
        divisors = Divisors(np.ascontiguousarray(scales.divisors[part].T), order // scales.width)
        errors = np.zeros_like(turned)
        if curved:
            sweep(turned, errors, curved.feedback, divisors, grid, upper=True)
        if self._full is not None:
            for _ in range(self._sweeps):
                sweep(turned, errors, self._full, divisors, grid, upper=False)
        nearest_points(turned, errors, divisors, grid, order, points)


def _rounded(points: Floats, scales: Scaled, scheme: Scheme) -> Rounded:
    tensors = stored(points, scales, scheme)
    return Rounded(tensors, scales.values(points))
