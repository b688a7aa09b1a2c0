"""The method that quantizes a layer with the inputs of its linear modules, while it is computed.

Each fused set is quantized when the forward pass asks for its weights, and gives the dequantized
weights: so what follows in the layer, and every later layer, sees the outputs of the quantized
model. A set's tensors are written at once.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Final, NamedTuple, Protocol

import numpy as np

from mquant.engines.calibrated.input_scales import FEW, INPUT_SCALE, Maxima, input_scale
from mquant.engines.calibrated.walk import Saved
from mquant.errors import SourceError
from mquant.forward.decoder import Model
from mquant.forward.linears import DOWN, block_of
from mquant.numerics.gptq import Rounded
from mquant.numerics.hessian import Map, hessian_of
from mquant.plan import Plan, WorkUnit
from mquant.weights.decode import Bytes, Floats


class Inputs(NamedTuple):
    """What is known of a fused set's inputs.

    `own`, float32 [n, in], are those of the set's own tokens. `prior`, float32 [in, in], is for
    gate and up of a routed expert the Hessian of tokens that the layer's router chose from, as if
    there was one for each column; None if nothing is known of them. So many are what a Hessian
    takes to know its directions: an expert that saw many more goes by its own, an expert that saw
    none goes by the block's. (The prior of a mean, worth so many observations; docs/lab-log.md has
    what other numbers lose.)
    """

    own: Floats
    prior: Floats | None = None


Round = Callable[[list[Floats], Inputs | None, WorkUnit, Map], Sequence[Rounded]]
"""The arithmetic of a method: weights of a fused set, its inputs (None: unknown), the set, and the
map over its parts, which may use threads."""


class Sink(Protocol):
    """The destination of tensors: `mquant.output.ShardSet`."""

    @property
    def pending(self) -> list[WorkUnit]:
        """The work units to do."""

    def write(self, name: str, data: memoryview) -> None:
        """Write the next bytes of a tensor."""

    def commit(self) -> None:
        """Record the complete work units."""


_BLOCK_TOKENS: Final = 1024
"""The most tokens of a block that its prior is made of."""


class Quantizing:
    """The `Listener` that quantizes the fused sets of a plan with `round_` and writes them."""

    def __init__(self, model: Model, plan: Plan, output: Sink, round_: Round) -> None:
        """Index the fused sets by the names that the forward pass has for their weights."""
        self._model, self._output, self._round = model, output, round_
        self._workers = model.workers
        self._name = plan.family.in_memory_name
        self._units: dict[str, WorkUnit] = {}
        self._layers: dict[int | None, list[WorkUnit]] = defaultdict(list)
        for unit in plan.units:
            if unit.scheme and not unit.cast:
                self._layers[unit.actions[0].layer].append(unit)
                for action in unit.actions:
                    self._units[self._name(action.source.name)] = unit
        self._pending = {next(unit.outputs).name for unit in output.pending}
        self._made: dict[str, Floats] = {}  # values of members that were not asked for yet
        self._done: set[str] = set()  # the first outputs of this layer's sets
        self._experts = {
            block_of(name)
            for name, unit in self._units.items()
            if unit.actions[0].expert is not None and not name.endswith(DOWN)
        }
        self._priors: dict[str, Floats] = {}
        self._said: dict[str, list[str]] = {"few_tokens": [], "no_tokens": [], "no_inputs": []}
        self._order: dict[str, int] = {}
        for unit in plan.units:
            for name in _named(unit):
                self._order.setdefault(name, len(self._order))
        self._maxima = Maxima(plan)
        self._scaled: list[str] = []  # modules of this layer that lack the scale of their inputs
        self._lock = Lock()

    @property
    def said(self) -> Mapping[str, list[str]]:
        """The experts that few tokens, or none, reached, and modules whose inputs are not known.

        The names are in the order of the output.
        """
        return {
            key: sorted({*names}, key=self._order.__getitem__) for key, names in self._said.items()
        }

    @property
    def pending(self) -> bool:
        """Whether a fused set is still to be written."""
        return any(self._is_pending(unit) for units in self._layers.values() for unit in units)

    def resume(self, saved: Saved) -> bool:
        """Go on after the saved layers, unless one of their fused sets is not written."""
        for number, units in self._layers.items():
            if number is not None and number < saved.layers and any(map(self._is_pending, units)):
                return False
        self._said = {key: [*saved.said.get(key, ())] for key in self._said}
        return True

    def begin(self, number: int) -> None:
        """Forget the layer before."""
        self._maxima.begin()
        self._done.clear()
        self._made.clear()
        self._priors.clear()

    def hear_block(self, experts: str, inputs: Floats) -> None:
        """Make the prior of the layer's experts from some of the inputs, evenly spaced."""
        self._maxima.hear_block(experts, inputs)
        if experts in self._experts:
            some = inputs[:: -(-len(inputs) // _BLOCK_TOKENS)]
            prior = hessian_of(some, self._workers.map)
            prior *= len(prior) / len(some)
            self._priors[experts] = prior

    def weights(self, names: tuple[str, ...], inputs: Floats) -> tuple[Floats, ...]:
        """Return the dequantized weights of modules with these inputs; plain ones as on disk."""
        self._maxima.hear(names, inputs)
        return tuple(self._weight(name, inputs) for name in names)

    def _weight(self, name: str, inputs: Floats) -> Floats:
        unit = self._units.get(name)
        if unit is None:
            return self._model.weight(name, name.rsplit(".", 2)[-2])
        with self._lock:
            made = self._made.pop(name, None)
        if made is not None:
            return made
        self._tell_few(unit, len(inputs))
        values = self._quantize(unit, Inputs(inputs, self._prior(name)))
        with self._lock:
            self._made |= values
            return self._made.pop(name)

    def _prior(self, name: str) -> Floats | None:
        """Return the prior for gate and up of an expert: `down` has other inputs."""
        return None if name.endswith(DOWN) else self._priors.get(block_of(name))

    def _quantize(self, unit: WorkUnit, inputs: Inputs | None) -> dict[str, Floats]:
        """Quantize a fused set, write it, and return the values of its members by name."""
        names = [self._name(action.source.name) for action in unit.actions]
        weights = [self._read(name) for name in names]
        # Experts are quantized in the workers, which must not wait for each other.
        rows: Map = self._workers.map if unit.actions[0].expert is None else map
        rounded = self._round(weights, inputs, unit, rows)
        first = next(unit.outputs).name
        if self._is_pending(unit):
            if unit.scheme and unit.scheme.needs_data:
                self._scaled += [action.module for action in unit.actions]
            for action, made in zip(unit.actions, rounded, strict=True):
                for suffix, array in made.tensors.items():
                    raw: Bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    self._output.write(f"{action.module}.{suffix}", raw.data)
        with self._lock:
            self._pending.discard(first)
            self._done.add(first)
        return {name: made.values for name, made in zip(names, rounded, strict=True)}

    def _read(self, name: str) -> Floats:
        matrix = self._model.matrix(name)
        weight = np.empty(matrix.shape, np.float32)
        matrix.read(0, len(weight), weight, self._workers.scratch)
        bad = weight.size - int(np.count_nonzero(np.isfinite(weight)))
        if bad:
            values = "value that is" if bad == 1 else "values that are"
            raise SourceError(
                f"{matrix.name} holds {bad:,} {values} NaN or infinite: it cannot be quantized.",
                "Get the checkpoint again; or keep the module with the recipe's ignore list.",
            )
        return weight

    def end(self, number: int) -> None:
        """Quantize the experts that no token reached, and commit."""
        left = [u for u in self._layers[number] if next(u.outputs).name not in self._done]

        def work(unit: WorkUnit) -> None:
            prior = self._prior(self._name(unit.actions[0].source.name))
            none = np.empty((0, 0 if prior is None else len(prior)), np.float32)
            self._quantize(unit, None if prior is None else Inputs(none, prior))

        experts = [unit for unit in left if unit.actions[0].expert is not None]
        list(self._workers.map(work, experts))
        for unit in left:
            if unit.actions[0].expert is None:
                work(unit)
        for unit in left:
            key = "no_inputs" if unit.actions[0].expert is None else "no_tokens"
            self._said[key] += _named(unit)
        self._write_input_scales(number)
        self._output.commit()

    def finish(self) -> None:
        """Quantize the fused sets outside of the layers, from their weights alone, and commit."""
        computed = range(self._model.shape.layers)
        left = [u for n, units in self._layers.items() if n not in computed for u in units]
        for unit in left:
            self._quantize(unit, None)
        self._said["no_inputs"] += [name for unit in left for name in _named(unit)]
        self._maxima.begin()
        self._write_input_scales(None)
        self._output.commit()

    def _write_input_scales(self, number: int | None) -> None:
        """Write the scales of the layer's inputs: an expert's may depend on other experts."""
        largest = self._maxima.of_layer(number)
        for module in self._scaled:
            scale = np.array([input_scale(largest.get(module, np.float32(0)))], "<f4")
            self._output.write(f"{module}.{INPUT_SCALE}", scale.data.cast("B"))
        self._scaled.clear()

    def _tell_few(self, unit: WorkUnit, tokens: int) -> None:
        if unit.actions[0].expert is not None and tokens < FEW:
            with self._lock:
                self._said["few_tokens"] += _named(unit)

    def _is_pending(self, unit: WorkUnit) -> bool:
        return next(unit.outputs).name in self._pending


def _named(unit: WorkUnit) -> list[str]:
    """Return the names of a set's modules; the expert's name for a set of an expert."""
    modules = [action.module for action in unit.actions]
    if unit.actions[0].expert is None:
        return modules
    return [module.rpartition(".")[0] for module in modules]
