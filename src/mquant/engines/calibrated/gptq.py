"""GPTQ: each fused set is rounded so that its outputs on the calibration data change least."""

from mquant.engines.calibrated.quantizing import FEW, Inputs, Round
from mquant.numerics.gptq import Rounded, Rounding, hessian_of, round_set
from mquant.plan import WorkUnit
from mquant.recipe import Recipe
from mquant.weights.decode import Floats


def gptq(recipe: Recipe) -> Round:
    """Return the arithmetic of a recipe with `rounding: gptq`."""
    rounding = Rounding(scales=recipe.scales, order=recipe.order, sweeps=recipe.sweeps)

    def round_(weights: list[Floats], inputs: Inputs | None, unit: WorkUnit) -> list[Rounded]:
        return round_set(weights, _hessian(inputs), unit.scheme, rounding)

    return round_


def _hessian(inputs: Inputs | None) -> Floats | None:
    """Return the sum of the inputs' outer products, float32 [in, in]; None if nothing is known.

    The block's mean counts as much as FEW tokens: an expert that saw many tokens goes by its own,
    an expert that saw none goes by the block's. (The mean of a Gaussian's posterior under a prior
    that is worth FEW observations.)
    """
    if inputs is None:
        return None
    hessian = hessian_of(inputs.own)
    if inputs.block is not None:
        prior = hessian_of(inputs.block)
        prior *= FEW / len(inputs.block)
        hessian += prior
    return hessian
