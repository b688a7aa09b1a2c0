"""The cost of a second rounding is the relative error that `mquant compare` measures."""

from pathlib import Path

import pytest

from judges import opened
from mquant.checkpoint import Folder
from mquant.events import Event, Note
from mquant.family_files import load_families
from mquant.measure.comparison import compare
from mquant.runs.cost import measure_cost
from mquant.runs.quantize import quantize
from mquant.synth import Precision, Sizes, synth
from run import TRAINED, plan_of

FAMILIES = load_families()


def source(folder: Path) -> Path:
    sizes = Sizes(layers=1, experts=1, hidden=256, intermediate=128, vocab=256)
    family = FAMILIES["minimax_m2"]
    return synth(folder / "src", family, sizes=sizes, precision=Precision.FP8_BLOCK).path


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-opt", "fp8-dynamic"])
def test_the_error_of_all_weights_is_that_of_compare(tmp_path: Path, recipe: str) -> None:
    """All of the few weights are measured; compare does not round the weights to BF16 first."""
    src = source(tmp_path)
    plan = plan_of(src, recipe)
    (cost,) = measure_cost(plan, Folder(src), None)
    assert cost.weights == cost.of == 7
    out = quantize(plan, tmp_path / "out").out
    comparison = compare(Folder(out), Folder(src), FAMILIES)
    error = comparison.total
    assert cost.error == pytest.approx(error.relative, rel=0.01)


def test_a_run_tells_the_cost(tmp_path: Path) -> None:
    events = list[Event]()
    quantize(plan_of(source(tmp_path)), tmp_path / "out", emit=events.append)
    (note,) = [e for e in events if isinstance(e, Note) and "relative error" in e.message]
    assert note.message.startswith("FP8 in blocks to NVFP4A16: a relative error of 9.")
    assert note.message.endswith("% against the source's weights, measured on 7 of 7 weights.")


def test_a_plain_source_has_no_such_cost() -> None:
    assert opened(TRAINED).tensors
    assert measure_cost(plan_of(TRAINED), Folder(TRAINED), None) == []
