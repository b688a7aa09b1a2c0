"""Run a decoder that config.json describes, layer by layer, in float32, with weights from disk.

No code of a checkpoint runs, and no model is built. Weights are found by transformers' names in
memory (the family maps hub names to those names), decoded when a layer needs them, and dropped.
Only experts that a token is routed to are read.
"""

import numpy as np

from mquant.family import Family
from mquant.family_rows import Forward, Role
from mquant.forward.attention import Attention
from mquant.forward.experts import FeedForward
from mquant.forward.linears import Linears
from mquant.forward.shape import shape_of
from mquant.forward.tensors import Integers, Tensors
from mquant.loader_model.modules import ModuleView
from mquant.weights.decode import Floats
from mquant.weights.matrix import AnyReader, Workers


class Model(Tensors):
    """A checkpoint that can be run layer by layer.

    `base` is what transformers' names of layers, embeddings and the last norm begin with.
    """

    def __init__(self, view: ModuleView, reader: AnyReader, context: int, workers: Workers) -> None:
        """Find the weights without reading a weight. Raises SourceError as `shape_of` does."""
        self.shape = shape_of(view.family, view.checkpoint.config, context)
        super().__init__(view, reader, workers)
        family = view.family
        assert family is not None  # noqa: S101 -- shape_of refuses None
        forward = family.forward or Forward()
        self._attention = Attention(self, self.shape)
        self._feed_forward = FeedForward(self, self.shape, forward)
        self._embeddings = _name(family, Role.EMBEDDING)
        self._head = _name(family, Role.HEAD)
        self.base = self._embeddings.removesuffix("embed_tokens.weight")

    def head(self) -> str:
        """Return the name of the weight that gives logits: the head, or the embeddings if tied."""
        return self._head if self.has(self._head) else self._embeddings

    def embed(self, tokens: Integers) -> Floats:
        """Return the embeddings [n, hidden] of token ids [n], in one pass over the table."""
        rows, hidden = self.matrix(self._embeddings).shape
        out = np.empty((len(tokens), hidden), np.float32)
        step = max(1, (16 << 20) // (4 * hidden))
        for first in range(0, rows, step):
            positions = np.flatnonzero((tokens >= first) & (tokens < first + step))
            if len(positions):
                table = self.rows(self._embeddings, first, min(first + step, rows), "table")
                out[positions] = table[tokens[positions] - first]
        return out

    def norm(self, values: Floats, name: str) -> Floats:
        """Return the RMS norm of `values` [n, size] over the last axis, with the weight `name`."""
        return self.normed(values, name, self.shape.eps)

    def last_norm(self, values: Floats) -> Floats:
        """Return the norm [n, hidden] that the head reads."""
        return self.norm(values, f"{self.base}norm.weight")

    def layer(
        self, number: int, hidden: Floats, windows: list[slice], linears: Linears | None = None
    ) -> Integers | None:
        """Run a decoder layer on `hidden` [n, hidden], in place.

        A token attends only to itself and to earlier tokens of its window. `linears` gives the
        weights of linear modules, routers aside; None: as they are on disk. Returns the chosen
        experts [n, top_k], sorted; None if the layer has no experts.
        """
        linears, at = linears or self, f"{self.base}layers.{number}"
        self._attention.add(at, number, hidden, windows, linears)
        return self._feed_forward.add(at, number, hidden, linears)


def _name(family: Family, role: Role) -> str:
    """Return transformers' name of the one weight of a role outside the layers."""
    row = next(row for row in family.tensors if row.role is role and "{" not in row.name)
    return family.in_memory_name(row.name)
