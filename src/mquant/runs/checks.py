"""Checks of a run: the weights that an engine can read, and the headers that the run wrote."""

from contextlib import closing

import numpy as np

from mquant.checkpoint import Source, read_header, reader_of
from mquant.errors import EngineError, Refused, SourceError, UsageError
from mquant.plan import Plan
from mquant.verify.numbers import PACKED_SHAPE_DIFFERS
from mquant.verify.tally import Tally


def check_headers_as_planned(made: Source, plan: Plan) -> None:
    """Raise EngineError if a shard's tensors, dtypes or shapes are not those of the plan.

    The headers are read back from `made`.
    """
    for shard in plan.shards:
        written = {(t.name, t.dtype, t.shape) for t in read_header(made, shard.name)}
        planned = {(o.name, o.dtype, o.shape) for unit in shard.units for o in unit.outputs}
        if written != planned:
            tensor = min(name for name, _, _ in written ^ planned)
            raise EngineError(
                f"{shard.name} in {made.name} differs from the plan ({tensor}).",
                "Please report this error; no loader will load a folder without config.json.",
            )


def check_sizes(plan: Plan) -> None:
    """Raise Refused if packed integers do not unpack to the shape that `weight_shape` states.

    The sizes of a local source are read, 16 bytes of each weight. Those of a hub repo are read with
    the weights.
    """
    source = plan.survey.checkpoint.source
    stored = [member.stored for member in plan.survey.members if member.stored]
    sized = [(each, each.size) for each in stored if each.size]
    if not sized or not source.folders:
        return
    from mquant.engines.dequantized_rows import wrong_size  # numba

    tally = Tally()
    with closing(reader_of(source)) as reader:
        for weight, info in sized:
            raw = np.empty(info.nbytes, np.uint8)
            reader.read_into(info.shard, info.start, raw.data)
            if wrong := wrong_size(weight, raw):
                tally.add(PACKED_SHAPE_DIFFERS, info.name, wrong)
    if findings := tally.findings():
        raise Refused(findings)


def check_forward(plan: Plan, fix: str) -> None:
    """Raise UsageError, with `fix`, if mquant does not know the model's forward pass."""
    from mquant.forward.shape import shape_of  # numba

    try:
        shape_of(plan.family, plan.survey.checkpoint.config, plan.recipe.calibration.length)
    except SourceError as error:
        reason = error.message.replace("evaluated", "calibrated")
        message = f"Recipe {plan.recipe.name} needs the model's activations. {reason}"
        raise UsageError(message, fix) from None


def check_plain(plan: Plan, reader: str) -> None:
    """Raise UsageError if `reader`, which runs the model, cannot read the source's weights."""
    formats = {action.stored.format.short for action in plan.actions if action.stored}
    if formats or any(action.already for action in plan.actions):
        stored = " and ".join(sorted(formats)) or "a quantized format"
        raise UsageError(
            f"{reader} reads BF16, F16 and F32; the source's weights are stored in {stored}.",
            "Make a BF16 checkpoint first: mquant dequantize.",
        )
