"""Causal attention: with grouped queries, and latent (DeepSeek's MLA).

Workers take one head of keys in one window each. Results take the place of queries. Latent
attention computes queries, keys and values of a head when a worker needs them: for all heads and
all tokens, these would be several times the size of the states.
"""

from collections.abc import Sequence
from itertools import product
from typing import Final

import numpy as np

from mquant.forward.linears import Linears
from mquant.forward.shape import Latent, Shape
from mquant.forward.tensors import Tensors, rms_norm
from mquant.weights.decode import Floats

_QUERIES: Final = 256
"""Queries whose scores are computed at once: a fixed number."""
_LATENT_EPS: Final = 1e-6
"""The epsilon of the norms inside latent attention: transformers 5.17 reads none for these."""
_NORMS: Final = {"q": ("q_norm", "query_layernorm"), "k": ("k_norm", "key_layernorm")}


class Attention:
    """The attention of a model's layers."""

    def __init__(self, tensors: Tensors, shape: Shape) -> None:
        """Keep the weights and the numbers."""
        self._tensors, self._shape = tensors, shape

    def add(
        self, layer: str, number: int, hidden: Floats, windows: list[slice], linears: Linears
    ) -> None:
        """Add a layer's attention to `hidden` [n, hidden], in place.

        `layer` is what the names of the layer's modules begin with. A token attends only to tokens
        of its window.
        """
        at, span = f"{layer}.self_attn", self._shape.spans[number]
        norm = f"{layer}.input_layernorm.weight"
        inner = self._tensors.normed(hidden, norm, self._shape.eps)
        if self._shape.latent:
            out = self._latent(at, self._shape.latent, inner, windows, linears)
        else:
            q, k, v = self._projected(at, inner, linears)
            del inner
            out = self._grouped(at, (q, k, v), span, windows)
        self._tensors.add_linear(out, f"{at}.o_proj", linears, hidden)

    def _projected(self, at: str, inner: Floats, linears: Linears) -> Sequence[Floats]:
        """Return q, k and v, each [n, heads * head_dim]."""
        together = f"{at}.qkv_proj"
        if not self._tensors.has(f"{together}.weight"):
            return self._tensors.linear(inner, [f"{at}.{part}_proj" for part in "qkv"], linears)
        (qkv,) = self._tensors.linear(inner, [together], linears)
        size = self._shape.head_dim
        q = self._shape.heads * size
        return np.split(qkv, [q, q + self._shape.kv_heads * size], axis=1)

    def _grouped(
        self,
        at: str,
        projected: tuple[Floats, Floats, Floats],
        span: int | None,
        windows: list[slice],
    ) -> Floats:
        """Return the results [n, heads * head_dim], in place of the queries."""
        shape, size = self._shape, self._shape.head_dim
        q, k, v = projected
        share = shape.heads // shape.kv_heads
        norms = {part: self._norm(at, part) for part in _NORMS}

        def prepare(window: slice) -> None:
            angles = shape.rope.angles(window.stop - window.start)
            for values, part in ((q, "q"), (k, "k")):
                self._norm_and_rotate(values[window], norms[part], angles)

        def work(task: tuple[slice, int]) -> None:
            window, group = task
            columns = slice(group * size, (group + 1) * size)
            key, value = k[window, columns], v[window, columns]
            for head in range(group * share, (group + 1) * share):
                query = q[window, head * size : (head + 1) * size]
                _attend(query, key, value, query, span, size**-0.5)

        list(self._tensors.workers.map(prepare, windows))
        list(self._tensors.workers.map(work, product(windows, range(shape.kv_heads))))
        return q

    def _norm(self, at: str, part: str) -> Floats | None:
        if self._shape.qk_norm == "none":
            return None
        module = self._tensors.first(at, _NORMS[part]) or f"{at}.{part}_norm"
        return self._tensors.vector(f"{module}.weight")

    def _norm_and_rotate(
        self, values: Floats, norm: Floats | None, angles: tuple[Floats, Floats]
    ) -> None:
        """Change queries or keys [n, heads * head_dim] of a window, in place."""
        heads = values.reshape(len(values), -1, self._shape.head_dim)
        rotated_first = self._shape.qk_norm == "each head, rotated"
        if rotated_first:
            self._shape.rope.rotate(heads, angles)
        if norm is not None:
            normed = values if self._shape.qk_norm == "all heads" else heads
            normed[:] = rms_norm(normed, norm, self._shape.eps)
        if not rotated_first:
            self._shape.rope.rotate(heads, angles)

    def _latent(
        self, at: str, latent: Latent, inner: Floats, windows: list[slice], linears: Linears
    ) -> Floats:
        """Return the results [n, heads * value], with keys and values from `rank` numbers."""
        shape, tensors = self._shape, self._tensors
        compressed = f"{at}.kv_a_proj_with_mqa"
        if tensors.has(f"{at}.q_a_proj.weight"):
            queries, kv = tensors.linear(inner, [f"{at}.q_a_proj", compressed], linears)
            queries = tensors.normed(queries, f"{at}.q_a_layernorm.weight", _LATENT_EPS)
            (q_weight,) = linears.weights((f"{at}.q_b_proj.weight",), queries)
        else:
            (kv,), queries = tensors.linear(inner, [compressed], linears), inner
            (q_weight,) = linears.weights((f"{at}.q_proj.weight",), queries)
        keys = tensors.normed(kv[:, : latent.rank], f"{at}.kv_a_layernorm.weight", _LATENT_EPS)
        (kv_weight,) = linears.weights((f"{at}.kv_b_proj.weight",), keys)
        q_size, kv_size = latent.plain + latent.rotated, latent.plain + latent.value
        scale = q_size**-0.5 * shape.rope.scores
        out = np.empty((len(queries), shape.heads * latent.value), np.float32)

        def work(task: tuple[slice, int]) -> None:
            window, head = task
            angles = shape.rope.angles(window.stop - window.start)
            query = queries[window] @ q_weight[head * q_size : (head + 1) * q_size].T
            both = keys[window] @ kv_weight[head * kv_size : (head + 1) * kv_size].T
            key = np.concatenate((both[:, : latent.plain], kv[window, latent.rank :]), axis=1)
            for values in (query, key):
                shape.rope.rotate(values[:, None, latent.plain :], angles)
            value = both[:, latent.plain :]
            columns = slice(head * latent.value, (head + 1) * latent.value)
            _attend(query, key, value, out[window, columns], None, scale)

        list(tensors.workers.map(work, product(windows, range(shape.heads))))
        return out


def _attend(q: Floats, k: Floats, v: Floats, out: Floats, span: int | None, scale: float) -> None:
    """Write the causal attention of one head of a window to `out` [n, value], which may be `q`.

    `q` and `k` are [n, size], `v` is [n, value]. A query looks at `span` keys, its own the last.
    """
    for start in range(0, len(q), _QUERIES):
        end = min(start + _QUERIES, len(q))
        first = max(0, start - span + 1) if span else 0
        scores = q[start:end] @ k[first:end].T
        scores *= np.float32(scale)
        behind = np.arange(start, end)[:, None] - np.arange(first, end)
        scores[(behind < 0) | (behind >= span) if span else behind < 0] = -np.inf
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        result = scores @ v[first:end]
        result /= scores.sum(axis=1, keepdims=True)
        out[start:end] = result
