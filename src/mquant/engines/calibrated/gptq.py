"""GPTQ: each fused set is rounded so that its outputs on the calibration data change least."""

from mquant.engines.calibrated.quantizing import Inputs, Round
from mquant.numerics.floats import FLOATS
from mquant.numerics.gptq import Rounded, Rounding, prepare_rounding, round_set
from mquant.numerics.hessian import Map, hessian_of
from mquant.plan import Plan, WorkUnit
from mquant.weights.decode import Floats


def gptq(plan: Plan) -> Round:
    """Return the arithmetic of a plan whose recipe has `rounding: gptq`; compile it first."""
    recipe = plan.recipe
    rounding = Rounding(scales=recipe.scales, order=recipe.order, sweeps=recipe.sweeps)
    for scheme in plan.schemes:
        prepare_rounding(scheme, rounding)

    def round_(
        weights: list[Floats], inputs: Inputs | None, unit: WorkUnit, rows: Map
    ) -> list[Rounded]:
        if unit.scheme is None:
            raise TypeError("a unit without a scheme is not quantized")
        hessian = tokens = None
        if inputs is not None:
            hessian, tokens = hessian_of(inputs.own, rows), len(inputs.own)
            if inputs.prior is not None:
                hessian, tokens = hessian + inputs.prior, tokens + len(inputs.prior)
        own = FLOATS[unit.actions[0].source.dtype]
        return round_set(weights, hessian, unit.scheme, rounding, rows=rows, own=own, tokens=tokens)

    return round_
