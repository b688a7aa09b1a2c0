"""The scale of each module's inputs in 4 bits, from the largest input that calibration shows.

As in llmcompressor, gate and up of every routed expert go by all tokens of their layer.
llmcompressor also sends all tokens through every expert, for the inputs of `down`; that costs as
many times more as there are experts for each chosen one. Here an expert's `down` goes by the
expert's own tokens, and by at most TOKENS of all tokens, evenly spaced, that are sent through the
expert too.

GPTQ does without these other tokens: where fewer than FEW tokens reach an expert, its `down` goes
by the largest input of all experts' `down` in the layer. A scale for larger inputs loses little,
because a block's scale in E4M3 is precise over 17 octaves; a scale for smaller inputs cuts inputs
off.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from threading import Lock
from typing import Any, Final, NamedTuple

import numpy as np

from mquant.engines.calibrated.listening import Listening
from mquant.engines.calibrated.walk import Saved
from mquant.forward.decoder import Model
from mquant.forward.linears import DOWN, block_of
from mquant.numerics.nvfp4 import global_scale_of
from mquant.plan import Action, Plan
from mquant.weights.decode import Floats

FEW: Final = 64
"""The tokens below which an expert's own tokens say too little of its inputs."""
INPUT_SCALE: Final = "input_global_scale"
TOKENS: Final = 2048
"""The most tokens that all experts of a layer see."""
_KEY: Final = "largest_inputs"


class _Heard(NamedTuple):
    largest: np.float32
    tokens: int


def input_scale_of(said: Mapping[str, Any]) -> Callable[[str], np.float32]:
    """Return the scale of a module's inputs, by hub name, from what `InputScales` said."""
    largest = said[_KEY]
    return lambda module: input_scale(np.float32(largest.get(module, 0)))


def input_scale(largest: np.float32) -> np.float32:
    """Return compressed-tensors' `input_global_scale`, a divisor, for inputs of at most `largest`.

    1 if there is no finite divisor, as for a module of which no input is known.
    """
    return global_scale_of([np.asarray(largest, np.float32)])


class Maxima:
    """The largest absolute inputs of a plan's modules, a layer at a time."""

    def __init__(self, plan: Plan) -> None:
        """Find the modules whose inputs are scaled by calibration."""
        self._lock = Lock()
        self._name = plan.family.in_memory_name
        self._layers: dict[int | None, list[Action]] = defaultdict(list)
        self._modules: dict[str, str] = {}
        for action in plan.actions:
            if action.scheme and action.scheme.needs_data:
                self._layers[action.layer].append(action)
                self._modules[self._name(action.source.name)] = action.module
        self._heard: dict[str, _Heard] = {}
        self._blocks: dict[str, np.float32] = {}
        self._some: dict[str, Floats] = {}

    def begin(self) -> None:
        """Forget the layer before."""
        self._heard.clear()
        self._blocks.clear()
        self._some.clear()

    def hear(self, names: tuple[str, ...], inputs: Floats) -> None:
        """Hear the inputs [n, in] of modules, by the forward pass's names, from any thread."""
        modules = [self._modules[name] for name in names if name in self._modules]
        if modules:
            heard = _Heard(_largest(inputs), len(inputs))
            with self._lock:
                self._heard |= dict.fromkeys(modules, heard)

    def hear_block(self, experts: str, inputs: Floats) -> None:
        """Hear the inputs that all routed experts of a layer choose from, before the experts'."""
        if self._modules:
            self._blocks[experts] = _largest(inputs)
            self._some[experts] = inputs[:: -(-len(inputs) // TOKENS)].copy()

    def unheard(self, number: int) -> Iterator[tuple[str, str, Floats]]:
        """Yield each `down` of a routed expert: hub name, name in memory, inputs of its block."""
        for action in self._layers[number]:
            name = self._name(action.source.name)
            some = self._some.get(block_of(name))
            if some is not None and name.endswith(DOWN):
                yield action.module, name, some

    def of_layer(
        self, number: int | None, others: Mapping[str, np.float32] | None = None
    ) -> dict[str, np.float32]:
        """Return the largest inputs of the layer's modules, by hub name.

        `others` are the largest inputs that other tokens give an expert's `down`. A module of which
        nothing is known has no entry.
        """
        found: dict[str, np.float32] = {}
        few: list[str] = []
        downs: list[np.float32] = []
        for action in self._layers[number]:
            module, name = action.module, self._name(action.source.name)
            heard = self._heard.get(module, _Heard(np.float32(0), 0))
            block = self._blocks.get(block_of(name))
            if action.expert is None or block is None:
                if heard.tokens:
                    found[module] = heard.largest
            elif not name.endswith(DOWN):
                found[module] = block
            elif others is not None:
                found[module] = max(heard.largest, others[module])
            else:
                found[module] = heard.largest
                downs.append(heard.largest)
                few += [module] if heard.tokens < FEW else []
        return found | dict.fromkeys(few, max(downs, default=np.float32(0)))


def _largest(inputs: Floats) -> np.float32:
    return np.float32(max(inputs.max(initial=0), -inputs.min(initial=0)))


class InputScales(Listening):
    """The method that measures the inputs; the stream engine then writes weights and scales."""

    def __init__(self, model: Model, plan: Plan) -> None:
        """Begin without a layer."""
        super().__init__(model)
        self._maxima = Maxima(plan)
        self._largest: dict[str, float] = {}

    @property
    def said(self) -> Mapping[str, Any]:
        """The largest inputs so far, by module."""
        return {_KEY: dict(self._largest)}

    def resume(self, saved: Saved) -> bool:
        """Take over the largest inputs of the saved layers."""
        self._largest = dict(saved.said[_KEY])
        return True

    def begin(self, number: int) -> None:
        """Forget the layer before."""
        self._maxima.begin()

    def end(self, number: int) -> None:
        """Keep the largest inputs of the layer."""
        modules = [*self._maxima.unheard(number)]
        others = self._model.workers.map(self._through_expert, modules)
        named = {module: largest for (module, _, _), largest in zip(modules, others, strict=True)}
        largest = self._maxima.of_layer(number, named)
        self._largest |= {module: float(value) for module, value in largest.items()}

    def hear(self, names: tuple[str, ...], inputs: Floats) -> None:
        """Hear the inputs of modules."""
        self._maxima.hear(names, inputs)

    def hear_block(self, experts: str, inputs: Floats) -> None:
        """Hear the inputs that the experts choose from."""
        self._maxima.hear_block(experts, inputs)

    def _through_expert(self, expert: tuple[str, str, Floats]) -> np.float32:
        """Return the largest input of an expert's `down` for tokens of its block."""
        _, down, inputs = expert
        gate, up = (down.replace(DOWN, f".{part}_proj.weight") for part in ("gate", "up"))
        gates = inputs @ self._model.weight(gate, "gate").T
        middle: Floats = inputs @ self._model.weight(up, "up").T
        middle *= gates / (1 + np.exp(-gates))  # silu, as in every decoder whose experts are known
        return _largest(middle)
