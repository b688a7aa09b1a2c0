"""The Hessian of a linear module's output error, from the module's inputs X [n, in].

The output error of a weight W [out, in] that is rounded to Q is, summed over tokens,

    sum of ((W - Q) @ x)**2 = trace of E @ H @ E.T,    E = W - Q,    H = X.T @ X.

`Curvature` is H made ready for rounding: damped, its columns in the order of rounding, and factored
into H = A @ D @ A.T with A unit upper triangular and D diagonal. All sums are F32 and by BLAS, which
adds in the same order as long as it uses one thread.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mquant.numerics.floats import Floats

_TOKENS: Final = 4096
"""Inputs that are multiplied at once: sums over more tokens add the sums of these."""
_WIDTH: Final = 256
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


class Curvature(NamedTuple):
    """A Hessian ready for rounding, its columns in the order in which they are rounded.

    `order`, intp [in]: the column at each place. `hessian`, float32 [in, in]: the damped Hessian.
    `feedback`, float32 [in, in]: A of hessian = A @ D @ A.T; nothing is said below its diagonal.
    """

    order: npt.NDArray[np.intp]
    hessian: Floats
    feedback: Floats


def damped(hessian: Floats, damp: float) -> Floats:
    """Return the Hessian with `damp` times its mean diagonal added to the diagonal.

    As llmcompressor's GPTQ. A dead column (its input is always 0) gets the mean diagonal of the
    others, so that its weights are rounded to nearest; without any input, the result is diagonal.
    """
    diagonal = hessian.diagonal().astype(np.float64)
    alive = diagonal > 0
    mean = diagonal[alive].mean() if alive.any() else 1.0
    result = hessian.copy()
    np.fill_diagonal(result, np.where(alive, diagonal, mean) + damp * mean)
    return result


def curvature(hessian: Floats, damp: float, *, descending: bool) -> Curvature:
    """Damp, order and factor a Hessian, float32 [in, in].

    `descending`: columns with a large diagonal are rounded first, so that many columns are left to
    compensate their errors; otherwise columns are rounded as they are stored. A Hessian that has no
    factors (F32 sums of few tokens can be a little indefinite) is damped ten times as much, until
    it has.
    """
    columns = len(hessian)
    order = np.arange(columns)
    if descending:
        order = np.argsort(-hessian.diagonal(), kind="stable")
    while True:
        ordered = damped(hessian, damp)
        if descending:
            ordered = ordered[order[:, None], order]
        feedback = ordered.copy()
        try:
            _factor(feedback)
        except np.linalg.LinAlgError:
            damp = max(damp, 1e-4) * 10
        else:
            return Curvature(order, ordered, feedback)


def _factor(matrix: Floats) -> None:
    """Overwrite H by A of H = A @ D @ A.T, in blocks of columns from the last to the first.

    With R = A @ D**0.5 a block of columns of H is R @ R.T of the later blocks, which is subtracted,
    plus R @ R.T of the block itself: its square part is factored, and the rows above are multiplied
    by the inverse of the factor.
    """
    columns = len(matrix)
    for start in reversed(range(0, columns, _WIDTH)):
        end = min(start + _WIDTH, columns)
        block = matrix[:end, start:end]
        if end < columns:
            block -= matrix[:end, end:] @ matrix[start:end, end:].T
        square = block[start:].astype(np.float64)
        factor = np.linalg.cholesky(square[::-1, ::-1])[::-1, ::-1]
        block[:start] = block[:start] @ np.linalg.inv(factor).T.astype(np.float32)
        block[start:] = factor
    # A's columns are R's divided by R's diagonal.
    matrix /= matrix.diagonal().copy()
