"""Methods that only listen: the pass goes through the weights as they are on disk."""

from collections.abc import Mapping
from threading import Lock
from typing import Any, Final

import numpy as np

from mquant.engines.calibrated.walk import Saved
from mquant.forward.decoder import Model
from mquant.plan import Plan
from mquant.weights.decode import Floats

_AT_ONCE: Final = 4096
"""The tokens that are squared at a time."""


class Listening:
    """A `Listener` that gives weights from disk, and keeps nothing."""

    def __init__(self, model: Model) -> None:
        """Listen to the pass through `model`."""
        self._model = model

    @property
    def said(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def resume(self, saved: Saved) -> bool:
        """Return False: nothing was kept."""
        return False

    def begin(self, number: int) -> None:
        """Do nothing."""

    def end(self, number: int) -> None:
        """Do nothing."""

    def weights(self, names: tuple[str, ...], inputs: Floats) -> tuple[Floats, ...]:
        """Hear the inputs, and return the weights as they are on disk."""
        self.hear(names, inputs)
        return self._model.weights(names, inputs)

    def hear_block(self, experts: str, inputs: Floats) -> None:
        """Do nothing."""

    def hear(self, names: tuple[str, ...], inputs: Floats) -> None:
        """Hear the inputs, float32 [n, in], of weights, as `Linears.weights` does."""


class MeanSquares(Listening):
    """The mean square of each input channel of each module, by hub name.

    An expert counts its own tokens only. A module that no token reached has no entry.
    """

    def __init__(self, model: Model, plan: Plan) -> None:
        """Index the modules that the plan quantizes by the forward pass's names of weights."""
        super().__init__(model)
        self._lock = Lock()
        self._modules = {
            plan.family.in_memory_name(action.source.name): action.module
            for action in plan.actions
            if action.scheme
        }
        self.means: dict[str, Floats] = {}

    def hear(self, names: tuple[str, ...], inputs: Floats) -> None:
        """Add up the squares in float64, in the order of the tokens."""
        sums = np.zeros(inputs.shape[1])
        for start in range(0, len(inputs), _AT_ONCE):
            sums += np.square(inputs[start : start + _AT_ONCE], dtype=np.float64).sum(axis=0)
        mean = (sums / len(inputs)).astype(np.float32)
        with self._lock:
            self.means |= {self._modules[n]: mean for n in names if n in self._modules}
