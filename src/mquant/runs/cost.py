"""What it costs to quantize weights that the source stores quantized: measured on a few of them."""

from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mquant.checkpoint import Source, reader_of
from mquant.events import Note
from mquant.plan import Plan, WorkUnit
from mquant.text import plural

if TYPE_CHECKING:
    from mquant.engines.importance import Importance

_SAMPLED: Final = 8
"""The number of fused sets, spread over the model, that are measured for each format and scheme."""
_MOST_BYTES: Final = 128_000_000
"""The most bytes, in BF16, of a set that is measured, if there are smaller sets."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The relative error of weights that are rounded a second time, against the source's weights.

    `error` is the root of the sum of squared errors over the sum of squares, of `weights` weights
    out of `of`.
    """

    format: str
    scheme: str
    error: float
    weights: int
    of: int

    @property
    def note(self) -> Note:
        """The cost in words."""
        return Note(
            "info",
            f"{self.format} to {self.scheme}: a relative error of {self.error:.2%} against the "
            f"source's weights, measured on {self.weights:,} of {plural(self.of, 'weight')}.",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the cost as JSON."""
        return {
            "format": self.format,
            "scheme": self.scheme,
            "relative_error": round(self.error, 6),
            "weights_measured": self.weights,
            "weights": self.of,
        }


def measure_cost(plan: Plan, source: Source, importance: "Importance | None") -> list[Cost]:
    """Return the cost for each format of the source and scheme; empty if nothing is rounded twice.

    A few fused sets are quantized again in memory. Raises SourceError if the source cannot be read.
    """
    groups: dict[tuple[str, str], list[WorkUnit]] = defaultdict(list)
    for unit in plan.units:
        first = unit.actions[0]
        if first.kind == "quantize" and first.scheme and all(a.stored for a in unit.actions):
            stored = first.stored
            groups[stored.described if stored else "", first.scheme.name].append(unit)
    if not groups:
        return []
    from mquant.engines.importance import weigher  # numba
    from mquant.engines.rounding_error import squared_error

    costs = []
    with closing(reader_of(source)) as reader:
        for (name, scheme), units in sorted(groups.items()):
            sample = _sample(units)
            weigh = weigher(plan.recipe, importance)
            sums = [squared_error(reader, unit, weigh) for unit in sample]
            error, power = (sum(column) for column in zip(*sums, strict=True))
            costs.append(
                Cost(
                    name,
                    scheme,
                    (error / power) ** 0.5 if power else 0.0,
                    sum(len(unit.actions) for unit in sample),
                    sum(len(unit.actions) for unit in units),
                )
            )
    return costs


def _sample(units: list[WorkUnit]) -> list[WorkUnit]:
    """Return a few fused sets, the first and the last among them; large sets only if all are."""
    small = [unit for unit in units if unit.weight_bytes <= _MOST_BYTES]
    small = small or [min(units, key=lambda unit: unit.weight_bytes)]
    places = {i * (len(small) - 1) // (_SAMPLED - 1) for i in range(_SAMPLED)}
    return [small[place] for place in sorted(places)]
