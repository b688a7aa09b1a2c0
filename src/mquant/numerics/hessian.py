"""The Hessian of a linear module's output error, from the module's inputs X [n, in].

The output error of a weight W [out, in] that is rounded to Q is, summed over tokens,

    sum of ((W - Q) @ x)**2 = trace of E @ H @ E.T,    E = W - Q,    H = X.T @ X.

`Curvature` is H made ready for rounding: damped, its columns in the order of rounding, and factored
into H = A @ D @ A.T, A unit upper triangular and D diagonal. Sums are F32 and by BLAS, which adds
in the same order as long as it uses one thread.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mquant.numerics.floats import Array, Floats
from mquant.numerics.nvfp4 import GROUP

_TOKENS: Final = 4096
"""Inputs that are multiplied at once: sums over more tokens add the sums of these."""
_WIDTH: Final = 128
"""Columns that are factored at once."""
_NEAR: Final = 512
"""Columns that compensate each other when scales are chosen."""
_PRODUCTS: Final = 8
"""Products that are in memory at a time, if threads make them."""

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


def hessian_of(inputs: Floats, rows: Map = map) -> Floats:
    """Return X.T @ X, float32 [in, in], of inputs X, float32 [n, in].

    `rows`: the function that maps work over slices of the inputs, which may use threads.
    """
    hessian: Floats = np.zeros((inputs.shape[1],) * 2, np.float32)
    add_inputs(hessian, inputs, rows)
    return hessian


def add_inputs(hessian: Floats, inputs: Floats, rows: Map = map) -> None:
    """Add X.T @ X of inputs X, float32 [n, in], to a Hessian, float32 [in, in].

    The same calls in the same order give the same bytes, whatever `rows` (see `hessian_of`).
    """
    parts = [inputs[start : start + _TOKENS] for start in range(0, len(inputs), _TOKENS)]
    for first in range(0, len(parts), _PRODUCTS):
        for product in rows(_product, parts[first : first + _PRODUCTS]):
            hessian += product


def _product(part: Floats) -> Floats:
    product: Floats = part.T @ part  # numpy asks BLAS for one triangle, and mirrors it
    return product


def extra_damp(tokens: int, columns: int) -> float:
    """Return how much more a Hessian is damped that sums the inputs of few tokens.

    Such a Hessian does not know most directions of the inputs, and rounding would put all errors
    there. Half of columns / tokens is near the best on held-out text from 0.4 to 60 tokens a column
    (docs/lab-log.md).
    """
    return columns / (2 * tokens)


def damped(hessian: Floats, damp: float) -> Floats:
    """Return the Hessian with `damp` times its mean diagonal added to the diagonal.

    As llmcompressor's GPTQ, except for dead columns, whose input is always 0: they get the mean
    diagonal of the others, and keep their weights. If no input is known, the result is diagonal.
    The result is divided by the power of two near the mean: only ratios matter for rounding.
    """
    diagonal = hessian.diagonal().astype(np.float64)
    alive = diagonal > 0
    mean = diagonal[alive].mean() if alive.any() else 1.0
    unit = 2.0 ** -np.clip(np.round(np.log2(mean)), -126, 126)
    result: Floats = hessian * np.float32(unit)
    np.fill_diagonal(result, unit * (np.where(alive, diagonal, mean) + damp * mean))
    return result


@dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """A damped Hessian ready for rounding, its columns in the order in which they are rounded.

    `order`, intp [in]: the column at each place. `hessian`, float32 [in, in]. `feedback`, float32
    [in, in]: A of hessian = A @ D @ A.T, with zeros below its diagonal. `pivots`, float32 [in]: the
    diagonal of D.
    """

    order: npt.NDArray[np.intp]
    hessian: Floats
    feedback: Floats
    pivots: Floats

    def compensated_blocks(self) -> Array:
        """Return the Hessian of each 16 columns in stored order, float64 [in / 16, 16, 16].

        That is what an error in these columns costs if other columns compensate it at best: the
        inverse of the block of the inverse (H's Schur complement). Only columns that are rounded
        near it count: with all columns the outputs' error is smaller by half a percent.
        """
        near, place = self._near_inverses()
        columns = place.reshape(-1, GROUP)
        rows, others = columns[:, :, None], columns[:, None, :]
        together = rows // _NEAR == others // _NEAR
        return np.linalg.inv(np.where(together, near[rows, others % _NEAR], 0))

    def compensated_diagonal(self) -> Array:
        """Return the same for each column alone, float64 [in]."""
        near, place = self._near_inverses()
        result: Array = 1 / near[place, place % _NEAR]
        return result

    def _near_inverses(self) -> tuple[Array, Array]:
        """Return the inverses of blocks on the diagonal, and each stored column's place.

        The inverses are float64 [in, _NEAR], one below the other, in the order of rounding.
        """
        columns = len(self.order)
        near = np.zeros((columns, _NEAR))
        for start in range(0, columns, _NEAR):
            block = self.hessian[start : start + _NEAR, start : start + _NEAR]
            near[start : start + _NEAR, : len(block)] = np.linalg.inv(block.astype(np.float64))
        place = np.empty(columns, np.intp)
        place[self.order] = np.arange(columns)
        return near, place


def curvature(hessian: Floats, damp: float, *, descending: bool) -> Curvature:
    """Damp, order and factor a Hessian, float32 [in, in].

    `descending`: columns with a large diagonal are rounded first, so that many columns are left to
    compensate their errors; otherwise columns are rounded as they are stored. A Hessian that has no
    factors (F32 sums of few tokens can be a little indefinite) is damped ten times as much, until
    it has factors. Raises ValueError if a sum of squares is not finite.
    """
    if not np.isfinite(hessian.diagonal()).all():
        raise ValueError("the inputs are too large: the sum of their squares is not finite")
    order = np.arange(len(hessian))
    if descending:
        order = np.argsort(-hessian.diagonal(), kind="stable")
    while True:
        ordered = damped(hessian, damp)
        if descending:
            ordered = np.take(ordered[order], order, axis=1)
        feedback = np.triu(ordered)
        try:
            pivots = _factor(feedback)
        except np.linalg.LinAlgError:
            damp = max(damp, 1e-4) * 10
        else:
            return Curvature(order, ordered, feedback, pivots)


def _factor(matrix: Floats) -> Floats:
    """Overwrite the upper triangle of H by A of H = A @ D @ A.T; return the diagonal of D.

    Blocks of columns are factored from the last to the first. With R = A @ D**0.5 a block of H is
    the product of R's later columns, which is subtracted, plus that of the block's own columns: the
    square on the diagonal is factored, and the rows above are multiplied by its inverse.
    """
    columns = len(matrix)
    for start in reversed(range(0, columns, _WIDTH)):
        end = min(start + _WIDTH, columns)
        block = matrix[:end, start:end]
        if end < columns:
            block -= matrix[:end, end:] @ matrix[start:end, end:].T
        square = block[start:].astype(np.float64)
        square = np.triu(square) + np.triu(square, 1).T
        factor = np.linalg.cholesky(square[::-1, ::-1])[::-1, ::-1]
        block[:start] = block[:start] @ np.linalg.inv(factor).T.astype(np.float32)
        block[start:] = factor
    roots = matrix.diagonal().copy()
    matrix /= roots
    return roots * roots
