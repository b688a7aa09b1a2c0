"""FP8 and mixed recipes write, in both engines, the bytes that upstream's tools write."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from judges import data, differences, hashes, model_free_ptq, one_shard, opened, read_json
from make import Row, make_checkpoint
from mquant.checkpoint import Folder
from mquant.errors import SourceError
from mquant.family_files import load_families
from mquant.runs.quantize import quantize
from mquant.runs.spec import Engine
from mquant.verify.judge import Depth, verify
from run import TRAINED, plan_of

pytestmark = pytest.mark.upstream

DIVISIBLE: dict[str, Any] = {
    "experts": 3,
    "hidden": 256,
    "intermediate": 128,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 32,
}


def quantize_to(src: Path, out: Path, recipe: str, engine: Engine = Engine.STREAM) -> Path:
    quantize(plan_of(src, recipe, 10**6), out, engine=engine)
    return out


def quantized(folder: Path) -> set[str]:
    scales = {n for n in opened(folder).tensors if n.endswith(".weight_scale")}
    return scales | {name.removesuffix("_scale") for name in scales}


def hard_values(rows: list[Row]) -> list[Row]:
    """Put zero tensors and rows, -0.0, subnormals and huge values into experts' weights."""
    edited: list[Row] = []
    for name, dtype, shape, raw in rows:
        types = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
        value = np.frombuffer(raw, types[dtype]).reshape(shape).copy()
        if ".experts.0." in name:
            value[:] = 0
        elif ".experts.1." in name:
            value[:, :16], value[0], value[1] = -0.0, 1e-6, -1e-7
        elif ".experts.2." in name:
            value[0] = 6e4 if dtype == "F16" else 3e38
        edited.append((name, dtype, shape, value.tobytes()))
    return edited


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(
    ("recipe", "scheme"), [("fp8-dynamic", "FP8_DYNAMIC"), ("fp8-block", "FP8_BLOCK")]
)
def test_hard_values_equal_model_free_ptq(
    tmp_path: Path, recipe: str, scheme: str, dtype: str
) -> None:
    src = make_checkpoint(tmp_path / "src", dtype=dtype, shards=1, edit=hard_values, **DIVISIBLE)
    expected = model_free_ptq(src, tmp_path / "expected", scheme=scheme)

    out = quantize_to(src, tmp_path / "out", recipe)

    assert quantized(out) == quantized(expected) != set()
    assert differences(out, expected, quantized(out)) == []


def test_config_json_equals_upstreams_except_for_ignore(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", shards=1, **DIVISIBLE)
    for recipe, scheme in (("fp8-dynamic", "FP8_DYNAMIC"), ("fp8-block", "FP8_BLOCK")):
        expected = model_free_ptq(src, tmp_path / scheme, scheme=scheme) / "config.json"
        out = quantize_to(src, tmp_path / recipe, recipe) / "config.json"
        config, upstream = (read_json(path)["quantization_config"] for path in (out, expected))
        assert [*config["config_groups"].values()] == [*upstream["config_groups"].values()]
        assert config["format"] == upstream["format"] == "float-quantized"


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "nvfp4-fp8"])
def test_both_engines_write_the_same_files(tmp_path: Path, recipe: str) -> None:
    stream = hashes(quantize_to(TRAINED, tmp_path / "stream", recipe))
    oneshot = hashes(quantize_to(TRAINED, tmp_path / "oneshot", recipe, Engine.ONESHOT))

    assert stream.pop("mquant.json") != oneshot.pop("mquant.json")  # it names the engine
    assert stream == oneshot


def test_the_engines_differ_in_the_sign_of_zero_as_upstreams_tools_do(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", edit=hard_values, **DIVISIBLE)
    stream = quantize_to(src, tmp_path / "stream", "fp8-block")
    oneshot = quantize_to(src, tmp_path / "oneshot", "fp8-block", Engine.ONESHOT)
    # llmcompressor's oneshot adds a zero point of 0, model_free_ptq does not: -0.0 becomes 0.0.
    names = differences(stream, oneshot, set(opened(stream).tensors))
    assert names
    for name in names:
        a, b = (np.frombuffer(data(opened(out), name), np.uint8) for out in (stream, oneshot))
        assert set(zip(a[a != b].tolist(), b[a != b].tolist(), strict=True)) == {(0x80, 0)}


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "nvfp4-fp8"])
def test_verify_finds_every_weight_near_the_parents(tmp_path: Path, recipe: str) -> None:
    out = quantize_to(TRAINED, tmp_path / "out", recipe)
    report = verify(Folder(out), load_families(), Depth.FULL, parent=Folder(TRAINED))
    assert [finding for finding in report.findings if finding.severity != "info"] == []


def test_a_mixed_recipe_has_the_bytes_of_each_scheme_alone(tmp_path: Path) -> None:
    mixed = quantize_to(TRAINED, tmp_path / "mixed", "nvfp4-fp8")
    one = one_shard(TRAINED, tmp_path / "one")
    fp8 = model_free_ptq(one, tmp_path / "fp8", scheme="FP8_DYNAMIC")
    nvfp4 = model_free_ptq(one, tmp_path / "nvfp4")
    names = set(opened(mixed).tensors)
    experts = {name for name in names if ".experts." in name}
    attention = {name for name in names if "_proj." in name}

    assert differences(mixed, nvfp4, experts) == []
    assert differences(mixed, fp8, attention) == []


def test_nan_stops_the_run_with_the_weights_name(tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"

    def spoil(rows: list[Row]) -> list[Row]:
        return [(n, d, s, b"\x80\x7f" + raw[2:] if n == name else raw) for n, d, s, raw in rows]

    src = make_checkpoint(tmp_path / "src", edit=spoil)
    with pytest.raises(SourceError, match=f"{name} holds 1 value that is NaN or infinite"):
        quantize_to(src, tmp_path / "out", "fp8-dynamic")
    assert not (tmp_path / "out" / "config.json").exists()


def test_kept_layers_keep_the_parents_bytes(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\nsuffix: MINE\nroles: {expert: NVFP4A16, attention: FP8_DYNAMIC}\n"
        "keep_layers: {first: 1, last: 1}\n"
    )
    out = quantize_to(TRAINED, tmp_path / "out", str(recipe))

    tensors = opened(out).tensors
    whole = {name for name in opened(TRAINED).tensors if ".layers.1." not in name}
    assert differences(out, TRAINED, whole) == []
    assert "model.layers.1.self_attn.q_proj.weight_scale" in tensors
    report = verify(Folder(out), load_families(), Depth.FULL, parent=Folder(TRAINED))
    assert [finding for finding in report.findings if finding.severity != "info"] == []
    kept = "model.layers.0.self_attn.q_proj.weight"
    assert data(opened(out), kept) == data(opened(TRAINED), kept)
