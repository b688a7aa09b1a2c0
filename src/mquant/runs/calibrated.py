"""The part of a `mquant quantize` run in which text goes through the model."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from mquant.checkpoint import reader_of
from mquant.engines.calibrated.gptq import gptq
from mquant.engines.calibrated.quantizing import FEW, Quantizing
from mquant.engines.calibrated.walk import Saved, walk
from mquant.events import Note
from mquant.forward.decoder import Integers, Model
from mquant.loader_model.modules import read_modules
from mquant.output import ShardSet, StatesFile
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


def run_calibrated(run: Run, samples: Sequence[Integers], output: ShardSet) -> None:
    """Quantize what the plan quantizes, except casts, and write it into `output`.

    A run that was stopped goes on after the last layer whose states are in OUT. Raises as `walk`.
    """
    plan = run.plan
    file = StatesFile(run.out, _key(run))
    said = run.claimed.recorded.said
    view = read_modules(plan.survey.checkpoint, {plan.family.name: plan.family})
    workers = run.workers or default_workers() - 1  # the disk is no limit
    with closing(reader_of(run.source)) as reader, Workers(workers) as pool:
        model = Model(view, reader, max(map(len, samples)), pool)
        method = Quantizing(model, plan, output, gptq(plan.recipe), pool)
        if said is None or method.pending:
            walk(model, samples, method, _States(file))
            method.finish()
            said = method.said
            run.claimed.say(said)
    file.delete()
    _tell(run, said)


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
