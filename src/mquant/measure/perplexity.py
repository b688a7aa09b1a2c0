"""Compute losses, and the divergence of two models, from final hidden states.

Logits are computed for a piece of the vocabulary at a time, for all tokens, and are not kept: each
token keeps running sums in float64.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from mquant.forward.decoder import Model
from mquant.forward.tensors import Integers
from mquant.weights.decode import Floats
from mquant.weights.matrix import Workers

Doubles = npt.NDArray[np.float64]

_ROWS: Final = 4096
"""Vocabulary rows per call: 50 MB of lm_head at a hidden size of 3072, for each model."""
_TOKENS: Final = 256


class Running:
    """The running sums over one model's logits, for each of n tokens: all arrays are [n]."""

    def __init__(self, count: int) -> None:
        self.largest: Doubles = np.full(count, -np.inf)
        self.best: Integers = np.zeros(count, np.int64)
        self.sum: Doubles = np.zeros(count)
        """The sum of exp(logit - largest)."""
        self.target: Doubles = np.zeros(count)

    @property
    def normaliser(self) -> Doubles:
        """The logarithm of the sum of exp(logit)."""
        value: Doubles = self.largest + np.log(self.sum)
        return value


@dataclass(frozen=True)
class Scores:
    """The scores of n tokens; all arrays are [n].

    `losses` are in nats, the checkpoint's first. `divergence` is the KL divergence in nats, and
    `agree` whether both models have the same top token; None for one model.
    """

    losses: tuple[Doubles, ...]
    divergence: Doubles | None
    agree: npt.NDArray[np.bool_] | None


def score(models: list[Model], hidden: list[Floats], targets: Integers, workers: Workers) -> Scores:
    """Score normed hidden states [n, hidden] of one model, or of two, the parent second.

    The KL divergence of a token is the mean of log(parent / checkpoint) under the parent, in nats.
    """
    vocabulary = models[0].matrix(models[0].head()).shape[0]
    running = [Running(len(targets)) for _ in models]
    cross: Doubles = np.zeros(len(targets))  # of exp(parent - largest) * (parent - checkpoint)
    batches = [slice(at, at + _TOKENS) for at in range(0, len(targets), _TOKENS)]
    for first in range(0, vocabulary, _ROWS):
        last = min(first + _ROWS, vocabulary)
        heads = [model.rows(model.head(), first, last, "head") for model in models]

        def work(batch: slice, first: int = first, heads: list[Floats] = heads) -> None:
            logits = [
                (states[batch] @ head.T).astype(np.float64)
                for states, head in zip(hidden, heads, strict=True)
            ]
            for sums, values in zip(running, logits, strict=True):
                shrink = _add(sums, values, batch, targets, first)
            if len(models) == 2:  # `shrink` is the parent's
                weight = np.exp(logits[1] - running[1].largest[batch, None])
                cross[batch] *= shrink
                cross[batch] += (weight * (logits[1] - logits[0])).sum(axis=1)

        list(workers.map(work, batches))
    losses = tuple(sums.normaliser - sums.target for sums in running)
    if len(models) == 1:
        return Scores(losses, None, None)
    checkpoint, parent = running
    divergence = cross / parent.sum - parent.normaliser + checkpoint.normaliser
    return Scores(losses, divergence, checkpoint.best == parent.best)


def _add(sums: Running, logits: Doubles, batch: slice, targets: Integers, first: int) -> Doubles:
    """Add logits [tokens, rows], for vocabulary rows from `first` on; return exp(old - new)."""
    best = logits.argmax(axis=1)
    top = np.take_along_axis(logits, best[:, None], axis=1)[:, 0]
    old = sums.largest[batch].copy()
    sums.best[batch] = np.where(top > old, best + first, sums.best[batch])
    new = np.maximum(old, top)
    shrink: Doubles = np.exp(old - new)
    sums.largest[batch] = new
    sums.sum[batch] = sums.sum[batch] * shrink + np.exp(logits - new[:, None]).sum(axis=1)
    row = targets[batch] - first
    hits = np.flatnonzero((row >= 0) & (row < logits.shape[1]))
    sums.target[batch][hits] = logits[hits, row[hits]]
    return shrink
