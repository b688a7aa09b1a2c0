"""GPTQ: each fused set is rounded so that its outputs on the calibration data change least."""

from typing import Final

import numpy as np

from mquant.engines.calibrated.quantizing import Inputs, Round
from mquant.numerics.floats import FLOATS
from mquant.numerics.gptq import Map, Rounded, Rounding, hessian_of, prepare_rounding, round_set
from mquant.plan import Plan, WorkUnit
from mquant.recipe import Recipe
from mquant.weights.decode import Floats

_AT_ONCE: Final = 4096
"""The inputs that are multiplied at once: the same number whatever the number of threads."""
_SUMS: Final = 8
"""The sums over inputs that are in memory at a time."""


def gptq(plan: Plan) -> Round:
    """Return the arithmetic of a plan whose recipe has `rounding: gptq`; compile it first."""
    rounding = rounding_of(plan.recipe)
    for scheme in plan.schemes:
        prepare_rounding(scheme, rounding)

    def round_(
        weights: list[Floats], inputs: Inputs | None, unit: WorkUnit, rows: Map
    ) -> list[Rounded]:
        if unit.scheme is None:
            raise TypeError("a unit without a scheme is not quantized")
        hessian, tokens = (None, None) if inputs is None else _hessian(inputs, rows)
        own = FLOATS[unit.actions[0].source.dtype]
        return round_set(weights, hessian, unit.scheme, rounding, rows=rows, own=own, tokens=tokens)

    return round_


def rounding_of(recipe: Recipe) -> Rounding:
    """Return how a recipe with `rounding: gptq` chooses codes."""
    return Rounding(scales=recipe.scales, order=recipe.order, sweeps=recipe.sweeps)


def _hessian(inputs: Inputs, rows: Map) -> tuple[Floats, int]:
    """Return the sum of the inputs' outer products, float32 [in, in], and how many tokens it means.

    The block's mean counts as much as a token for each column, which is what a Hessian takes to
    know its directions: an expert that saw many more goes by its own, an expert that saw none goes
    by the block's. (The mean of a posterior, under a prior that is worth so many observations;
    docs/lab-log.md has what other numbers lose.)
    """
    hessian, tokens = _outer(inputs.own, rows), len(inputs.own)
    if inputs.block is not None:
        prior = _outer(inputs.block, rows)
        prior *= len(prior) / len(inputs.block)
        hessian, tokens = hessian + prior, tokens + len(prior)
    return hessian, tokens


def _outer(inputs: Floats, rows: Map) -> Floats:
    """Return X.T @ X of inputs X; the sums of slices are added in the order of the slices."""
    total = np.zeros((inputs.shape[1],) * 2, np.float32)
    parts = [inputs[at : at + _AT_ONCE] for at in range(0, len(inputs), _AT_ONCE)]
    for first in range(0, len(parts), _SUMS):
        for part in rows(hessian_of, parts[first : first + _SUMS]):
            total += part
    return total
