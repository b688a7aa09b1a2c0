"""Feed-forward: dense, by routed experts, and by an expert that all tokens share."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Final

import numpy as np

from mquant.family_rows import Forward
from mquant.forward.linears import Linears
from mquant.forward.shape import Router, Shape
from mquant.forward.tensors import SLICE, Integers, Tensors
from mquant.weights.decode import Floats

_ROUTERS: Final = ("gate", "gate.wg")
_ROUTING_BIASES: Final = (
    "e_score_correction_bias",
    "gate.e_score_correction_bias",
    "gate.moe_statics.e_score_correction_bias",
    "expert_bias",
)
_SHARED: Final = ("shared_experts", "shared_expert", "shared_mlp")


class FeedForward:
    """The feed-forward part of a model's layers."""

    def __init__(self, tensors: Tensors, shape: Shape, forward: Forward) -> None:
        """Keep the numbers. `forward` is the family's."""
        self._tensors, self._shape, self._forward = tensors, shape, forward

    def add(self, layer: str, number: int, hidden: Floats, linears: Linears) -> Integers | None:
        """Add a layer's feed-forward to `hidden` [n, hidden], in place.

        `layer` is what the names of the layer's modules begin with. Returns the chosen experts
        [n, top_k], sorted; None if the layer has no experts. Raises SourceError if finite inputs
        give routing weights that are not.
        """
        at, tensors = f"{layer}.mlp", self._tensors
        norm = f"{layer}.post_attention_layernorm.weight"
        inner = tensors.normed(hidden, norm, self._shape.eps)
        router = tensors.first(at, _ROUTERS)
        if router is None:
            self._add_dense(at, inner, hidden, linears)
            return None
        chosen, weights = self._route(number, at, router, inner)
        linears.hear_block(f"{at}.experts", inner)
        self._add_experts(f"{at}.experts", inner, (chosen, weights), hidden, linears)
        for shared in (name for name in _SHARED if tensors.first(f"{at}.{name}", ["down_proj"])):
            gate, factors = f"{at}.{shared}_gate.weight", None
            if tensors.has(gate):
                factors = _sigmoid(inner @ tensors.weight(gate, "gate").T)
            self._add_dense(f"{at}.{shared}", inner, hidden, linears, factors)
        return np.sort(chosen, axis=1)

    def _add_dense(
        self,
        at: str,
        inner: Floats,
        hidden: Floats,
        linears: Linears,
        factors: Floats | None = None,
    ) -> None:
        """Add the results of one gated feed-forward, times `factors` [n, 1], to `hidden`."""
        tensors, names = self._tensors, [f"{at}.gate_proj", f"{at}.up_proj"]
        together = f"{at}.gate_up_proj"
        gate: Floats
        up: Floats
        if tensors.has(f"{together}.weight"):
            names = [together, together]
            gate, up = np.split(linears.weights((f"{together}.weight",), inner)[0], 2)
        else:
            gate, up = linears.weights((f"{names[0]}.weight", f"{names[1]}.weight"), inner)
        biases = [tensors.bias(name) for name in names]
        out = np.empty((len(inner), len(up)), np.float32)

        def work(part: slice) -> None:
            _gated(inner[part], gate, up, out[part], biases)

        tensors.in_slices(len(inner), work)
        tensors.add_linear(out, f"{at}.down_proj", linears, hidden, factors)

    def _route(self, number: int, at: str, router: str, inner: Floats) -> tuple[Integers, Floats]:
        """Return the chosen experts [n, top_k] and their routing weights [n, top_k].

        Raises SourceError if finite inputs give NaN or infinity: then the choice has no meaning.
        """
        tensors = self._tensors
        logits = tensors.times(inner, tensors.weight(f"{router}.weight", "router"), router)
        if self._forward.scores == "sigmoid":
            scores = _sigmoid(logits)
        else:
            scores = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores /= scores.sum(axis=1, keepdims=True, dtype=np.float32)
        biases = [f"{at}.{name}" for name in _ROUTING_BIASES]
        bias = next((name for name in biases if tensors.has(name)), None)
        choice = scores + tensors.vector(bias) if bias else scores
        # The sigmoid of infinity is finite, so logits are checked, too. If `inner` is not finite,
        # then the attention is to blame, and the layer's result shows it.
        finite = np.isfinite(logits).all() and np.isfinite(choice).all()
        if not finite and np.isfinite(inner).all():
            raise tensors.not_finite(f"layer {number}'s router gives", f"{router}.", *biases)
        chosen = self._chosen(choice)
        weights: Floats = np.take_along_axis(scores, chosen, axis=1)
        if self._shape.router.normalised:
            weights /= weights.sum(axis=1, keepdims=True)
        weights *= np.float32(self._shape.router.factor)
        return chosen, weights

    def _chosen(self, choice: Floats) -> Integers:
        router = self._shape.router
        if router.groups > 1:
            choice = _of_best_groups(choice, router, self._forward.group_score)
        return _largest(choice, router.top_k)

    def _add_experts(
        self,
        at: str,
        inner: Floats,
        routed: tuple[Integers, Floats],
        out: Floats,
        linears: Linears,
    ) -> None:
        """Add the experts' outputs to `out` in the order of experts, in whatever order they end."""
        chosen, weights = routed

        def work(expert: int) -> tuple[Any, Floats]:
            tokens, places = np.nonzero(chosen == expert)
            states = inner[tokens]
            names = [f"{at}.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
            gate, up = linears.weights((names[0], names[1]), states)
            middle = np.empty((len(tokens), len(up)), np.float32)
            for start in range(0, len(tokens), SLICE):
                part = slice(start, start + SLICE)
                _gated(states[part], gate, up, middle[part])
            (down,) = linears.weights((names[2],), middle)
            np.matmul(middle, down.T, out=states)
            states *= weights[tokens, places, None]
            return tokens, states

        busy = sorted(set(chosen.ravel().tolist()))
        for group in _groups(busy, 2 * self._tensors.workers.count):
            for later in busy[busy.index(group[-1]) + 1 :][: len(group)]:
                for part in ("gate", "up", "down"):
                    self._tensors.matrix(f"{at}.{later}.{part}_proj.weight").prefetch()
            for tokens, result in self._tensors.workers.map(work, group):
                out[tokens] += result


def _gated(
    values: Floats,
    gate: Floats,
    up: Floats,
    out: Floats,
    biases: Iterable[Floats | None] = (None, None),
) -> None:
    """Write silu(values @ gate) * (values @ up) of some tokens to `out`."""
    np.matmul(values, up.T, out=out)
    gates = values @ gate.T
    for part, bias in zip((gates, out), biases, strict=True):
        if bias is not None:
            part += bias
    gates *= _sigmoid(gates)
    out *= gates


def _sigmoid(values: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp(-x) overflows for a large negative x: 1 / inf is right
        out: Floats = np.exp(-values)
        out += 1
    return np.divide(1, out, out=out)


def _largest(values: Floats, count: int) -> Integers:
    """Return the places [n, count] of the largest of each row's values, in any order."""
    return np.argpartition(-values, count - 1, axis=1)[:, :count].astype(np.int64)


def _of_best_groups(choice: Floats, router: Router, score: str) -> Floats:
    """Return the values [n, experts] with -infinity for experts outside a token's best groups.

    A group's score is its largest value, or the sum of its two largest (DeepSeek-V2, DeepSeek-V3).
    """
    grouped = choice.reshape(len(choice), router.groups, -1)
    most = 1 if score == "largest" else min(2, grouped.shape[2])
    best = np.take_along_axis(grouped, np.argpartition(-grouped, most - 1, axis=2)[..., :most], 2)
    out = np.full(grouped.shape, -np.inf, np.float32)
    places = _largest(best.sum(axis=2), router.best_groups)[..., None]
    np.put_along_axis(out, places, np.take_along_axis(grouped, places, axis=1), axis=1)
    return out.reshape(choice.shape)


def _groups(items: Iterable[int], size: int) -> Iterator[list[int]]:
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
