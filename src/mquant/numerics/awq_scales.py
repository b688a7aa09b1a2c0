"""AWQ's scales: factors of a weight's columns with the least error of the outputs.

Weights W [out, in] with the same inputs x are stored as Q(W * s) for a layer before them that gives
x / s. Columns with large inputs get large factors, so that they lose less. AWQ (arXiv 2306.00978)
tries few vectors s, as llmcompressor's AWQModifier does by default: all ones, and

    s = mean of |x| ** ratio / (mean of normalized |W| ** (1 - ratio) + 0.0001),  ratio = 0 to 1.

The error of s is that of the outputs of these weights (llmcompressor: of the module that holds
them), the trace of E @ H @ E.T with E = W - Q(W * s) / s and the inputs' Hessian H. Weights with
different inputs but one layer before them, as the experts of a layer, add their errors.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from mquant.numerics.floats import BF16, FloatFormat, Floats
from mquant.numerics.gptq import Rounding, round_set
from mquant.schemes import Scheme

Doubles = npt.NDArray[np.float64]

_RATIOS: Final = 19
_ROWS: Final = 256
"""Rows of a weight that are tried: enough to rank 20 vectors of factors."""


def normalized_sum(weight: Floats, width: int) -> Doubles:
    """Return the sum over rows of |W| divided by the largest |W| of each group, float64 [in].

    A group is `width` columns of a row. The mean that `candidate_factors` takes is the sum of these
    over all weights that share the factors, divided by their rows.
    """
    groups = np.abs(weight.reshape(len(weight), -1, width))
    normalized = groups / (groups.max(axis=2, keepdims=True) + np.float32(1e-6))
    result: Doubles = normalized.reshape(weight.shape).sum(axis=0, dtype=np.float64)
    return result


def candidate_factors(input_mean: Doubles, weight_mean: Doubles) -> Floats:
    """Return the vectors of factors to try, float32 [20, in].

    `input_mean`, float64 [in]: the mean of |x|; `weight_mean`, float64 [in]: see `normalized_sum`.
    The largest and the smallest factor of a vector are each other's reciprocals.
    """
    ratio = np.linspace(0, 1, _RATIOS)[:, None]
    with np.errstate(all="ignore"):
        factors = np.maximum(input_mean**ratio / (weight_mean ** (1 - ratio) + 1e-4), 1e-4)
        factors /= np.sqrt(factors.max(axis=1) * factors.min(axis=1))[:, None]
    tried = np.where(np.isfinite(factors), factors, 1)
    return np.concatenate([np.ones((1, tried.shape[1])), tried]).astype(np.float32)


def errors_of(
    weights: Sequence[Floats],
    hessian: Floats,
    scheme: Scheme,
    factors: Floats,
    own: FloatFormat = BF16,
) -> Doubles:
    """Return the error of the outputs of a fused set under each vector of factors, float64 [n].

    Some rows of each weight, float32 [out, in], stand for all. The scales are min-max scales.
    """
    rows = [weight[:: -(-len(weight) // _ROWS)] for weight in weights]
    totals = np.zeros(len(factors))
    for number, factor in enumerate(factors):
        multiplied = [(row * factor).astype(own.value).astype(np.float32) for row in rows]
        made = round_set(multiplied, None, scheme, Rounding("minmax"), own=own)
        for row, rounded, weight in zip(rows, made, weights, strict=True):
            error = row - rounded.values / factor
            lost = np.einsum("ij,ij->i", error @ hessian, error).sum(dtype=np.float64)
            totals[number] += lost * len(weight) / len(row)
    return totals
