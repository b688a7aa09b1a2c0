"""The oneshot engine writes the bytes that upstream's own tools write for the same files."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from judges import (
    data,
    differences,
    model_free_ptq,
    one_shard,
    oneshot_and_save,
    opened,
    quantized_names,
    read_json,
)
from make import Row, make_checkpoint
from mquant.runs.spec import Engine
from run import TRAINED, quantize_nvfp4

pytestmark = pytest.mark.upstream

GATES = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(3)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the trained checkpoint, whose shards cut fused sets, as mquant quantizes it."""
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("ours") / "out", engine=Engine.ONESHOT)


@pytest.fixture(scope="module")
def saved_by_upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the trained checkpoint after plain `oneshot` and `save_pretrained`, as users do."""
    return oneshot_and_save(TRAINED, tmp_path_factory.mktemp("upstream") / "out")


def test_a_trained_checkpoint_equals_model_free_ptq(out: Path, tmp_path: Path) -> None:
    expected = model_free_ptq(one_shard(TRAINED, tmp_path / "one"), tmp_path / "expected")
    assert quantized_names(out) == quantized_names(expected)
    assert differences(out, expected, quantized_names(out)) == []


def test_real_shapes_equal_model_free_ptq(tmp_path: Path) -> None:
    src = make_checkpoint(
        tmp_path / "src",
        layers=1,
        experts=1,
        hidden=3072,
        intermediate=1536,
        heads=48,
        kv_heads=8,
        head_dim=128,
        shards=1,
    )
    expected = model_free_ptq(src, tmp_path / "expected")
    out = quantize_nvfp4(src, tmp_path / "out", engine=Engine.ONESHOT)
    assert len(quantized_names(out)) == 3 * 7
    assert differences(out, expected, quantized_names(expected)) == []


def _adversarial(rows: list[Row]) -> list[Row]:
    """Put zero tensors and blocks, -0.0, subnormals, ties and huge values into experts' weights."""
    edited: list[Row] = []
    for name, dtype, shape, raw in rows:
        value = (
            np.frombuffer(raw, ml_dtypes.bfloat16).reshape(shape).copy()
            if dtype == "BF16"
            else None
        )
        if value is not None and value.ndim == 2 and ".experts." in name:
            if ".experts.0." in name:
                value[:] = 0
            elif ".experts.1." in name:
                value[:, :16] = -0.0
                value[0, 16:32] = 1e-40
                value[1] = np.resize([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], shape[1])
            elif ".experts.2." in name:
                value[0] = 3e38
        edited.append((name, dtype, shape, raw if value is None else value.tobytes()))
    return edited


def test_hard_values_equal_model_free_ptq(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", experts=4, shards=1, edit=_adversarial)
    expected = model_free_ptq(src, tmp_path / "expected")
    out = quantize_nvfp4(src, tmp_path / "out", engine=Engine.ONESHOT)
    assert differences(out, expected, quantized_names(expected)) == []


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_source_dtypes_equal_model_free_ptq(tmp_path: Path, dtype: str) -> None:
    src = make_checkpoint(tmp_path / "src", dtype=dtype, shards=1)
    expected = model_free_ptq(src, tmp_path / "expected")
    out = quantize_nvfp4(src, tmp_path / "out", engine=Engine.ONESHOT)
    assert differences(out, expected, quantized_names(expected)) == []


def test_fused_sets_share_one_global_scale_where_shards_cut_them(out: Path) -> None:
    parent, result = opened(TRAINED), opened(out)
    cut = 0
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        sets = [[f"{prefix}.self_attn.{p}_proj" for p in "qkv"]]
        for expert in range(10):
            name = f"{prefix}.block_sparse_moe.experts.{expert}"
            sets.append([f"{name}.w1", f"{name}.w3"])
        for modules in sets:
            assert len({data(result, f"{m}.weight_global_scale") for m in modules}) == 1
            cut += len({parent.tensors[f"{m}.weight"].shard for m in modules}) > 1
    assert cut >= 2, "the trained checkpoint's shards no longer cut fused sets"


def test_compressed_tensors_decompresses_to_the_parent_within_half_a_step(out: Path) -> None:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(
        read_json(out / "config.json")["quantization_config"]
    )
    scheme = config.config_groups["group_0"]
    compressor: Any = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    parent, result = opened(TRAINED), opened(out)
    dtypes = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
    module = "model.layers.1.block_sparse_moe.experts.7.w2"
    state = {
        suffix: torch.frombuffer(bytearray(data(result, t.name)), dtype=dtypes[t.dtype]).reshape(
            t.shape
        )
        for suffix in ("weight_packed", "weight_scale", "weight_global_scale")
        if (t := result.tensors[f"{module}.{suffix}"])
    }
    restored = compressor.decompress(state, scheme)["weight"].float()
    info = parent.tensors[f"{module}.weight"]
    raw = bytearray(data(parent, info.name))
    weight = torch.frombuffer(raw, dtype=torch.bfloat16).reshape(info.shape).float()
    blocks = weight.reshape(-1, 16)
    error = (restored - weight).reshape(-1, 16).abs().amax(1)
    # The widest E2M1 step is from 4 to 6. E4M3 rounds a block's scale by up to 1/16.
    assert bool((error <= blocks.abs().amax(1) / 6 * (1 + 1 / 8)).all())


def test_upstream_renames_the_experts_and_mquant_keeps_their_names(
    out: Path, saved_by_upstream: Path
) -> None:
    upstream = {name for name in opened(saved_by_upstream).tensors if ".experts." in name}
    assert any(".gate_proj." in name for name in upstream)
    assert not any(".w1." in name for name in upstream)
    names = {name for name in opened(out).tensors if ".experts." in name}
    assert {name.split(".")[6] for name in names} == {"w1", "w2", "w3"}


def test_upstream_downcasts_router_and_bias_and_mquant_keeps_their_bytes(
    out: Path, saved_by_upstream: Path
) -> None:
    parent, result, upstream = opened(TRAINED), opened(out), opened(saved_by_upstream)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert parent.tensors[gate].dtype == "F32"
    assert {t.dtype for name, t in upstream.tensors.items() if "gate.weight" in name} == {"BF16"}
    kept = {name for name in result.tensors if name in parent.tensors}
    assert {gate, "model.layers.0.block_sparse_moe.e_score_correction_bias"} <= kept
    assert differences(out, TRAINED, kept) == []


def test_upstream_leaves_the_embeddings_out_of_ignore_and_mquant_lists_all(
    out: Path, saved_by_upstream: Path
) -> None:
    upstream = read_json(saved_by_upstream / "config.json")["quantization_config"]["ignore"]
    assert "model.embed_tokens" not in upstream
    ignore = read_json(out / "config.json")["quantization_config"]["ignore"]
    assert ignore == ["lm_head", "model.embed_tokens", *GATES]


def test_model_free_ptq_quantizes_routers_and_embeddings(tmp_path: Path) -> None:
    expected = model_free_ptq(
        one_shard(TRAINED, tmp_path / "one"), tmp_path / "expected", ["lm_head", r"re:.*norm$"]
    )
    names = opened(expected).tensors
    assert all(f"{gate}.weight_packed" in names for gate in GATES)
    assert "model.embed_tokens.weight_packed" in names


def test_config_json_equals_upstreams_except_for_ignore(out: Path, tmp_path: Path) -> None:
    upstream = read_json(
        model_free_ptq(one_shard(TRAINED, tmp_path / "one"), tmp_path / "expected") / "config.json"
    )["quantization_config"]
    config = read_json(out / "config.json")["quantization_config"]
    differ = {k for k in upstream.keys() | config.keys() if upstream.get(k) != config.get(k)}
    assert differ == {"ignore", "config_groups"}
    (expected,) = upstream["config_groups"].values()
    (group,) = config["config_groups"].values()
    assert group == expected
    assert group["targets"] == ["Linear"]


def test_llmcompressor_accepts_recipe_yaml(out: Path) -> None:
    from llmcompressor.recipe import Recipe

    (modifier,) = Recipe.create_instance(str(out / "recipe.yaml")).modifiers
    assert type(modifier).__name__ == "QuantizationModifier"
    assert modifier.scheme == "NVFP4A16"
    assert "lm_head" in modifier.ignore
