"""The part of a `mquant quantize` run in which text goes through the model."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np

from mquant.checkpoint import Source, reader_of
from mquant.engines.calibrated.gptq import gptq
from mquant.engines.calibrated.input_scales import FEW, InputScales, input_scale_of
from mquant.engines.calibrated.quantizing import Quantizing
from mquant.engines.calibrated.walk import Saved, walk
from mquant.events import Note
from mquant.forward.decoder import Model
from mquant.forward.tensors import Integers
from mquant.loader_model.modules import read_modules
from mquant.output import ShardSet, StatesFile
from mquant.plan import Plan
from mquant.runs.run import Run
from mquant.runs.workers import default_workers
from mquant.text import names, plural
from mquant.weights.matrix import Workers


class _States:
    """The states of a run, in a file of OUT."""

    def __init__(self, file: StatesFile) -> None:
        self._file = file

    def read(self) -> Saved | None:
        found = self._file.read()
        return None if found is None else Saved(*found)

    def save(self, saved: Saved) -> None:
        self._file.save(*saved)


@contextmanager
def model_of(
    plan: Plan, source: Source, samples: Sequence[Integers], workers: int | None = None
) -> Iterator[Model]:
    """Open the plan's model, whose files are in `source`, for a pass of `samples`.

    `workers` is the number of threads; None: one for each core.
    """
    view = read_modules(plan.survey.checkpoint, {plan.family.name: plan.family})
    threads = workers or default_workers() - 1  # here the disk is no limit
    with closing(reader_of(source)) as reader, Workers(threads) as pool:
        yield Model(view, reader, max(map(len, samples)), pool)


def run_calibrated(
    run: Run, samples: Sequence[Integers], output: ShardSet
) -> Callable[[str], np.float32] | None:
    """Send the samples through the model, and do what the recipe does with them.

    GPTQ writes what the plan quantizes, except casts, into `output`. Otherwise, return the scales
    of the modules' inputs, which the stream engine writes. A run that was stopped goes on after the
    last layer whose states are in OUT. Raises as `walk`.
    """
    file, recipe = StatesFile(run.out, _key(run)), run.plan.recipe
    said = run.claimed.recorded.said
    with model_of(run.plan, run.source, samples, run.workers) as model:
        if recipe.rounding == "gptq":
            quantizing = Quantizing(model, run.plan, output, gptq(run.plan))
            if said is None or quantizing.pending:
                walk(model, samples, quantizing, _States(file), run.emit)
                quantizing.finish()
                said = quantizing.said
                run.claimed.say(said)
            _tell(run, said)
        elif said is None:
            measuring = InputScales(model, run.plan)
            walk(model, samples, measuring, _States(file), run.emit)
            said = measuring.said
            run.claimed.say(said)
    file.delete()
    return None if recipe.rounding == "gptq" else input_scale_of(said)


def _key(run: Run) -> str:
    """Return what tells the states of this run from others: what is made, and from which files."""
    told = json.dumps([run.spec.fingerprint, run.spec.stamps], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _tell(run: Run, said: Mapping[str, Any]) -> None:
    """Tell of the modules that the data hardly reached, and note them for mquant.json."""
    few = {key: modules for key, modules in said.items() if modules}
    if few:
        run.used["few_inputs"] = few
    for sentence in _sentences(few):
        run.emit(Note("warning", sentence))


def _sentences(few: Mapping[str, Any]) -> Iterator[str]:
    if experts := few.get("no_tokens"):
        yield (
            f"No calibration token was routed to {plural(len(experts), 'expert')} "
            f"({names(experts)}): the inputs of all tokens count for their gate and up, and their "
            "down is quantized from its weights alone."
        )
    if experts := few.get("few_tokens"):
        yield (
            f"{plural(len(experts), 'expert')} ({names(experts)}) saw fewer than {FEW} calibration "
            "tokens: the inputs of all tokens count too."
        )
    if modules := few.get("no_inputs"):
        yield (
            f"{plural(len(modules), 'module')} ({names(modules)}) "
            f"{'is' if len(modules) == 1 else 'are'} no part of the forward pass that mquant "
            "knows, and quantized from the weights alone."
        )
