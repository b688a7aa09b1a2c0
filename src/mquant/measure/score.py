"""From final hidden states to losses and to the divergence of two models.

Logits are made for a piece of the vocabulary at a time, for all tokens, and are not kept: each
token keeps running sums in float64.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from mquant.forward.decoder import Integers, Model
from mquant.weights.decode import Floats
from mquant.weights.matrix import Workers

Doubles = npt.NDArray[np.float64]

_ROWS: Final = 4096
"""Vocabulary rows per call: 50 MB of lm_head at a hidden size of 3072, for each model."""
_TOKENS: Final = 256


class Running:
    """What one model's logits have come to, for each token: all arrays are [n]."""

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
    """The losses of n tokens in nats, ours first; the KL of each token; and where top 1 agrees."""

    losses: tuple[Doubles, ...]
    divergence: Doubles | None
    agree: npt.NDArray[np.bool_] | None


def score(models: list[Model], hidden: list[Floats], targets: Integers, workers: Workers) -> Scores:
    """Score normed hidden states [n, hidden] of one model, or of two, the parent second.

    KL is of ours from the parent: the mean of log(parent / ours) under the parent, in nats.
    """
    vocabulary = models[0].matrix(models[0].head()).shape[0]
    running = [Running(len(targets)) for _ in models]
    cross: Doubles = np.zeros(len(targets))  # of exp(parent - largest) * (parent - ours)
    batches = [slice(at, at + _TOKENS) for at in range(0, len(targets), _TOKENS)]
    for first in range(0, vocabulary, _ROWS):
        last = min(first + _ROWS, vocabulary)
        heads = [model.rows(model.head(), first, last, "head") for model in models]

        def work(some: slice, first: int = first, heads: list[Floats] = heads) -> None:
            logits = [
                (states[some] @ head.T).astype(np.float64)
                for states, head in zip(hidden, heads, strict=True)
            ]
            for each, values in zip(running, logits, strict=True):
                grown = _add(each, values, some, targets, first)
            if len(models) == 2:  # `grown` is the parent's
                weight = np.exp(logits[1] - running[1].largest[some, None])
                cross[some] *= grown
                cross[some] += (weight * (logits[1] - logits[0])).sum(axis=1)

        list(workers.map(work, batches))
    losses = tuple(each.normaliser - each.target for each in running)
    if len(models) == 1:
        return Scores(losses, None, None)
    ours, parents = running
    divergence = cross / parents.sum - parents.normaliser + ours.normaliser
    return Scores(losses, divergence, ours.best == parents.best)


def _add(each: Running, logits: Doubles, some: slice, targets: Integers, first: int) -> Doubles:
    """Count logits [tokens, rows] of the vocabulary from `first` on; returns exp(old - new)."""
    best = logits.argmax(axis=1)
    top = np.take_along_axis(logits, best[:, None], axis=1)[:, 0]
    old = each.largest[some].copy()
    each.best[some] = np.where(top > old, best + first, each.best[some])
    new = np.maximum(old, top)
    shrink: Doubles = np.exp(old - new)
    each.largest[some] = new
    each.sum[some] = each.sum[some] * shrink + np.exp(logits - new[:, None]).sum(axis=1)
    place = targets[some] - first
    here = np.flatnonzero((place >= 0) & (place < logits.shape[1]))
    each.target[some][here] = logits[here, place[here]]
    return shrink
