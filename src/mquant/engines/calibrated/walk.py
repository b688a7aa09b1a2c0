"""The pass of calibration text through a model: one layer after another, all samples at once.

Memory holds the hidden states of all samples, and one layer's activations. After each layer the
hidden states are saved, so that a run that is stopped goes on after the last saved layer.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np

from mquant.events import Emit, Progress, silent
from mquant.forward.decoder import Model
from mquant.forward.linears import Linears
from mquant.forward.tensors import Integers
from mquant.weights.decode import Floats


class Saved(NamedTuple):
    """The hidden states, float32 [n, hidden], after `layers` layers.

    `said` is what the listener told of these layers, as JSON.
    """

    layers: int
    hidden: Floats
    said: Mapping[str, Any]


class States(Protocol):
    """A place for the hidden states of a run that may be stopped."""

    def read(self) -> Saved | None:
        """Return what was saved last; None if there is nothing, or nothing whole."""

    def save(self, saved: Saved) -> None:
        """Save durably, in place of what was saved before."""


class Listener(Linears, Protocol):
    """A calibration method: the giver of weights in the pass, which keeps what it must know."""

    @property
    def said(self) -> Mapping[str, Any]:
        """What the method tells of the layers so far, as JSON."""

    def resume(self, saved: Saved) -> bool:
        """Take over what an earlier run saved; return False if the pass must begin afresh."""

    def begin(self, number: int) -> None:
        """Hear that a layer begins."""

    def end(self, number: int) -> None:
        """Hear that a layer is computed. What the method wrote must be durable in the end."""


def walk(
    model: Model,
    samples: Sequence[Integers],
    listener: Listener,
    states: States | None = None,
    emit: Emit = silent,
) -> None:
    """Send the samples, vectors of token ids, through all layers.

    With `states`, the pass goes on after the last layer that is saved there. `emit` receives the
    bytes of the weights whose layers are done. Raises SourceError if a weight cannot be read, or if
    the model gives NaN or infinity.
    """
    ends = list(accumulate(len(sample) for sample in samples))
    windows = [slice(end - len(sample), end) for sample, end in zip(samples, ends, strict=True)]
    saved = states.read() if states else None
    if saved is None or not listener.resume(saved):
        saved = Saved(0, model.embed(np.concatenate(samples)), {})
    hidden = saved.hidden
    sizes = [model.nbytes(f"{model.base}layers.{number}.") for number in range(model.shape.layers)]

    def tell(done: int) -> None:
        part = f"layer {min(done + 1, len(sizes)):,} of {len(sizes):,}"
        emit(Progress("calibrate", sum(sizes[:done]), sum(sizes), part=part))

    tell(saved.layers)
    with np.errstate(all="ignore"):  # numbers that are not finite are an error, no warning
        model.check_finite(hidden, "the embeddings give", f"{model.base}embed_tokens.")
        for number in range(saved.layers, model.shape.layers):
            listener.begin(number)
            model.layer(number, hidden, windows, listener)
            part = f"{model.base}layers.{number}."
            model.check_finite(hidden, f"layer {number} gives", part)
            listener.end(number)
            if states:
                states.save(Saved(number + 1, hidden, listener.said))
            tell(number + 1)
