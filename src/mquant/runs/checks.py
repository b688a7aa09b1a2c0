"""Checks of a run: the weights that an engine can read, and the headers that the run wrote."""

from mquant.checkpoint import Source, read_header
from mquant.errors import EngineError, UsageError
from mquant.plan import Plan


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


def check_plain(plan: Plan, reader: str) -> None:
    """Raise UsageError if `reader`, which runs the model, cannot read the source's weights."""
    formats = {action.stored.format.short for action in plan.actions if action.stored}
    if formats or any(action.already for action in plan.actions):
        stored = " and ".join(sorted(formats)) or "a quantized format"
        raise UsageError(
            f"{reader} reads BF16, F16 and F32; the source's weights are stored in {stored}.",
            "Make a BF16 checkpoint first: mquant dequantize.",
        )
