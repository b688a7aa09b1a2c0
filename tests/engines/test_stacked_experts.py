"""Experts that lie in one tensor on disk become the bytes that experts of their own become."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges import opened
from mquant.family import Family
from mquant.family_files import load_families
from mquant.plan import make_plan
from mquant.recipe import find_recipe
from mquant.runs.quantize import quantize
from mquant.runs.spec import Engine
from mquant.synth import Sizes, synth
from run import MEASURED
from stacked import (
    APART,
    BIASES,
    BOTH,
    LAYOUTS,
    OF_BIASES,
    TRANSPOSED,
    Layout,
    arrays,
    family,
    of_each_expert,
    with_stacks,
)

SHIPPED = load_families()
EXPERT = "model.layers.1.mlp.experts.5"


def quantized(
    src: Path,
    out: Path,
    own: Family,
    recipe: str = "nvfp4",
    engine: Engine = Engine.STREAM,
    *,
    unsafe: bool = False,
) -> dict[str, Any]:
    """Quantize a checkpoint and return its tensors."""
    plan = make_plan(opened(src), find_recipe(recipe), {"own": own}, allow_unsafe=unsafe)
    quantize(plan, out, engine=engine)
    return arrays(out)


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    different = [name for name, value in left.items() if value.tobytes() != right[name].tobytes()]
    assert different == []


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-opt", "fp8-dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_bytes_of_separate_experts(
    tmp_path: Path, layout: Layout, recipe: str
) -> None:
    src = of_each_expert(tmp_path / "each")
    expected = quantized(src, tmp_path / "expected", SHIPPED["qwen3_moe"], recipe)
    stacked = with_stacks(src, tmp_path / "stacked", layout)

    assert_same(quantized(stacked, tmp_path / "out", family(tmp_path, layout), recipe), expected)


@pytest.mark.upstream
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_experts_bytes_are_llmcompressors(tmp_path: Path, layout: Layout) -> None:
    from upstream import fused

    src = of_each_expert(tmp_path / "each")
    stacked = with_stacks(src, tmp_path / "stacked", layout)
    tensors = quantized(stacked, tmp_path / "out", family(tmp_path, layout))
    weights = arrays(src)

    for names in (("gate_proj", "up_proj"), ("down_proj",)):
        words = [(weights[f"{EXPERT}.{name}.weight"].view(np.uint16), "BF16") for name in names]
        for name, expected in zip(names, fused(names, words), strict=True):
            module = f"{EXPERT}.{name}"
            assert (tensors[f"{module}.weight_packed"] == expected.packed).all()
            assert (tensors[f"{module}.weight_scale"].view(np.uint8) == expected.scales).all()
            assert tensors[f"{module}.weight_global_scale"] == expected.global_scale


@pytest.mark.upstream
def test_the_oneshot_engine_reads_experts_out_of_one_tensor(tmp_path: Path) -> None:
    stacked = with_stacks(of_each_expert(tmp_path / "each"), tmp_path / "stacked", TRANSPOSED)
    own = family(tmp_path, TRANSPOSED)

    assert_same(
        quantized(stacked, tmp_path / "oneshot", own, engine=Engine.ONESHOT),
        quantized(stacked, tmp_path / "stream", own),
    )


def test_biases_are_kept_as_tensors_of_each_expert(tmp_path: Path) -> None:
    layout = (*BOTH, *OF_BIASES)
    own = family(tmp_path, layout, tensors=BIASES, vllm=None)
    src = of_each_expert(tmp_path / "each", own)
    stacked = with_stacks(src, tmp_path / "stacked", layout)
    tensors, weights = quantized(stacked, tmp_path / "out", own, unsafe=True), arrays(src)

    biases = {name for name in weights if name.endswith(".bias")}
    assert len(biases) == 2 * 8 * 3
    assert biases == {name for name in tensors if "bias" in name}
    assert all((tensors[name] == weights[name]).all() for name in biases)


@pytest.mark.parametrize("layout", [BOTH, APART], ids=["transposed", "apart"])
def test_experts_that_are_not_quantized_stay_in_one_tensor(tmp_path: Path, layout: Layout) -> None:
    src = with_stacks(of_each_expert(tmp_path / "each"), tmp_path / "stacked", layout)
    recipe = tmp_path / "attention.yaml"
    recipe.write_text("name: attention\nsuffix: X\nroles: {attention: NVFP4A16}\n")
    own = family(tmp_path, layout, vllm=None)
    tensors = quantized(src, tmp_path / "out", own, str(recipe))
    originals = arrays(src)

    for stack in layout:
        name = stack["name"].replace("{layer}", "1")
        assert (tensors[name] == originals[name]).all()
    assert not [name for name in tensors if ".experts.0." in name]


def peak(tmp_path: Path, experts: int) -> int:
    """Quantize a checkpoint with so many experts in another process; return its peak memory."""
    own = family(tmp_path, TRANSPOSED, vllm=None)
    sizes = Sizes(layers=1, experts=experts, hidden=1024, intermediate=1024)
    src = synth(tmp_path / f"{experts}", own, sizes=sizes).path
    out = tmp_path / f"out-{experts}"
    arguments = ["quantize", str(src), "--recipe", "nvfp4", "-o", str(out), "--workers", "1"]
    own_file = ["--family", str(tmp_path / "stacked.yaml")]
    command = [sys.executable, "-c", MEASURED, *arguments, *own_file]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (out / "mquant.json").is_file(), run.stderr
    return int(run.stderr.rpartition("peak ")[2])


def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    few = peak(tmp_path, 2)
    assert peak(tmp_path, 40) < few + 20_000_000  # 38 experts have 240 MB
