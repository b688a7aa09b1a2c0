"""Experts of a layer may lie in one tensor on disk, which a family file describes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges import opened
from mquant.checkpoint import Folder
from mquant.errors import DataFileError, SourceError
from mquant.loader_model import stacks
from mquant.plan.survey import Survey, survey
from mquant.synth import Precision, synth
from mquant.verify.judge import Depth, verify
from stacked import (
    LAYOUTS,
    ROWS,
    TRANSPOSED,
    Layout,
    arrays,
    family,
    of_each_expert,
    with_stacks,
    write,
)

STACK = "model.layers.0.mlp.experts.gate_up_proj"


def surveyed(folder: Path, tmp_path: Path, layout: Layout = ROWS) -> Survey:
    return survey(opened(folder), {"own": family(tmp_path, layout)})


def messages(result: Survey) -> list[str]:
    return [finding.message for finding in result.findings]


def changed(tmp_path: Path, layout: Layout = ROWS, **changes: Any) -> Path:
    """Write a checkpoint with stacks, and other tensors in layer 0, under the name of a stack."""
    src = with_stacks(of_each_expert(tmp_path / "each"), tmp_path / "stacked", layout)
    own = {f"model.layers.0.mlp.experts.{name}": value for name, value in changes.items()}
    return write(src, tmp_path / "changed", {**arrays(src), **own})


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_checkpoint_is_whole_in_either_layout(tmp_path: Path, layout: Layout) -> None:
    each = of_each_expert(tmp_path / "each")
    stacked = with_stacks(each, tmp_path / "stacked", layout)
    left, right = surveyed(each, tmp_path, layout), surveyed(stacked, tmp_path, layout)

    assert messages(left) == messages(right) == []
    shapes = [{m.info.name: m.info.shape for m in each.members} for each in (left, right)]
    assert shapes[0] == shapes[1]
    assert right.experts == 8


def test_layers_may_have_different_layouts(tmp_path: Path) -> None:
    each = of_each_expert(tmp_path / "each")
    stacked = with_stacks(each, tmp_path / "stacked", ROWS, range(1))

    assert messages(surveyed(stacked, tmp_path)) == []


def test_a_layer_in_both_layouts_is_refused(tmp_path: Path) -> None:
    each = of_each_expert(tmp_path / "each")
    half = with_stacks(each, tmp_path / "half", ROWS[:1])
    name = "model.layers.0.mlp.experts.0.down_proj.weight"

    assert messages(surveyed(half, tmp_path)) == [
        f"The shards hold {STACK}, which has all experts of the layer, and {name} "
        "(and 1 more layer like it)."
    ]
    report = verify(Folder(half), {"own": family(tmp_path, ROWS)}, Depth.STRUCTURE)
    assert [finding.rule for finding in report.findings] == ["experts-in-two-layouts"]


def test_a_missing_stack_is_missing_experts(tmp_path: Path) -> None:
    src = with_stacks(of_each_expert(tmp_path / "each"), tmp_path / "stacked", ROWS)
    tensors = arrays(src)
    del tensors["model.layers.1.mlp.experts.down_proj"]
    result = surveyed(write(src, tmp_path / "less", tensors), tmp_path)

    assert len(result.findings) == 1
    assert result.findings[0].rule == "tensor-missing"
    assert "(8 tensors)" in result.findings[0].message


def test_the_other_orientation_is_noticed(tmp_path: Path) -> None:
    src = with_stacks(of_each_expert(tmp_path / "each"), tmp_path / "stacked", TRANSPOSED)

    assert {finding.rule for finding in surveyed(src, tmp_path).findings} == {"shape-disagrees"}


def test_a_shape_without_experts_and_rows_is_named(tmp_path: Path) -> None:
    odd = changed(tmp_path, gate_up_proj=np.zeros((8, 127, 128), "f4"))

    assert (
        f"{STACK} is [8, 127, 128], but must hold gate_proj.weight and up_proj.weight of each "
        "expert."
    ) in messages(surveyed(odd, tmp_path))


def test_more_experts_than_tensors_of_any_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = with_stacks(of_each_expert(tmp_path / "each"), tmp_path / "stacked", ROWS)
    monkeypatch.setattr(stacks, "MAX_TENSORS", 40)

    with pytest.raises(SourceError, match="stacked has more than 40 tensors of experts"):
        surveyed(src, tmp_path)


@pytest.mark.parametrize(
    ("stack", "sentence"),
    [
        ({"name": "x.{layer}.y", "holds": ["model.norm.weight"]}, "must hold rows with {expert}"),
        ({**ROWS[0], "holds": ["x.{layer}.y.{expert}.z"]}, "there is no row x.{layer}.y"),
        ({**ROWS[0], "holds": []}, "at least 1 item"),
    ],
)
def test_a_stack_holds_rows_of_experts(
    tmp_path: Path, stack: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataFileError) as caught:
        family(tmp_path, (stack,))
    assert sentence in caught.value.message


def test_a_model_inside_a_larger_one_has_its_stacks_with_a_prefix(tmp_path: Path) -> None:
    names = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    own = family(tmp_path, ROWS, wrapped=[{"names": names}])
    inside = own.named_as({"language_model.model.norm.weight"})

    assert inside.stack_of(STACK) is None
    found = inside.stack_of(f"language_model.{STACK}")
    assert found
    assert (found[1], found[0].holds[0][:20]) == (0, "language_model.model")


def test_synth_writes_stacks_but_not_in_fp8(tmp_path: Path) -> None:
    own = family(tmp_path, TRANSPOSED)
    bf16, fp8 = (
        opened(synth(tmp_path / each.value, own, precision=each).path).tensors
        for each in (Precision.BF16, Precision.FP8_BLOCK)
    )

    assert bf16[STACK].shape == (8, 128, 2 * 64)
    assert "model.layers.0.mlp.experts.7.gate_proj.weight" in fp8
    assert STACK not in fp8


def test_vllm_takes_stacks_as_its_model_says(tmp_path: Path) -> None:
    each = of_each_expert(tmp_path / "each")
    for layout in (ROWS, TRANSPOSED):
        transposed = layout is TRANSPOSED
        row = {
            "name": "model.layers.{layer}.mlp.experts",
            "kind": "experts",
            "rows": ["num_local_experts", "moe_intermediate_size"],
            "columns": "hidden_size",
            "when": "moe",
            "transposed": transposed,
        }
        own = {"own": family(tmp_path, layout, vllm={"layers": [row]})}
        src = with_stacks(each, tmp_path / f"{transposed}", layout)
        assert verify(Folder(src), own, Depth.STRUCTURE).verdict.startswith("Clean for vLLM")


def test_vllms_own_layout_decides_whether_a_stack_loads(tmp_path: Path) -> None:
    each = of_each_expert(tmp_path / "each")
    src = with_stacks(each, tmp_path / "src", TRANSPOSED)
    report = verify(Folder(src), {"own": family(tmp_path, TRANSPOSED)}, Depth.STRUCTURE)

    assert [finding.rule for finding in report.findings] == ["vllm-refuses"]


@pytest.mark.parametrize("layout", [ROWS, TRANSPOSED], ids=["rows", "transposed"])
def test_a_swapped_expert_is_noticed_against_the_parent(tmp_path: Path, layout: Layout) -> None:
    parent = with_stacks(of_each_expert(tmp_path / "each"), tmp_path / "stacked", layout)
    tensors = arrays(tmp_path / "each")
    first, second = (f"model.layers.0.mlp.experts.{n}.down_proj.weight" for n in (2, 3))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    child = write(parent, tmp_path / "child", tensors)
    own = {"own": family(tmp_path, layout)}

    right = verify(Folder(tmp_path / "each"), own, Depth.FULL, Folder(parent))
    wrong = verify(Folder(child), own, Depth.FULL, Folder(parent))
    assert not right.count("error")
    assert [finding.rule for finding in wrong.findings] == ["kept-tensor-differs"]
    assert "2 tensors" in wrong.findings[0].message or "1 more" in wrong.findings[0].message
