"""`verify` reports over how many GPUs a checkpoint can be split, and absent MTP tensors."""

from pathlib import Path
from typing import Any

import pytest

from judges import opened, read_json
from make import make_checkpoint, make_row, without, write_index, write_json, write_shard
from mquant.checkpoint import CONFIG_NAME, INDEX_NAME
from mquant.data_files import folder
from mquant.family_files import load_families
from mquant.output.finish import index_json
from mquant.plan import config_json
from mquant.runs.quantize import quantize
from mquant.synth import Precision, Sizes, synth
from mutate import judged, mutated
from run import plan_of, quantize_nvfp4

FAMILIES = load_families()
RECIPE = folder("recipes") / "nvfp4.yaml"
HEAD = "With FP4 Marlin kernels, by tensor-parallel size: "
W2 = "model.layers.0.block_sparse_moe.experts.0.w2"


def facts(checkpoint: Path) -> dict[str, str]:
    """Return the findings of severity info: rule -> message."""
    return judged(checkpoint, severities=("info",))


def quantized(workdir: Path, **sizes: Any) -> Path:
    src = make_checkpoint(workdir / "src", **{"layers": 1, "experts": 2, **sizes})
    return quantize_nvfp4(src, workdir / "out")


@pytest.mark.parametrize(
    ("sizes", "vllm", "sglang"),
    [
        (
            {"hidden": 128, "intermediate": 256, "heads": 16, "experts": 16},
            "1, 2, 4, 8, 16",
            f"1, 2, 4 (not 8: {W2} reads 256, 32 a rank, no multiple of 64)",
        ),
        (
            {"hidden": 128, "intermediate": 64},
            "1, 2 (not 4: 4 ranks are more than 2 experts)",
            f"1 (not 2: {W2} reads 64, 32 a rank, no multiple of 64)",
        ),
        (
            {"hidden": 128, "intermediate": 64, "heads": 6},
            "1, 2 (not 4: 6 attention heads do not divide by 4)",
            f"1 (not 2: {W2} reads 64, 32 a rank, no multiple of 64)",
        ),
        (
            {"hidden": 128, "intermediate": 48, "heads": 6, "kv_heads": 3},
            "1 (not 2: of 3 key and value heads and 2 ranks, neither divides the other)",
            f"none (not 1: {W2} reads 48, 48 a rank, no multiple of 64)",
        ),
        (
            {"hidden": 64, "intermediate": 128, "experts": 4, "heads": 4, "head_dim": 8},
            "1, 2 (not 4: model.layers.0.self_attn.o_proj reads 32, 8 a rank, no multiple of 16)",
            f"none (not 1: experts write 64 channels ({W2}), no multiple of 128)",
        ),
    ],
)
def test_one_sentence_says_which_sizes_work(
    tmp_path: Path, sizes: dict[str, int], vllm: str, sglang: str
) -> None:
    assert facts(quantized(tmp_path, **sizes))["tensor-parallel"] == (
        f"{HEAD}vLLM 0.32 with {vllm}; SGLang 0.5.23 with {sglang}."
    )


def hollow(workdir: Path, family: str, layers: int, experts: int) -> Path:
    """Write a quantized checkpoint of a release's shapes: headers and config.json without data."""
    sizes = Sizes(layers, experts if family not in ("llama", "qwen3") else None)
    plan = plan_of(synth(workdir / "src", FAMILIES[family], sizes=sizes, shapes_only=True).path)
    out = workdir / "out"
    out.mkdir()
    for shard in plan.shards:
        with (out / shard.name).open("wb") as file:
            file.write(shard.layout[0])
            file.truncate(shard.file_bytes)
    write_json(out / INDEX_NAME, index_json(plan))
    write_json(out / CONFIG_NAME, config_json(plan))
    return out


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        (
            "minimax_m2",
            "vLLM 0.32 with 1, 2, 4, 8, 16; SGLang 0.5.23 with 1, 2, 4, 8 "
            f"(not 16: {W2} reads 1536, 96 a rank, no multiple of 64)",
        ),
        ("deepseek_v3", "vLLM 0.32 with 1, 2, 4, 8, 16"),
        ("llama", "vLLM 0.32 with 1, 2, 4, 8, 16; SGLang 0.5.23 with 1, 2, 4, 8, 16"),
        ("mixtral", "vLLM 0.32 with 1, 2, 4, 8, 16; SGLang 0.5.23 with 1, 2, 4, 8, 16"),
        ("qwen3", "vLLM 0.32 with 1, 2, 4, 8, 16; SGLang 0.5.23 with 1, 2, 4, 8, 16"),
        (
            "qwen3_moe",
            "vLLM 0.32 with 1, 2, 4, 8, 16; SGLang 0.5.23 with 1, 2, 4 "
            "(not 8: model.layers.0.mlp.experts.0.down_proj reads 768, 96 a rank, "
            "no multiple of 64)",
        ),
    ],
)
def test_sizes_of_the_release_of_a_family_are_reported(
    tmp_path: Path, family: str, sizes: str
) -> None:
    out = hollow(tmp_path, family, layers=4, experts=16)
    assert judged(out) == {}
    assert facts(out)["tensor-parallel"] == f"{HEAD}{sizes}."


def test_a_hidden_size_no_kernel_takes_is_a_warning(tmp_path: Path) -> None:
    out = quantized(tmp_path, hidden=32)
    assert judged(out) == {
        "kernel-shape": "vLLM 0.32 cannot run the checkpoint on any number of GPUs: experts write "
        f"32 channels ({W2}), no multiple of 64."
    }
    assert "tensor-parallel" not in facts(out)


def test_plain_layers_do_not_limit_the_sizes(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden": 128, "intermediate": 256, "heads": 16, "head_dim": 8}
    src = make_checkpoint(tmp_path / "src", layers=1, experts=16, **sizes)
    whole = quantize_nvfp4(src, tmp_path / "all")
    # o_proj reads 128 channels: 16 ranks would get half a group of 16 channels each.
    assert "vLLM 0.32 with 1, 2, 4, 8 (not 16: " in facts(whole)["tensor-parallel"]
    recipe = tmp_path / "experts.yaml"
    recipe.write_text(RECIPE.read_text("utf-8").replace("  attention: NVFP4A16\n", ""))
    quantize(plan_of(src, str(recipe)), tmp_path / "experts")
    assert "vLLM 0.32 with 1, 2, 4, 8, 16;" in facts(tmp_path / "experts")["tensor-parallel"]


def test_only_quantized_layers_limit_the_sizes(tmp_path: Path) -> None:
    out = quantized(
        tmp_path, layers=2, hidden=128, intermediate=256, heads=16, head_dim=8, experts=16
    )
    first = "model.layers.0.self_attn.o_proj"
    table = read_json(out / CONFIG_NAME)["quantization_config"]
    table["ignore"].append(first)

    mixed = mutated(out, tmp_path, edit=without(first), config={"quantization_config": table})
    plain = make_row(f"{first}.weight", "BF16", (128, 128))
    write_shard(mixed / "model-0.safetensors", [plain])  # the first shard by name
    before = opened(mixed)
    shards = {info.name: info.shard for info in before.tensors.values()}
    shards[plain[0]] = "model-0.safetensors"
    write_index(mixed, shards, before.nbytes + len(plain[3]))
    assert judged(mixed) == {}
    message = facts(mixed)["tensor-parallel"]
    assert "(not 16: model.layers.1.self_attn.o_proj reads 128, 8 a rank, " in message


def test_layouts_without_groups_report_no_sizes(parent: Path, tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", layers=1, experts=2)
    quantize(plan_of(src, "fp8-dynamic"), tmp_path / "fp8")
    for checkpoint in (parent, tmp_path / "fp8"):
        assert "tensor-parallel" not in facts(checkpoint)


SIZED: dict[str, Any] = {
    "layers": 1,
    "experts": 4,
    "hidden": 256,
    "intermediate": 512,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 128,
}


def test_fp8_in_blocks_reports_the_sizes_with_whole_blocks(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", **SIZED)
    quantize(plan_of(src, "fp8-block"), tmp_path / "out")
    assert facts(tmp_path / "out")["tensor-parallel"] == (
        "By tensor-parallel size: vLLM 0.32 with 1, 2, 4 "
        "(not 8: 4 attention heads do not divide by 8)."
    )
    narrow = make_checkpoint(tmp_path / "narrow", **{**SIZED, "head_dim": 64})
    quantize(plan_of(narrow, "fp8-block"), tmp_path / "half")
    assert facts(tmp_path / "half")["tensor-parallel"] == (
        "By tensor-parallel size: vLLM 0.32 with 1, 2 (not 4: on a rank, "
        "model.layers.0.self_attn.qkv_proj writes 64, no multiple of 128)."
    )


def test_a_release_in_fp8_blocks_has_experts_in_smaller_blocks(tmp_path: Path) -> None:
    """16 ranks have 96 of 1,536 channels each: vLLM makes of a block of 128 four of 32."""
    fp8 = synth(
        tmp_path / "fp8",
        FAMILIES["minimax_m2"],
        sizes=Sizes(layers=1, experts=16),
        precision=Precision.FP8_BLOCK,
        shapes_only=True,
    ).path
    assert facts(fp8)["tensor-parallel"] == (
        "By tensor-parallel size: vLLM 0.32 with 1, 2, 4, 8, 16."
    )


def test_checkpoints_with_wrong_shapes_report_no_sizes(good: Path, tmp_path: Path) -> None:
    assert "tensor-parallel" in facts(good)
    bad = mutated(good, tmp_path, config={"intermediate_size": 64})
    assert "shape-disagrees" in judged(bad)
    assert "tensor-parallel" not in facts(bad)


# --- multi-token prediction


def test_missing_mtp_tensors_are_reported(good: Path, tmp_path: Path) -> None:
    assert facts(good)["mtp-without-tensors"] == (
        "config.json says num_mtp_modules 3, but there is no tensor of such a module."
    )
    without_mtp = mutated(good, tmp_path, config={"num_mtp_modules": 0})
    assert "mtp-without-tensors" not in facts(without_mtp)


def test_complete_mtp_layers_are_not_reported(tmp_path: Path) -> None:
    src = synth(tmp_path / "src", FAMILIES["deepseek_v3"]).path
    promised = {"num_nextn_predict_layers": 1}
    assert "mtp-without-tensors" in facts(mutated(src, tmp_path / "a", config=promised))
    complete = mutated(src, tmp_path / "b", config={**promised, "num_hidden_layers": 2})
    assert "mtp-without-tensors" not in facts(complete)
