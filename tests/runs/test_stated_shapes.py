"""Packed integers that state another shape, and scales that are no numbers, are refused."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from judges import opened
from mquant.checkpoint import Folder, open_checkpoint, reader_of
from mquant.engines import stream
from mquant.errors import Refused, SourceError
from mquant.plan import make_bf16_plan
from mquant.runs.quantize import quantize
from mquant.synth import Precision
from mquant.verify.judge import Depth
from mutate import Bytes, changed, judged, mutated, scalar, setting
from released import FAMILIES, dequantized, source
from run import TRAINED, plan_of, quantize_nvfp4

MODULE = "model.layers.1.mlp.experts.1.down_proj"


def stating(rows: int, columns: int) -> Callable[[Bytes], None]:
    def change(values: Bytes) -> None:
        values.view("<i8")[:] = rows, columns

    return change


def by_recipe(roles: str) -> Callable[[Path, Path], object]:
    def write(src: Path, out: Path) -> None:
        recipe = src.parent / "recipe.yaml"
        recipe.write_text(f"{{name: mine, suffix: X, roles: {roles}}}")
        quantize(plan_of(src, str(recipe)), out)

    return write


VERBS = {
    "dequantize": dequantized,
    "quantize": by_recipe("{expert: NVFP4A16}"),
    "keep": by_recipe("{expert: source, attention: NVFP4A16}"),
}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return source(tmp_path / "src", Precision.INT4)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("signs", [(-1, 1), (1, -1), (2, 1)])
def test_a_stated_shape_that_is_not_that_of_the_codes_is_refused_before_anything_is_written(
    src: Path, tmp_path: Path, verb: str, signs: tuple[int, int]
) -> None:
    name = f"{MODULE}.weight_shape"
    rows, packed = opened(src).tensors[f"{MODULE}.weight_packed"].shape
    stated = [rows * signs[0], packed * 8 * signs[1]]
    bad = mutated(src, tmp_path, edit=changed(name, data=stating(*stated)))
    assert "packed-shape-differs" in judged(bad, None, Depth.NUMBERS)

    with pytest.raises(Refused) as caught:
        VERBS[verb](bad, tmp_path / "out")

    (finding,) = caught.value.findings
    assert (finding.rule, finding.where) == ("packed-shape-differs", name)
    assert finding.message == (
        f"{name} is {stated}; the codes unpack to {[rows, packed * 8]}, with num_bits 4 of "
        "config.json."
    )
    assert not (tmp_path / "out").exists()


def test_the_stated_shape_is_read_with_the_weight_too(src: Path, tmp_path: Path) -> None:
    """The sizes of a hub repo are not read ahead: each would be a request."""
    edit = changed(f"{MODULE}.weight_shape", data=stating(1, 1))
    bad = open_checkpoint(Folder(mutated(src, tmp_path, edit=edit)))
    plan = make_bf16_plan(bad, FAMILIES)
    (unit,) = (unit for unit in plan.units if unit.actions[0].module == MODULE)
    with (
        closing(reader_of(bad.source)) as reader,
        pytest.raises(SourceError, match=r"weight_shape is \[1, 1\]; the codes unpack to"),
    ):
        stream.make(reader, unit)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_global_scale_that_is_no_number_above_zero_is_refused(
    tmp_path: Path, value: float
) -> None:
    good = quantize_nvfp4(TRAINED, tmp_path / "good")
    name = "model.layers.0.self_attn.o_proj.weight_global_scale"
    bad = mutated(good, tmp_path / "b", edit=changed(name, data=scalar(value)))
    with pytest.raises(SourceError, match=f"{name} is {value:g}, and must be a number above zero"):
        dequantized(bad, tmp_path / "out")


def test_a_scale_that_is_no_number_is_refused(src: Path, tmp_path: Path) -> None:
    name = f"{MODULE}.weight_scale"
    bad = mutated(src, tmp_path, edit=changed(name, data=setting(slice(0, 2), 0xFF)))
    with pytest.raises(SourceError, match=f"{name} holds a scale that is NaN or infinite"):
        dequantized(bad, tmp_path / "out")
