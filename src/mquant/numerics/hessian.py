"""The Hessian of a linear module's output error, from the module's inputs X [n, in].

The output error of a weight W [out, in] that is rounded to Q is, summed over tokens,

    sum of ((W - Q) @ x)**2 = trace of E @ H @ E.T,    E = W - Q,    H = X.T @ X.

`Curvature` is H made ready for rounding: damped, its columns in the order of rounding, and factored
into H = A @ D @ A.T, A unit upper triangular and D diagonal. Sums are F32 and by BLAS, which adds
in the same order as long as it uses one thread.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from mquant.numerics.floats import Array, Floats
from mquant.numerics.nvfp4 import GROUP

_TOKENS: Final = 4096
"""Inputs that are multiplied at once: sums over more tokens add the sums of these."""
_WIDTH: Final = 128
"""Columns that are factored at once."""


def hessian_of(inputs: Floats) -> Floats:
    """Return X.T @ X, float32 [in, in], of inputs X, float32 [n, in]."""
    hessian: Floats = np.zeros((inputs.shape[1],) * 2, np.float32)
    add_inputs(hessian, inputs)
    return hessian


def add_inputs(hessian: Floats, inputs: Floats) -> None:
    """Add X.T @ X of inputs X, float32 [n, in], to a Hessian, float32 [in, in].

    The same calls in the same order give the same bytes.
    """
    for start in range(0, len(inputs), _TOKENS):
        part = inputs[start : start + _TOKENS]
        hessian += part.T @ part  # numpy asks BLAS for one triangle, and mirrors it


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
    """
    diagonal = hessian.diagonal().astype(np.float64)
    alive = diagonal > 0
    mean = diagonal[alive].mean() if alive.any() else 1.0
    result = hessian.copy()
    np.fill_diagonal(result, np.where(alive, diagonal, mean) + damp * mean)
    return result


def diagonal_blocks(matrix: Array) -> Array:
    """Return the blocks of 16 x 16 on the diagonal, [in / 16, 16, 16]."""
    count = len(matrix) // GROUP
    blocks = matrix.reshape(count, GROUP, count, GROUP)
    result: Array = blocks[np.arange(count), :, np.arange(count)]
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

        That is what an error in these columns costs if all other columns compensate it at best: the
        inverse of the block of the inverse (H's Schur complement).
        """
        roots = self._inverse_roots()
        sides = roots.reshape(-1, GROUP, len(roots))
        inverses = sides @ sides.transpose(0, 2, 1)
        return np.linalg.inv(inverses.astype(np.float64))

    def compensated_diagonal(self) -> Floats:
        """Return the same for each column alone, float32 [in]."""
        roots = self._inverse_roots()
        result: Floats = 1 / np.einsum("ij,ij->i", roots, roots)
        return result

    def _inverse_roots(self) -> Floats:
        """Return V of inverse(H) = V @ V.T, float32 [in, in], its rows in stored order."""
        roots = _inverse_transposed(self.feedback)
        roots /= np.sqrt(self.pivots)
        stored: Floats = np.empty_like(roots)
        stored[self.order] = roots
        return stored


def curvature(hessian: Floats, damp: float, *, descending: bool) -> Curvature:
    """Damp, order and factor a Hessian, float32 [in, in].

    `descending`: columns with a large diagonal are rounded first, so that many columns are left to
    compensate their errors; otherwise columns are rounded as they are stored. A Hessian that has no
    factors (F32 sums of few tokens can be a little indefinite) is damped ten times as much, until
    it has factors.
    """
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


def _inverse_transposed(unit: Floats) -> Floats:
    """Return inverse(A).T of a unit upper triangular A: blocks of rows from the first to the last.

    A.T @ inverse(A).T = 1, so the rows of a block follow from the rows before. The product with
    these is done in pieces of columns, of which most zeros are left out.
    """
    columns = len(unit)
    result = np.zeros_like(unit)
    for start in range(0, columns, _WIDTH):
        end = min(start + _WIDTH, columns)
        own = np.linalg.inv(unit[start:end, start:end].astype(np.float64)).T.astype(np.float32)
        rows = result[start:end]
        for first in range(0, start, 4 * _WIDTH):
            part = slice(first, min(first + 4 * _WIDTH, start))
            rows[:, part] = unit[first:start, start:end].T @ result[first:start, part]
        rows[:, :start] = -own @ rows[:, :start]
        rows[:, start:end] = own
    return result
