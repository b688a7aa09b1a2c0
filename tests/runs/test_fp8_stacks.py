"""Experts in FP8 that lie in one tensor on disk, with their scales in a second one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from judges import hashes, opened, read_json
from make import write_json
from mquant.checkpoint import Folder
from mquant.family import Family
from mquant.family_files import load_families
from mquant.measure.comparison import compare
from mquant.plan import make_bf16_plan, make_plan
from mquant.recipe import find_recipe
from mquant.runs.convert import convert
from mquant.runs.quantize import quantize
from mquant.synth import Precision, Sizes, synth
from mquant.verify.judge import Depth, verify
from stacked import (
    APART,
    BOTH,
    INTERLEAVED,
    ROWS,
    TRANSPOSED,
    Layout,
    arrays,
    family,
    with_stacks,
    write,
)
from stacked import of_each_expert as bf16

Scales = npt.NDArray[Any]
FP8: Final = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS: Final = {**FP8, "weight_block_size": [32, 16]}
LARGE: Final = {**FP8, "weight_block_size": [128, 128]}
MODELOPT: Final = {"quant_method": "modelopt", "quant_algo": "FP8"}
FBGEMM: Final = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}


def each(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1]


def alone(_: tuple[int, ...]) -> tuple[int, ...]:
    return ()


def each_in_blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 1, 1)


def rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], 1)


def columns(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 1, shape[2])


def outputs(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of gate_up_proj [8, 128, 2 * 64] and down_proj [8, 64, 128], as transformers stores them."""
    return columns(shape) if shape[1] == 128 else (shape[0], shape[2], 1)


def in_blocks(high: int, wide: int) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    return lambda shape: (shape[0], shape[1] // high, shape[2] // wide)


Shape = tuple[int, ...]
CASES: Final[dict[str, tuple[Layout, dict[str, Any], str, Callable[[Shape], Shape]]]] = {
    "blocks": (ROWS, BLOCKS, "_scale_inv", in_blocks(32, 16)),
    "transposed blocks": (TRANSPOSED, BLOCKS, "_scale_inv", in_blocks(16, 32)),
    "for each expert": (ROWS, FP8, "_scale_inv", each),
    "for each expert, transposed": (TRANSPOSED, FP8, "_scale_inv", each_in_blocks),
    "for all experts": (ROWS, MODELOPT, "_weight_scale", alone),
    "a block larger than an expert": (ROWS, LARGE, "_scale_inv", each_in_blocks),
    "a block larger than an expert, apart": (APART, LARGE, "_scale_inv", each_in_blocks),
    "for each row": (ROWS, FBGEMM, "_scale", rows),
    "for each column": (TRANSPOSED, FBGEMM, "_scale", columns),
    "for each column, interleaved": (BOTH, FBGEMM, "_scale", columns),
    "FBGEMM of Llama 4": (TRANSPOSED, FBGEMM, "_scale", outputs),
    "for each row, interleaved": (INTERLEAVED, FBGEMM, "_scale", rows),
}


def released(
    folder: Path,
    layout: Layout,
    config: dict[str, Any],
    end: str,
    shape_of: Callable[[tuple[int, ...]], tuple[int, ...]],
) -> tuple[Path, dict[str, torch.Tensor], Family]:
    """Write a checkpoint with stacks in FP8; return it, its stacks in BF16, and its family."""
    own, random = family(folder, layout, vllm=None), np.random.default_rng(5)
    src = with_stacks(bf16(folder / "each"), folder / "plain", layout)
    tensors, expected = arrays(src), dict[str, torch.Tensor]()
    for name in [name for name in tensors if tensors[name].ndim == 3]:
        shape = tensors[name].shape
        codes = random.uniform(-400, 400, shape).astype(ml_dtypes.float8_e4m3fn)
        scale = random.uniform(1e-4, 2e-4, shape_of(shape)).astype(np.float32)
        tensors[name], tensors[name + end] = codes, scale
        if end == "_weight_scale":
            tensors[f"{name}_input_scale"] = np.array(0.5, np.float32)
        numbers = torch.from_numpy(codes.astype(np.float32)) * torch.from_numpy(wide(scale, shape))
        expected[name] = numbers.to(torch.bfloat16)
    return declared(write(src, folder / "src", tensors), config), expected, own


def declared(out: Path, config: dict[str, Any]) -> Path:
    """Let config.json of a checkpoint declare a quantization config."""
    table = read_json(out / "config.json")
    write_json(out / "config.json", {**table, "quantization_config": config})
    return out


def wide(scale: Scales, shape: tuple[int, ...]) -> Scales:
    """Return a scale for each code."""
    scale = scale.reshape(*scale.shape, *(1,) * (3 - scale.ndim))
    if scale.shape[1:] == (shape[2], 1) and shape[1] != shape[2]:
        scale = scale.transpose(0, 2, 1)
    for axis, size in enumerate(shape):
        scale = np.repeat(scale, size // scale.shape[axis], axis)
    return np.ascontiguousarray(scale)


@pytest.mark.parametrize("case", CASES)
def test_stacks_are_dequantized_and_their_experts_quantized_alike(
    tmp_path: Path, case: str
) -> None:
    src, expected, own = released(tmp_path, *CASES[case])
    families = {"own": own}
    out = convert(make_bf16_plan(opened(src), families), tmp_path / "out", "dequantize").out
    made = arrays(out)
    assert sorted(n for n in made if n.endswith(("scale", "scale_inv"))) == []
    for name, weights in expected.items():
        assert (made[name].view(np.int16) == weights.view(torch.int16).numpy()).all()

    results = []
    for parent in (src, out):
        plan = make_plan(opened(parent), find_recipe("nvfp4"), families)
        results.append(quantize(plan, tmp_path / f"{parent.name}-nvfp4").out)
    names = ("model.safetensors.index.json", "mquant.json", "config.json")
    theirs, ours = ({k: v for k, v in hashes(r).items() if k not in names} for r in results)
    assert ours == theirs


@pytest.mark.parametrize("case", CASES)
def test_the_judge_reads_stacks_as_the_engines_read_them(tmp_path: Path, case: str) -> None:
    src, _, own = released(tmp_path, *CASES[case])
    families = {"own": own}
    out = convert(make_bf16_plan(opened(src), families), tmp_path / "out", "dequantize").out
    report = verify(Folder(out), families, Depth.FULL, Folder(src))
    assert [f for f in report.findings if f.severity == "error"] == []
    assert "weight-not-compared" not in {f.rule for f in report.findings}
    difference = compare(Folder(out), Folder(src), families)
    assert all(each.error <= each.power * 2.0**-16 for each in difference.tensors)


def test_a_block_that_holds_rows_of_two_weights_is_refused(tmp_path: Path) -> None:
    """gate and up have 64 rows each, so that a block of 24 rows holds rows of both."""
    config = {**FP8, "weight_block_size": [24, 16]}
    src, _, own = released(tmp_path, ROWS, BLOCKS, "_scale_inv", in_blocks(32, 16))
    tensors = arrays(src)
    for name, scale in tensors.items():
        if name.endswith("_scale_inv"):
            tensors[name] = np.ones((8, 6, scale.shape[2]), np.float32)
    bad = declared(write(src, tmp_path / "bad", tensors), config)
    (finding,) = make_bf16_plan(opened(bad), {"own": own}).refusals
    assert finding.rule == "part-shape"
    assert finding.message == (
        "model.layers.0.mlp.experts.gate_up_proj_scale_inv is F32 [8, 6, 8], but must be one for "
        "each block [24, 16] of each weight in model.layers.0.mlp.experts.gate_up_proj, "
        "[8, 128, 128] (and 31 more modules like it)."
    )


def test_one_scale_for_two_blocks_is_refused(tmp_path: Path) -> None:
    """gate and up have 64 rows each, a block: they are two blocks of their tensor."""

    def short(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], 2 if shape[2] == 64 else 1, 1)

    config = {**FP8, "weight_block_size": [64, 128]}
    src, _, own = released(tmp_path, ROWS, config, "_scale_inv", short)
    (finding,) = make_bf16_plan(opened(src), {"own": own}).refusals
    assert "one for each block [64, 128] of each weight in" in finding.message
    assert "mlp.experts.gate_up_proj, [8, 128, 128]" in finding.message


STACKED: Final = {
    name: each
    for name, each in load_families().items()
    if each.stacks and not any("bias" in stack.name for stack in each.stacks)
}


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(intermediate=64)], ids=["tiny", "narrow"])
@pytest.mark.parametrize("name", STACKED)
def test_the_stacks_of_each_family_are_read(tmp_path: Path, name: str, sizes: Sizes) -> None:
    src = synth(tmp_path, STACKED[name], sizes=sizes, precision=Precision.FP8_STACKS).path
    plan = make_bf16_plan(opened(src), STACKED)
    assert plan.refusals == ()
    assert any(action.stored and len(action.source.shape) == 3 for action in plan.actions)


@pytest.mark.parametrize("name", ["llama4", "mistral4"])
def test_whether_vllm_takes_a_stack_in_fp8_is_not_judged(tmp_path: Path, name: str) -> None:
    src = synth(tmp_path, STACKED[name], precision=Precision.FP8_STACKS).path
    report = verify(Folder(src), load_families(), Depth.STRUCTURE)
    assert [finding for finding in report.findings if finding.severity == "error"] == []
    assert report.undecided is not None
    assert "what vLLM makes of experts in one tensor" in report.undecided
