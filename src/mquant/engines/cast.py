"""MXFP4 weights that become NVFP4 without decoding: codes and scales, a fused set at a time.

`numerics.mx_cast` does the arithmetic. Memory holds the codes and scales of one fused set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from mquant.checkpoint.slices import ReadInto, read_whole
from mquant.errors import SourceError
from mquant.numerics.floats import Bytes
from mquant.numerics.mx_cast import (
    SAFE_OCTAVES,
    CastBlocks,
    MXWeight,
    Span,
    cast_into,
    infinite,
    scale_span,
    span,
    window,
)
from mquant.numerics.nvfp4 import GROUP
from mquant.plan import Action, Stored, WorkUnit
from mquant.text import plural

_AGAIN: Final = "Get the checkpoint again; or keep the module with the recipe's ignore list."


@dataclass(frozen=True, slots=True)
class CastWeight:
    """A weight of a fused set after the cast: NVFP4's codes and block scales, and the counts."""

    action: Action
    packed: Bytes
    scales: Bytes
    blocks: CastBlocks


def cast_unit(
    reader: ReadInto, unit: WorkUnit, buffer: Bytes, write: Callable[[str, memoryview], None]
) -> None:
    """Cast a fused set, in `buffer` of at least `unit.buffer_bytes`, and write its tensors.

    Raises SourceError for scales that are NaN, for numbers that are infinite, and as the reader.
    """
    scale, weights = _cast(reader, unit, buffer)
    for weight in weights:
        packed_name, scale_name, global_name = (o.name for o in weight.action.outputs)
        write(packed_name, weight.packed.data)
        write(scale_name, weight.scales.data)
        write(global_name, np.array([scale], "<f4").data.cast("B"))


def keeps_all(reader: ReadInto, unit: WorkUnit) -> bool:
    """Return whether a fused set's scales alone show that every block keeps its codes.

    Raises SourceError for scales that are NaN, and as the reader.
    """
    stored = [_stored(action) for action in unit.actions]
    spans = []
    for action, each in zip(unit.actions, stored, strict=True):
        scales = np.empty(each.scale.nbytes, np.uint8)
        read_whole(reader, each.scale, scales.data)
        spans.append(_without_nan(action, scale_span(scales)))
    octaves = max(s.highest for s in spans) - min(s.lowest for s in spans)
    # The two highest exponents can hold infinite numbers.
    return octaves <= SAFE_OCTAVES and max(s.highest for s in spans) < 253


def count_blocks(reader: ReadInto, unit: WorkUnit) -> list[CastBlocks]:
    """Return the counts of each weight of a fused set that is cast. Raises as `cast_unit`."""
    _, weights = _cast(reader, unit, np.empty(unit.buffer_bytes, np.uint8))
    return [weight.blocks for weight in weights]


def _cast(
    reader: ReadInto, unit: WorkUnit, buffer: Bytes
) -> tuple[np.float32, Iterator[CastWeight]]:
    """Read a fused set; return its global scale, and its weights as they are cast."""
    members: list[tuple[Action, MXWeight]] = []
    start = 0
    for action in unit.actions:  # all codes first: their places are then multiples of 16
        stored = _stored(action)
        packed = buffer[start : start + stored.codes.nbytes]
        read_whole(reader, stored.codes, packed.data)
        start += len(packed)
        members.append((action, MXWeight(packed, packed[:0])))
    for number, (action, weight) in enumerate(members):
        stored = _stored(action)
        scales = buffer[start : start + stored.scale.nbytes]
        read_whole(reader, stored.scale, scales.data)
        start += len(scales)
        members[number] = action, weight._replace(scales=scales)
    spans = [_without_nan(action, span(weight)) for action, weight in members]
    for action, weight in members:
        if count := infinite(weight):
            values = "value that is" if count == 1 else "values that are"
            raise SourceError(
                f"{action.source.name} holds {count:,} {values} infinite: it cannot be cast.",
                _AGAIN,
            )
    under = window([weight for _, weight in members], spans)

    def cast() -> Iterator[CastWeight]:
        for action, weight in members:
            scales = buffer[start : start + action.source.elements // GROUP]
            yield CastWeight(action, weight.packed, scales, cast_into(weight, under, scales))

    return under.global_scale, cast()


def _stored(action: Action) -> Stored:
    if action.stored is None:
        raise TypeError(f"{action.source.name} is not stored quantized")
    return action.stored


def _without_nan(action: Action, found: Span) -> Span:
    """Return a span. Raises SourceError if scales are NaN."""
    if found.nans:
        scales = f"{plural(found.nans, 'scale')} that {'is' if found.nans == 1 else 'are'} NaN"
        raise SourceError(
            f"{_stored(action).scale.name} holds {scales} (E8M0 255): "
            f"{action.module} cannot be cast.",
            _AGAIN,
        )
    return found
