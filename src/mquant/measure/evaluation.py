"""Run a checkpoint and its parent on a text, a layer at a time, and compare the predictions."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mquant.checkpoint import Source, open_checkpoint, reader_of
from mquant.errors import SourceError
from mquant.events import Emit, Note, Progress, silent
from mquant.family import Family
from mquant.findings import Finding, rule
from mquant.forward.decoder import Model
from mquant.forward.tensors import Integers
from mquant.loader_model.modules import ModuleView, read_modules
from mquant.loader_model.storage import activations, format_of, groups
from mquant.measure.calibrated_on import calibrated_on
from mquant.measure.perplexity import Doubles, score
from mquant.text import size
from mquant.tokens.text_tokens import read_tokens
from mquant.tokens.tokenizer import check_ids
from mquant.verify.digests import check_measured
from mquant.weights.decode import Floats
from mquant.weights.matrix import Workers

CONTEXT: Final = 512
TOKENS: Final = 16_384
_MOST_NATS: Final = 700  # exp(710) is infinite

ACTIVATIONS_NOT_QUANTIZED: Final = rule(
    "activations-not-quantized",
    "An evaluation computes as the engine does.",
    "mquant eval keeps activations in float32.",
    "To measure the effect of quantized activations, run the model on an engine that has the "
    "kernels.",
    severity="info",
    needs="run",
)


@dataclass(frozen=True)
class Routing:
    """The work of a layer's router: how many tokens chose each expert, also in the parent.

    `agreement` is the share of chosen experts that both models chose; None without a parent.
    """

    layer: int
    usage: tuple[int, ...]
    parent_usage: tuple[int, ...] | None
    agreement: float | None


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a checkpoint, and of its parent, on a text.

    `tokens` were predicted in windows of `context`. `text_bytes` of the text were read, which have
    `text_sha256`; `text_tokens` is the length of the text, None if it was not read to its end. `kl`
    is the KL divergence from the parent, in nats a token. `agreement` is the share of tokens for
    which both models expect the same token.
    """

    source: str
    parent: str | None
    text: str
    text_sha256: str
    text_bytes: int
    text_tokens: int | None
    tokens: int
    context: int
    perplexity: float
    parent_perplexity: float | None
    kl: float | None
    agreement: float | None
    routing: tuple[Routing, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def router_agreement(self) -> float | None:
        """The mean agreement of all layers; None if no layer has an agreement."""
        agreements = [layer.agreement for layer in self.routing if layer.agreement is not None]
        return sum(agreements) / len(agreements) if agreements else None

    def to_json(self) -> dict[str, Any]:
        """Return the keys of `mquant.eval/1` besides the envelope's."""
        return {
            "source": self.source,
            "parent": self.parent,
            "text": {
                "name": self.text,
                "bytes": self.text_bytes,
                "sha256": self.text_sha256,
                "tokens": self.text_tokens,
            },
            "tokens": self.tokens,
            "context": self.context,
            "perplexity": self.perplexity,
            "parent_perplexity": self.parent_perplexity,
            "kl_nats": self.kl,
            "top1_agreement": self.agreement,
            "router_agreement": self.router_agreement,
            "routing": [
                {
                    "layer": layer.layer,
                    "agreement": layer.agreement,
                    "usage": list(layer.usage),
                    "parent_usage": list(layer.parent_usage) if layer.parent_usage else None,
                }
                for layer in self.routing
            ],
        }


def evaluate(
    source: Source,
    parent: Source | None,
    families: Mapping[str, Family],
    text: Path,
    *,
    context: int = CONTEXT,
    tokens: int = TOKENS,
    digests: bool = True,
    emit: Emit = silent,
) -> Evaluation:
    """Measure the perplexity of a checkpoint on a text, and its routing.

    With a parent, also measure the parent's perplexity and routing, and the KL divergence.
    `digests` False: the caller has compared the files with mquant.json.

    Raises DataFileError if the text cannot be read, and SourceError if tokenizer or checkpoint
    cannot be read, if the architecture is unknown, if both vocabularies differ in size, if
    the parent's files are not as its mquant.json says, or if a model computes a number that is not
    finite.
    """
    sources = [source] if parent is None else [source, parent]
    with _fitting(sources), Workers(os.cpu_count() or 1) as workers:
        models = [_model(source, families, context, workers) for source in sources]
        if len({model.matrix(model.head()).shape[0] for model in models}) != 1:
            raise SourceError(
                f"{source.name} and {sources[-1].name} have vocabularies of different sizes.",
                "Give the parent that the checkpoint was made from.",
            )
        read = read_tokens(text, sources, tokens + 1)
        ids = read.ids
        check_ids([ids], models[0].matrix(f"{models[0].base}embed_tokens.weight").shape[0])
        count = min(tokens, len(ids) - 1)
        emit(Note("info", _plan(count, len(ids) - 1 if read.whole else None, context, models)))
        changed = check_measured(source, parent, emit) if digests else ()
        windows = [slice(at, min(at + context, count)) for at in range(0, count, context)]
        hidden = [model.embed(ids[:count]) for model in models]
        with np.errstate(all="ignore"):  # numbers that are not finite are an error, no warning
            _check_finite(models, hidden, "the embeddings give", "embed_tokens.")
            routing = _run(models, hidden, windows, emit)
            for model, states in zip(models, hidden, strict=True):
                states[:] = model.last_norm(states)
            scores = score(models, hidden, ids[1 : count + 1], workers)
    perplexities = [_perplexity(m, loss) for m, loss in zip(models, scores.losses, strict=True)]
    return Evaluation(
        source=source.name,
        parent=parent.name if parent else None,
        text=text.name,
        text_sha256=read.sha256,
        text_bytes=read.bytes,
        text_tokens=len(ids) if read.whole else None,
        tokens=count,
        context=context,
        perplexity=perplexities[0],
        parent_perplexity=perplexities[1] if parent else None,
        kl=None if scores.divergence is None else float(scores.divergence.mean()),
        agreement=None if scores.agree is None else float(scores.agree.mean()),
        routing=routing,
        findings=(*changed, *_remarks(models[0].view, source, text, ids[: count + 1])),
    )


def _run(
    models: list[Model], hidden: list[Floats], windows: list[slice], emit: Emit
) -> tuple[Routing, ...]:
    routing: list[Routing] = []
    layers = models[0].shape.layers
    sizes = [
        sum(model.nbytes(f"{model.base}layers.{number}.") for model in models)
        for number in range(layers)
    ]
    for number in range(layers):
        chosen = [
            model.layer(number, states, windows)
            for model, states in zip(models, hidden, strict=True)
        ]
        _check_finite(models, hidden, f"layer {number} gives", f"layers.{number}.")
        routed = [experts for experts in chosen if experts is not None]
        if routed:
            routing.append(_routing(number, routed, models[0].shape.experts))
        emit(Progress("evaluate", sum(sizes[: number + 1]), sum(sizes)))
    return tuple(routing)


def _routing(layer: int, chosen: list[Integers], experts: int) -> Routing:
    usage = [tuple(np.bincount(ids.ravel(), minlength=experts).tolist()) for ids in chosen]
    if len(chosen) == 1:
        return Routing(layer, usage[0], None, None)
    checkpoint, parent = chosen
    agree = (checkpoint[:, :, None] == parent[:, None, :]).any(axis=2)
    return Routing(layer, usage[0], usage[1], float(agree.mean()))


def _model(source: Source, families: Mapping[str, Family], context: int, workers: Workers) -> Model:
    view = read_modules(open_checkpoint(source), families)
    return Model(view, reader_of(source), context, workers)


def _plan(count: int, total: int | None, context: int, models: list[Model]) -> str:
    memory = count * models[0].shape.hidden * 4 * len(models)
    whole = "" if count == total else " of more" if total is None else f" of {total:,}"
    return (
        f"{count:,}{whole} tokens in windows of {context}; hidden states take {size(memory)} "
        "of memory, beside one layer's weights."
    )


def _remarks(view: ModuleView, source: Source, text: Path, ids: Integers) -> Iterator[Finding]:
    """Yield what a reader of the figures must know of the text and of the checkpoint."""
    yield from calibrated_on(source, text, ids)
    yield from _activations(view)


def _activations(view: ModuleView) -> Iterator[Finding]:
    kinds = {format_of(view, module) for module in view.quantized} - {None}
    static = any(activations(kind, view) is not False for kind in kinds if kind)
    if static or any(group.get("input_activations") for group in groups(view.config)):
        yield ACTIVATIONS_NOT_QUANTIZED.finding(
            "config.json",
            "Engines may quantize activations of this checkpoint; mquant eval keeps activations in "
            "float32, so the result is that of the weights alone.",
            "To measure quantized activations, run the model on an engine that has the kernels.",
        )


@contextmanager
def _fitting(sources: list[Source]) -> Iterator[None]:
    """Turn the errors of arithmetic on a damaged model into a sentence."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError) as e:
        raise SourceError(
            f"{' or '.join(source.name for source in sources)} cannot be evaluated: the weights do "
            f"not fit config.json ({type(e).__name__}: {str(e)[:120]}).",
            "Run mquant verify on the checkpoint.",
        ) from e


def _perplexity(model: Model, losses: Doubles) -> float:
    loss = float(losses.mean())
    if not loss < _MOST_NATS:  # also NaN
        raise model.not_finite("the logits give", f"{model.base}norm.", model.head())
    return math.exp(loss)


def _check_finite(models: list[Model], hidden: list[Floats], gives: str, part: str) -> None:
    for model, states in zip(models, hidden, strict=True):
        model.check_finite(states, gives, f"{model.base}{part}")
