"""Run a decoder that config.json describes, layer by layer, in float32, with weights from disk.

No code of a checkpoint runs, and no model is built. Weights are found by transformers' names in
memory (the family maps hub names to those names), decoded when a layer needs them, and dropped.
Only experts that a token is routed to are read.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from mquant.errors import SourceError
from mquant.family import Family
from mquant.family_rows import Forward
from mquant.forward.linears import Linears
from mquant.forward.not_finite import not_finite
from mquant.loader_model.modules import ModuleView
from mquant.weights.decode import Floats
from mquant.weights.matrix import AnyReader, Matrix, Workers, matrix_of, plain

Integers = npt.NDArray[np.int64]

_MOST: Final = (1_000, 100_000, 1_000, 10_000, 10_000)
"""The most layers, hidden size, heads, size of a head, and experts."""
_TOKENS_AT_ONCE: Final = 1024
"""Tokens in one product: a fixed number, so that no result depends on the number of workers."""


@dataclass(frozen=True)
class Shape:
    """The numbers of config.json that define a decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    experts: int
    top_k: int
    frequencies: Floats
    """RoPE frequencies of the rotated pairs of a head, in radians a token.

    The frequencies are fewer than half the head's size if only a part of the head is rotated.
    """


def shape_of(family: Family | None, config: Mapping[str, Any], context: int) -> Shape:
    """Return the decoder's numbers in config.json.

    Raises SourceError if config.json describes a model that mquant cannot evaluate with `context`
    tokens, or lacks a number.
    """
    if family is None or family.forward is None:
        name = family.title if family else f"model_type {config.get('model_type')}"
        _refuse(f"{name} cannot be evaluated: mquant does not know its forward pass")
    if config.get("hidden_act", "silu") != "silu":
        _refuse(f"mquant does not know hidden_act {config['hidden_act']}, only silu")
    window = config.get("sliding_window")
    if type(window) is int and window < context and config.get("use_sliding_window") is not False:
        _refuse(f"Attention slides over {window} tokens, fewer than the context of {context}")

    def number(key: str, default: int = 0) -> int:
        value = family.value(key, config) if key else None
        if value is None and not default and key:
            _refuse(f"config.json does not say {key}")
        return default if value is None else value

    keys = family.config
    hidden, heads = number(keys.hidden), number(keys.heads)
    head_dim = number("head_dim", hidden // heads)
    eps = config.get("rms_norm_eps", 1e-6)
    numbers = (number(keys.layers), hidden, heads, head_dim, number(keys.experts, 1))
    if not all(0 < value <= most for value, most in zip(numbers, _MOST, strict=True)):
        _refuse(f"config.json describes no model: {numbers} of {_MOST}")
    return Shape(
        layers=number(keys.layers),
        hidden=hidden,
        heads=heads,
        kv_heads=number(keys.kv_heads or keys.heads),
        head_dim=head_dim,
        eps=float(eps),
        experts=number(keys.experts),
        top_k=number(keys.top_k),
        frequencies=_frequencies(config, head_dim),
    )


def _frequencies(config: Mapping[str, Any], head_dim: int) -> Floats:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    rotated = config.get("rotary_dim") or int(head_dim * part)
    if not 0 < rotated <= head_dim:
        _refuse(f"config.json rotates {rotated} of the {head_dim} numbers of a head")
    steps = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    unscaled: Floats = (1.0 / np.power(np.float32(base), steps)).astype(np.float32)
    if kind == "default":
        return unscaled
    if kind == "linear":
        return (unscaled / np.float32(rope["factor"])).astype(np.float32)
    if kind != "llama3":
        _refuse(f"mquant does not know RoPE of type {kind}, only default, linear and llama3")
    low, high, old = (
        rope[key]
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    # llama3 stretches wavelengths much longer than the old context; short wavelengths stay.
    turns = old * unscaled / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    stretched: Floats = (unscaled * (smooth + (1 - smooth) / rope["factor"])).astype(np.float32)
    return stretched


def _refuse(reason: str) -> NoReturn:
    raise SourceError(f"{reason}.", "Evaluate the model with its own code, e.g. lm-eval on vLLM.")


class Model:
    """A checkpoint that can be run layer by layer."""

    def __init__(self, view: ModuleView, reader: AnyReader, context: int, workers: Workers) -> None:
        """Find the weights without reading a weight. Raises SourceError as `shape_of` does."""
        self.view = view
        self.shape = shape_of(view.family, view.checkpoint.config, context)
        family = view.family
        assert family is not None  # noqa: S101 -- shape_of refuses None
        self._forward: Forward = family.forward or Forward()
        self._config = view.checkpoint.config
        self._matrices: dict[str, Matrix] = {}
        for module in view.modules.values():
            for suffix, info in module.tensors.items():
                hub_name = f"{module.name}.{suffix}"
                unquantized = plain(info, reader) if not module.quantized else None
                if unquantized is not None:
                    self._matrices[family.in_memory_name(hub_name)] = unquantized
            if module.quantized:
                weight = matrix_of(view, module, reader)
                if weight is not None:
                    self._matrices[family.in_memory_name(weight.name)] = weight
        self._workers = workers

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor of this name, which is transformers' name."""
        return name in self._matrices

    def matrix(self, name: str) -> Matrix:
        """Return a weight on disk. Raises SourceError if the weight is missing or not decodable."""
        if name not in self._matrices:
            raise SourceError(
                f"{self.view.checkpoint.source.name} has no {name} that mquant can decode.",
                "Run mquant verify on the checkpoint.",
            )
        return self._matrices[name]

    def rows(self, name: str, first: int, last: int, use: str) -> Floats:
        """Read rows [first, last) of a weight into this thread's buffer for `use`."""
        matrix = self.matrix(name)
        scratch = self._workers.scratch
        out = scratch.floats(use, (last - first, matrix.shape[1]))
        matrix.read(first, last, out, scratch)
        return out

    def weight(self, name: str, use: str) -> Floats:
        """Read a whole weight [rows, columns] into this thread's buffer for `use`."""
        return self.rows(name, 0, self.matrix(name).shape[0], use)

    def vector(self, name: str) -> Floats:
        """Read a whole vector."""
        vector: Floats = self.weight(name, "vector")[0].copy()
        return vector

    def not_finite(self, gives: str, *prefixes: str) -> SourceError:
        """Return the error that says why a part of the model `gives` NaN or infinity.

        The names of the part's weights, as transformers has them, start with `prefixes`.
        """
        part = [matrix for name, matrix in self._matrices.items() if name.startswith(prefixes)]
        source = self.view.checkpoint.source.name
        return not_finite(source, gives, part, self._workers.scratch)

    def nbytes(self, prefix: str) -> int:
        """Return the bytes of all tensors whose hub names start with `prefix`."""
        tensors = self.view.checkpoint.tensors
        return sum(info.nbytes for name, info in tensors.items() if name.startswith(prefix))

    def head(self) -> str:
        """Return the name of the weight that gives logits: lm_head, or the embeddings if tied."""
        name = "lm_head.weight"
        return name if self.has(name) else "model.embed_tokens.weight"

    def embed(self, tokens: Integers) -> Floats:
        """Return the embeddings [n, hidden] of token ids [n], in one pass over the table."""
        name = "model.embed_tokens.weight"
        rows, hidden = self.matrix(name).shape
        out = np.empty((len(tokens), hidden), np.float32)
        step = max(1, (16 << 20) // (4 * hidden))
        for first in range(0, rows, step):
            positions = np.flatnonzero((tokens >= first) & (tokens < first + step))
            if len(positions):
                table = self.rows(name, first, min(first + step, rows), "table")
                out[positions] = table[tokens[positions] - first]
        return out

    def norm(self, values: Floats, name: str) -> Floats:
        """Return the RMS norm over the last axis."""
        return _rms(values, self.vector(name), self.shape.eps)

    def layer(
        self, number: int, hidden: Floats, windows: list[slice], linears: Linears | None = None
    ) -> Integers | None:
        """Run a decoder layer on `hidden` [n, hidden], in place.

        A token attends only to itself and to earlier tokens of its window. `linears` gives the
        weights of linear modules, routers aside; None: as they are on disk. Returns the chosen
        experts [n, top_k], sorted; None if the layer has no experts.
        """
        linears = linears or self
        at = f"model.layers.{number}"
        inner = self.norm(hidden, f"{at}.input_layernorm.weight")
        hidden += self._attention(f"{at}.self_attn", inner, windows, linears)
        inner = self.norm(hidden, f"{at}.post_attention_layernorm.weight")
        if not self.has(f"{at}.mlp.gate.weight"):
            hidden += self._dense(f"{at}.mlp", inner, linears)
            return None
        chosen, weights = self._route(number, f"{at}.mlp", inner)
        linears.hear_block(f"{at}.mlp.experts", inner)
        self._experts(f"{at}.mlp.experts", inner, chosen, weights, hidden, linears)
        return np.sort(chosen, axis=1)

    def weights(self, names: tuple[str, ...], inputs: Floats) -> tuple[Floats, ...]:
        """Read the weights from disk, as `Linears` says. `inputs` do not matter."""
        return tuple(self.weight(name, name.rsplit(".", 2)[-2]) for name in names)

    def hear_block(self, experts: str, inputs: Floats) -> None:
        """Do nothing: weights on disk do not depend on inputs."""

    def _attention(self, at: str, inner: Floats, windows: list[slice], linears: Linears) -> Floats:
        shape, normed = self.shape, self._forward.qk_norm
        wide = shape.heads * shape.head_dim
        out = np.empty((len(inner), wide), np.float32)
        q, k, v = self._linear(inner, [f"{at}.{part}_proj" for part in "qkv"], linears)
        for values, part in ((q, "q"), (k, "k")):
            if normed == "each head":
                view = values.reshape(len(inner), -1, shape.head_dim)
                view[:] = self.norm(view, f"{at}.{part}_norm.weight")
            elif normed == "all heads" and self.has(f"{at}.{part}_norm.weight"):
                values[:] = self.norm(values, f"{at}.{part}_norm.weight")

        def work(window: slice) -> None:
            out[window] = _attend(q[window], k[window], v[window], shape)

        list(self._workers.map(work, windows))
        return self._linear(out, [f"{at}.o_proj"], linears)[0]

    def _linear(self, values: Floats, names: list[str], linears: Linears) -> list[Floats]:
        """Return `values` [n, in] times each weight [out, in], plus the bias if there is one.

        The modules have the same inputs. Each worker takes some tokens.
        """
        weights = linears.weights(tuple(f"{name}.weight" for name in names), values)
        return [self._times(values, *pair) for pair in zip(weights, names, strict=True)]

    def _times(self, values: Floats, weight: Floats, name: str) -> Floats:
        out = np.empty((len(values), len(weight)), np.float32)

        def work(start: int) -> None:
            part = slice(start, start + _TOKENS_AT_ONCE)
            np.matmul(values[part], weight.T, out=out[part])

        list(self._workers.map(work, range(0, len(values), _TOKENS_AT_ONCE)))
        if self.has(f"{name}.bias"):
            out += self.vector(f"{name}.bias")
        return out

    def _dense(self, at: str, inner: Floats, linears: Linears) -> Floats:
        gate, up = self._linear(inner, [f"{at}.gate_proj", f"{at}.up_proj"], linears)
        for start in range(0, len(inner), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            up[part] *= _silu(gate[part])
        return self._linear(up, [f"{at}.down_proj"], linears)[0]

    def _route(self, number: int, at: str, inner: Floats) -> tuple[Integers, Floats]:
        """Return the chosen experts [n, top_k] and their routing weights [n, top_k].

        Raises SourceError if finite inputs give NaN or infinity: then the choice has no meaning.
        """
        logits: Floats = inner @ self.weight(f"{at}.gate.weight", "linear").T
        scores: Floats
        if self._forward.scores == "sigmoid":
            scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
        else:
            scores = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
            scores /= scores.sum(axis=1, keepdims=True, dtype=np.float32)
        bias = f"{at}.e_score_correction_bias"
        choice = scores + self.vector(bias) if self.has(bias) else scores
        # The sigmoid of infinity is finite, so logits are checked, too. If `inner` is not finite,
        # then the attention is to blame, and the layer's result shows it.
        finite = np.isfinite(logits).all() and np.isfinite(choice).all()
        if not finite and np.isfinite(inner).all():
            raise self.not_finite(f"layer {number}'s router gives", f"{at}.gate.", bias)
        top = self.shape.top_k
        chosen = np.argpartition(-choice, top - 1, axis=1)[:, :top].astype(np.int64)
        weights: Floats = np.take_along_axis(scores, chosen, axis=1)
        if not self._forward.normalised or self._config.get(self._forward.normalised):
            weights /= weights.sum(axis=1, keepdims=True)
        return chosen, weights

    def _experts(
        self,
        at: str,
        inner: Floats,
        chosen: Integers,
        weights: Floats,
        out: Floats,
        linears: Linears,
    ) -> None:
        """Add the experts' outputs to `out` in the order of experts, in whatever order they end."""

        def work(expert: int) -> tuple[Any, Floats]:
            tokens, places = np.nonzero(chosen == expert)
            routed = inner[tokens]
            names = [f"{at}.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
            gate_weight, up_weight = linears.weights((names[0], names[1]), routed)
            gate, up = routed @ gate_weight.T, np.asarray(routed @ up_weight.T, np.float32)
            up *= _silu(gate)
            (down_weight,) = linears.weights((names[2],), up)
            result: Floats = up @ down_weight.T
            np.multiply(result, weights[tokens, places, None], out=result)
            return tokens, result

        busy = sorted(set(chosen.ravel().tolist()))
        for group in _groups(busy, 2 * self._workers.count):
            for later in busy[busy.index(group[-1]) + 1 :][: len(group)]:
                for part in ("gate", "up", "down"):
                    self.matrix(f"{at}.{later}.{part}_proj.weight").prefetch()
            for tokens, result in self._workers.map(work, group):
                out[tokens] += result


def _attend(q: Floats, k: Floats, v: Floats, shape: Shape) -> Floats:
    """Return the causal attention of one window; q is [n, heads * head_dim]."""
    n, size = len(q), shape.head_dim
    angles = np.arange(n, dtype=np.float32)[:, None] * shape.frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    out = np.empty((n, shape.heads, size), np.float32)
    share = shape.heads // shape.kv_heads
    mask = np.triu(np.full((n, n), -np.inf, np.float32), 1)
    for group in range(shape.kv_heads):
        key = _rotated(k[:, group * size : (group + 1) * size], cos, sin)
        value = v[:, group * size : (group + 1) * size]
        for head in range(group * share, (group + 1) * share):
            query = _rotated(q[:, head * size : (head + 1) * size], cos, sin)
            scores = query @ key.T
            scores *= np.float32(size**-0.5)
            scores += mask
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            out[:, head] = (scores @ value) / scores.sum(axis=1, keepdims=True)
    return out.reshape(n, -1)


def _rotated(values: Floats, cos: Floats, sin: Floats) -> Floats:
    """Return a head [n, head_dim] with its first elements rotated as pairs (i, i + half)."""
    half = cos.shape[1]
    out = values.copy()
    first, second = values[:, :half], values[:, half : 2 * half]
    out[:, :half] = first * cos - second * sin
    out[:, half : 2 * half] = second * cos + first * sin
    return out


def _rms(values: Floats, weight: Floats, eps: float) -> Floats:
    mean = np.mean(np.square(values), axis=-1, keepdims=True)
    out: Floats = values * (1 / np.sqrt(mean + np.float32(eps))) * weight
    return out


def _silu(values: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp(-x) overflows for a large negative x: x / inf is right
        out: Floats = values / (1 + np.exp(-values))
    return out


def _groups(items: Iterable[int], size: int) -> Iterator[list[int]]:
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
