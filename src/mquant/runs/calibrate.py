"""Write an importance file (see `engines.importance`) from text that the model processes."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mquant.checkpoint import build_header
from mquant.engines.calibrated.listening import MeanSquares
from mquant.engines.calibrated.walk import walk
from mquant.engines.importance import CALIBRATION
from mquant.errors import Refused
from mquant.events import Emit, silent
from mquant.numerics.floats import Floats
from mquant.output import Document
from mquant.plan import Plan
from mquant.runs.calibrated import model_of
from mquant.runs.checks import check_forward
from mquant.tokens.calibration_data import find_data
from mquant.tokens.samples import load_samples
from mquant.verify.digests import refuse_changed


@dataclass(frozen=True)
class Calibrated:
    """A written importance file: how many modules the file has, and which of them saw no token.

    The vector of a module that saw no token is zero: then all channels of the module count alike.
    `data` is the record of the samples (see `tokens.samples`).
    """

    out: Path
    modules: int
    samples: int
    tokens: int
    data: Mapping[str, Any]
    unseen: tuple[str, ...]


def calibrate(plan: Plan, data: str, out: Path, emit: Emit = silent) -> Calibrated:
    """Send `data` through the model that `plan` quantizes, and write the importance file.

    Raises Refused for a plan with errors, UsageError for a model whose forward pass is not known,
    OutputError if `out` exists or cannot be written, DataFileError for data that cannot be read.
    """
    if plan.refusals:
        raise Refused(plan.refusals)
    check_forward(plan, "Take recipe nvfp4-opt without --importance.")
    found = find_data(data)
    document = Document(out, "-o", b"")
    document.check()
    refuse_changed(plan.survey.checkpoint.source, emit)
    source = plan.survey.checkpoint.source.materialize(emit)
    samples = load_samples(found, source, plan.recipe.calibration, emit)
    emit(samples.note)
    widths = {a.module: a.source.shape[1] for a in plan.actions if a.scheme}
    with model_of(plan, source, samples.ids) as model:
        measured = MeanSquares(model, plan)
        walk(model, samples.ids, measured, emit=emit)
    vectors = {
        name: measured.means.get(name, np.zeros(width, np.float32)).astype("<f4")
        for name, width in widths.items()
    }
    document.write(_file(vectors, samples.record))
    unseen = tuple(name for name in widths if name not in measured.means)
    return Calibrated(out, len(vectors), len(samples.ids), samples.tokens, samples.record, unseen)


def _file(vectors: dict[str, Floats], calibration: Mapping[str, Any]) -> Iterator[bytes]:
    rows = [(name, "F32", vector.shape) for name, vector in vectors.items()]
    metadata = {"format": "pt", CALIBRATION: json.dumps(calibration)}
    yield build_header(rows, keep_order=True, metadata=metadata)[0]
    yield from (vector.tobytes() for vector in vectors.values())
