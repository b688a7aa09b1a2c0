"""Say why a part of a model gives NaN or infinity."""

from collections.abc import Iterable
from typing import Final

import numpy as np

from mquant.errors import SourceError
from mquant.weights.matrix import Matrix, Scratch

_ELEMENTS: Final = 4 << 20


def not_finite(
    source: str, gives: str, matrices: Iterable[Matrix], scratch: Scratch
) -> SourceError:
    """Return the error for a part of a model that `gives` NaN or infinity.

    The error names the first weight that is not finite. If all `matrices` of the part are finite,
    the computation overflows, and the error names the largest weight. Raises SourceError if a
    weight cannot be read.
    """
    message = f"{source} cannot be evaluated: {gives} NaN or infinity"
    largest, where = 0.0, ""
    for matrix in matrices:
        size = _largest(matrix, scratch)
        if not np.isfinite(size):
            return SourceError(
                f"{message}: {matrix.name} holds such numbers.",
                "Get the checkpoint again, or repair it: mquant repair SRC --from PARENT.",
            )
        if size >= largest:
            largest, where = size, matrix.name
    return SourceError(
        f"{message}, although the weights there are finite: float32 is too small for the results. "
        f"The largest weight is {largest:.3g}, in {where}.",
        "Look whether the parent has weights of that size: mquant compare SRC --against PARENT.",
    )


def _largest(matrix: Matrix, scratch: Scratch) -> float:
    """Return the largest absolute value; NaN or infinity if the weight holds one."""
    rows, columns = matrix.shape
    step = max(1, _ELEMENTS // max(1, columns))
    largest = 0.0
    for first in range(0, rows, step):
        last = min(first + step, rows)
        values = scratch.floats("largest", (last - first, columns))
        matrix.read(first, last, values, scratch)
        size = float(np.abs(values).max(initial=0))
        if not np.isfinite(size):
            return size
        largest = max(largest, size)
    return largest
