"""A recipe's `source` keeps quantized weights as they are stored, and config.json says so."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationConfig

import mx_sources
from judges import hashes, read_json
from make import Row
from mquant.checkpoint import Folder, open_checkpoint
from mquant.errors import UsageError
from mquant.family_files import load_families
from mquant.plan import Plan, Target, make_plan
from mquant.recipe import find_recipe
from mquant.runs.export import export
from mquant.runs.quantize import quantize
from mquant.synth import Precision, Sizes, synth
from mquant.verify.judge import Depth, verify
from mutate import Bytes, changed, forget_digests, judged, mutated
from run import TRAINED, plan_of, quantize_nvfp4
from schemes import declaring

pytestmark = pytest.mark.upstream

FAMILIES = load_families()
ATTENTION = "model.layers.1.self_attn.o_proj"


def recipe(folder: Path, roles: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(f"{{name: mine, suffix: X, roles: {roles}}}")
    return str(path)


IN_BLOCKS = Sizes(layers=2, experts=3, hidden=256, intermediate=128, vocab=256)
"""Shapes that blocks of 128 divide."""


def synthetic(
    folder: Path, precision: Precision, family: str = "minimax_m2", sizes: Sizes = IN_BLOCKS
) -> Path:
    """Write a synthetic checkpoint in the format of a release."""
    return synth(folder / "src", FAMILIES[family], sizes=sizes, precision=precision).path


def made(folder: Path, src: Path, roles: str) -> Path:
    """Quantize, and check that the output is right against its source."""
    out = quantize(plan_of(src, recipe(folder, roles)), folder / "out").out
    report = verify(Folder(out), FAMILIES, Depth.FULL, Folder(src))
    assert [f.message for f in report.findings if f.severity != "info"] == []
    return out


def scheme_of(out: Path, pattern: str) -> Any:
    """Return compressed-tensors' own reading of the config group with a target."""
    config = QuantizationConfig.model_validate(
        read_json(out / "config.json")["quantization_config"]
    )
    groups = config.config_groups.values()
    (group,) = (g for g in groups if any(pattern in t or t == "Linear" for t in g.targets))
    return group


def ordered_int4(folder: Path) -> Path:
    """Write the trained checkpoint with experts in INT4, with zero points and orders of columns."""

    def edit(rows: list[Row]) -> list[Row]:
        result: list[Row] = []
        for name, dtype, shape, content in rows:
            module, _, suffix = name.rpartition(".")
            if suffix != "weight" or not mx_sources.is_expert(module):
                result.append((name, dtype, shape, content))
                continue
            out, columns = shape
            parts: dict[str, npt.NDArray[Any]] = {
                "weight_packed": np.full((out, columns // 8), 0x7654321, np.int32),
                "weight_scale": np.full((out, columns // 32), 0.01, np.float32),
                "weight_zero_point": np.full((out // 8, columns // 32), 0x1234567, np.int32),
                "weight_g_idx": np.arange(columns, dtype=np.int32)[::-1] // 32,
                "weight_shape": np.array(shape, np.int64),
            }
            names = {"int32": "I32", "int64": "I64", "float32": "F32"}
            for part, values in parts.items():
                kind = names[values.dtype.name]
                result.append((f"{module}.{part}", kind, values.shape, values.tobytes()))
        return result

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    args = {**weights, "symmetric": False, "dynamic": False, "actorder": "group"}
    return mx_sources.source(folder, edit, declaring("pack-quantized", args, None))


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def kinds(plan: Plan) -> dict[str, str]:
    """Return the name of the scheme in which the output stores each module."""
    return {a.module: a.stored_in.name for a in plan.actions if a.stored_in}


def test_fp8_attention_stays_beside_experts_in_nvfp4(tmp_path: Path) -> None:
    src = synthetic(tmp_path, Precision.FP8_CHANNEL)
    out = made(tmp_path, src, "{expert: NVFP4A16, attention: source}")
    before, after = mx_sources.tensors(src), mx_sources.tensors(out)
    for suffix in ("weight", "weight_scale"):
        name = f"{ATTENTION}.{suffix}"
        assert raw(after[name]) == raw(before[name])
        assert after[name].dtype == before[name].dtype
    group = scheme_of(out, "self_attn")
    assert (group.format, group.weights.strategy) == ("float-quantized", "channel")
    assert group.input_activations.dynamic


def test_fp8_in_blocks_keeps_its_bytes_under_the_names_of_compressed_tensors(
    tmp_path: Path,
) -> None:
    src = synthetic(tmp_path, Precision.FP8_BLOCK)
    out = made(tmp_path, src, "{expert: NVFP4A16, attention: source}")
    before, after = mx_sources.tensors(src), mx_sources.tensors(out)
    assert raw(after[f"{ATTENTION}.weight"]) == raw(before[f"{ATTENTION}.weight"])
    old, new = f"{ATTENTION}.weight_scale_inv", f"{ATTENTION}.weight_scale"
    assert raw(after[new]) == raw(before[old])
    assert old not in after
    group = scheme_of(out, "self_attn")
    assert group.weights.block_structure == [128, 128]
    state = {suffix: after[f"{ATTENTION}.{suffix}"] for suffix in ("weight", "weight_scale")}
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    expected = FP8BlockDequantizer()._create_dequantized_weight(
        before[f"{ATTENTION}.weight"], before[old]
    )
    weight = compressor.decompress(state, group)["weight"].to(torch.bfloat16)
    assert torch.equal(weight, expected.to(torch.bfloat16))


def test_a_scheme_that_the_source_has_already_is_kept_and_the_plan_says_so(tmp_path: Path) -> None:
    src = synthetic(tmp_path, Precision.FP8_BLOCK)
    plan = plan_of(src, "fp8-block")
    assert {action.kind for action in plan.actions} == {"copy"}
    assert set(kinds(plan).values()) == {"FP8_BLOCK"}
    (finding,) = plan.findings
    assert finding.rule == "source-kept"
    assert finding.message == (
        "src is quantized: 26 weights (FP8 in blocks) are kept as the source stores them, as "
        "FP8_BLOCK."
    )
    quantize(plan, tmp_path / "out")
    before, after = mx_sources.tensors(src), mx_sources.tensors(tmp_path / "out")
    assert {raw(tensor) for tensor in after.values()} == {raw(t) for t in before.values()}


def test_another_scheme_of_the_same_codes_is_made_anew(tmp_path: Path) -> None:
    plan = plan_of(synthetic(tmp_path, Precision.FP8_BLOCK), "fp8-dynamic")
    assert {a.kind for a in plan.actions if a.stored_in} == {"quantize"}


def test_static_fp8_keeps_its_input_scales(tmp_path: Path) -> None:
    src = synthetic(tmp_path, Precision.FP8_TENSOR, "mistral", Sizes())
    out = made(tmp_path, src, "{mlp: source, attention: source}")
    before, after = mx_sources.tensors(src), mx_sources.tensors(out)
    module = "model.layers.1.self_attn.o_proj"
    assert raw(after[f"{module}.weight_scale"]) == raw(before[f"{module}.weight_scale_inv"])
    assert raw(after[f"{module}.input_scale"]) == raw(before[f"{module}.activation_scale"])
    group = scheme_of(out, "self_attn")
    assert (group.weights.strategy, group.input_activations.dynamic) == ("tensor", False)


def test_deepseek_v4_keeps_fp8_with_scales_as_numbers_and_mxfp4_under_other_names(
    tmp_path: Path,
) -> None:
    src = synthetic(tmp_path, Precision.MXFP4_FP8, "deepseek_v4", replace(IN_BLOCKS, layers=3))
    out = quantize(
        plan_of(src, recipe(tmp_path, "{expert: source, shared_expert: source}")), tmp_path / "out"
    ).out
    before, after = mx_sources.tensors(src), mx_sources.tensors(out)
    expert, shared = "layers.1.ffn.experts.0.w1", "layers.1.ffn.shared_experts.w1"
    assert raw(after[f"{expert}.weight_packed"]) == raw(before[f"{expert}.weight"])
    assert raw(after[f"{expert}.weight_scale"]) == raw(before[f"{expert}.scale"])
    assert after[f"{expert}.weight_packed"].dtype is torch.uint8
    assert after[f"{expert}.weight_scale"].dtype is torch.uint8
    assert raw(after[f"{shared}.weight"]) == raw(before[f"{shared}.weight"])
    assert torch.equal(after[f"{shared}.weight_scale"], before[f"{shared}.scale"].float())
    assert scheme_of(out, "ffn\\.experts").format == "mxfp4-pack-quantized"


def test_mxfp8_stays_in_mxfp8(tmp_path: Path) -> None:
    src = synthetic(tmp_path, Precision.MXFP8, "minimax_m3_vl", Sizes())
    out = made(tmp_path, src, "{expert: NVFP4A16, attention: source}")
    before, after = mx_sources.tensors(src), mx_sources.tensors(out)
    kept = [name for name in after if "self_attn" in name and after[name].dtype is torch.uint8]
    assert kept
    assert all(name.endswith(".weight_scale") for name in kept)
    stored = {raw(tensor) for tensor in before.values()}
    assert {raw(after[name]) for name in kept} <= stored
    assert scheme_of(out, "self_attn").format == "mxfp8-quantized"


def test_mxfp4_stays_in_mxfp4(tmp_path: Path) -> None:
    src = mx_sources.source(tmp_path)
    out = made(tmp_path, src, "{expert: source, attention: NVFP4A16}")
    before, after = mx_sources.tensors(src), mx_sources.tensors(out)
    for name in before:
        if mx_sources.is_expert(name):
            assert raw(after[name]) == raw(before[name])


@pytest.mark.parametrize("wish", ["W4A16", "source"])
def test_int4_stays_as_it_is_for_w4a16_in_groups_of_any_size(tmp_path: Path, wish: str) -> None:
    src = synthetic(tmp_path, Precision.INT4, "kimi_k25", Sizes())
    out = made(tmp_path, src, f"{{expert: {wish}}}")
    before, after = mx_sources.tensors(src), mx_sources.tensors(out)
    assert before.keys() == after.keys()
    assert all(raw(before[name]) == raw(after[name]) for name in before)
    config = read_json(out / "config.json")
    assert "quantization_config" not in config["text_config"]
    (group,) = QuantizationConfig.model_validate(
        config["quantization_config"]
    ).config_groups.values()
    assert (group.format, group.weights.num_bits, group.weights.group_size) == (
        "pack-quantized",
        4,
        32,
    )


def test_zero_points_and_an_order_of_columns_stay_beside_integers(tmp_path: Path) -> None:
    """vLLM takes no order of columns for experts, and the plan says so; other loaders may."""
    src = ordered_int4(tmp_path)
    wish = find_recipe(recipe(tmp_path, "{expert: source}"))
    plan = make_plan(open_checkpoint(Folder(src)), wish, FAMILIES, allow_unsafe=True)
    out = quantize(plan, tmp_path / "out").out
    before, after = mx_sources.tensors(src), mx_sources.tensors(out)
    kept = [name for name in before if mx_sources.is_expert(name)]
    assert {name.rpartition(".")[2] for name in kept} == {
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    }
    assert all(raw(before[name]) == raw(after[name]) for name in kept)
    (group,) = read_json(out / "config.json")["quantization_config"]["config_groups"].values()
    assert (group["weights"]["symmetric"], group["weights"]["actorder"]) == (False, "group")


def test_nvfp4_that_is_wanted_in_nvfp4_stays_as_it_is(tmp_path: Path) -> None:
    src = quantize_nvfp4(TRAINED, tmp_path / "src")
    out = quantize_nvfp4(src, tmp_path / "out")
    before, after = mx_sources.tensors(src), mx_sources.tensors(out)
    assert before.keys() == after.keys()
    assert all(raw(before[name]) == raw(after[name]) for name in before)
    assert hashes(src)["config.json"] == hashes(out)["config.json"]


def test_a_plain_weight_stays_plain_under_source(tmp_path: Path) -> None:
    plan = plan_of(TRAINED, recipe(tmp_path, "{expert: NVFP4A16, attention: source}"))
    assert plan.findings == ()
    assert {a.kind for a in plan.actions if a.module == ATTENTION} == {"copy"}
    assert ATTENTION in plan.ignore


def test_a_layout_that_compressed_tensors_lacks_is_refused(tmp_path: Path) -> None:
    nvfp4 = quantize_nvfp4(TRAINED, tmp_path / "nvfp4")
    modelopt = export(Folder(nvfp4), FAMILIES, Target.MODELOPT, tmp_path / "modelopt").out
    (refusal,) = plan_of(modelopt, recipe(tmp_path, "{expert: source}")).refusals
    assert refusal.rule == "not-as-stored"
    assert refusal.message.endswith(
        "is stored as ModelOpt NVFP4 (and 89 more like it), which config.json cannot declare in "
        "the terms of compressed-tensors."
    )


def test_the_oneshot_engine_does_not_keep_what_is_stored(tmp_path: Path) -> None:
    src = synthetic(tmp_path, Precision.FP8_BLOCK)
    plan = plan_of(src, recipe(tmp_path, "{attention: source, expert: W4A16}"))
    with pytest.raises(UsageError, match="The oneshot engine reads BF16"):
        quantize(plan, tmp_path / "out")


def test_the_advice_on_kept_weights_that_blocks_do_not_divide_can_be_followed(
    tmp_path: Path,
) -> None:
    src = synth(tmp_path / "src", FAMILIES["deepseek_v4"], precision=Precision.MXFP4_FP8).path
    roles = "{expert: NVFP4A16, attention: source, shared_expert: source}"
    (refusal,) = plan_of(src, recipe(tmp_path, roles)).refusals
    assert refusal.fix.startswith("Leave attention and shared_expert out of the recipe's roles, or")
    listed = refusal.fix.partition("use ignore: ")[2].removesuffix(". They then become BF16.")
    path = tmp_path / "ignoring.yaml"
    path.write_text(f"{{name: mine, suffix: X, roles: {roles}, ignore: {listed}}}")

    assert not plan_of(src, str(path)).refusals
    assert not plan_of(src, recipe(tmp_path, "{expert: NVFP4A16}")).refusals


def damaged(out: Path, folder: Path, name: str, change: Callable[[Bytes], None]) -> Path:
    """Copy a checkpoint without the digests of its files, and change a tensor's bytes."""
    return forget_digests(mutated(out, folder, edit=changed(name, data=change)))


def flip_last(values: Bytes) -> None:
    values[-1] ^= 1


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_one_changed_bit_of_a_kept_weight_is_found_in_every_expert(
    tmp_path: Path, part: str
) -> None:
    """The judge samples roundings; what stays as the source stores it is compared byte for byte."""
    src = synthetic(tmp_path, Precision.MXFP4)
    out = made(tmp_path, src, "{expert: source, attention: NVFP4A16}")
    for expert in range(3):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w1.{part}"
        bad = damaged(out, tmp_path / f"{expert}", name, flip_last)
        assert judged(bad, src, Depth.NUMBERS, ("error",)) == {
            "kept-tensor-differs": f"{name} is stored as in the parent, but is not equal to the "
            "parent's."
        }


def test_a_changed_scale_of_fp8_is_found_although_its_dtype_and_name_are_others(
    tmp_path: Path,
) -> None:
    src = synthetic(tmp_path, Precision.MXFP4_FP8, "deepseek_v4", replace(IN_BLOCKS, layers=3))
    roles = recipe(tmp_path, "{expert: source, shared_expert: source}")
    out = quantize(plan_of(src, roles), tmp_path / "out").out
    name = "layers.1.ffn.shared_experts.w1.weight_scale"

    def double(values: Bytes) -> None:
        values[-4:].view("<f4")[0] *= 2

    bad = damaged(out, tmp_path / "bad", name, double)
    assert "kept-tensor-differs" not in judged(out, src, Depth.NUMBERS)
    assert name in judged(bad, src, Depth.NUMBERS)["kept-tensor-differs"]
