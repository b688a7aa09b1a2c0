"""`mquant inspect` describes a checkpoint from its headers alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from make import Edit, adding, make_checkpoint, renamed, without
from mquant.cli.app import app
from mquant.schemes import NVFP4A16
from run import quantize_nvfp4


def inspect(src: Path, form: str = "human") -> Result:
    return CliRunner().invoke(app, ["inspect", str(src), "--format", form])


def document(src: Path) -> dict[str, Any]:
    result = inspect(src, "json")
    assert result.exit_code == 0
    value: dict[str, Any] = json.loads(result.stdout)
    assert (value["schema"], value["ok"]) == ("mquant.inspect/1", True)
    return value


def messages(src: Path) -> dict[str, str]:
    return {finding["rule"]: finding["message"] for finding in document(src)["findings"]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def test_the_json_document_describes_the_checkpoint(model: Path) -> None:
    report = document(model)
    del report["findings"], report["roles"], report["dtypes"], report["precisions"]
    shards = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert report == {
        "schema": "mquant.inspect/1",
        "ok": True,
        "name": "model",
        "family": "minimax_m2",
        "model_type": "minimax_m2",
        "quantization": None,
        "kv_cache": None,
        "excluded": [],
        "layers": 2,
        "experts": 4,
        "unpruned_experts": 256,
        "pruned": True,
        "experts_per_token": 2,
        "context": 2048,
        "vocabulary": 64,
        "parameters": 82_952,
        "tensors": 47,
        "bytes": 166_944,
        "file_bytes": shards,
        "shards": 2,
        "routers_quantized": False,
        "vllm": "loads it",
    }


def test_roles_and_dtypes_add_up_to_the_whole(model: Path) -> None:
    report = document(model)
    for shares in (report["roles"], report["dtypes"]):
        assert sum(share["tensors"] for share in shares) == report["tensors"]
        assert sum(share["bytes"] for share in shares) == report["bytes"]
    assert [share["name"] for share in report["dtypes"]] == ["BF16", "F32"]
    assert {share["name"]: share["tensors"] for share in report["roles"]} == {
        "expert": 24,
        "attention": 8,
        "router": 2,
        "routing_bias": 2,
        "embedding": 1,
        "head": 1,
        "norm": 9,
    }


def test_a_person_sees_the_same_facts(model: Path) -> None:
    lines = inspect(model).stdout.splitlines()
    assert lines[0] == "model"
    assert "Experts     4 of the family's 256: looks expert-pruned" in lines
    assert "Context     2,048 tokens" in lines
    assert "Tensors     47 in 2 shards" in lines
    assert "Bytes       166.9 kB (163.03 KiB)" in lines
    assert max(map(len, lines)) <= 80


def test_a_plain_checkpoint_s_weights_are_told_by_dtype(model: Path) -> None:
    lines = inspect(model).stdout.splitlines()

    assert "Weights     BF16: expert, attention, embedding, head" in lines
    assert "            F32: router" in lines
    assert "Routers     not quantized" in lines
    assert "vLLM 0.32   loads it" in lines


def test_a_quantized_checkpoint_s_roles_have_a_format_and_bits(model: Path, tmp_path: Path) -> None:
    out = quantize_nvfp4(model, tmp_path / "out")

    precisions = {each["role"]: each for each in document(out)["precisions"]}
    assert precisions["expert"]["formats"] == ["NVFP4"]
    assert 4.5 <= precisions["expert"]["bits"] < 4.6
    assert precisions["head"] == {"role": "head", "formats": ["BF16"], "bits": 16.0}
    assert document(out)["routers_quantized"] is False


def test_modelopt_s_own_file_is_read(model: Path) -> None:
    table = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    content = {"producer": {"name": "modelopt"}, "quantization": table}
    (model / "hf_quant_config.json").write_text(json.dumps(content))

    report = document(model)
    assert (report["quantization"], report["kv_cache"]) == ("modelopt", "FP8")
    assert report["excluded"] == ["lm_head"]
    lines = inspect(model).stdout.splitlines()
    assert "KV cache    FP8" in lines
    assert "Excluded    1 entry: lm_head" in lines


def test_what_vllm_refuses_is_said(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", config={"use_routing_bias": False})

    name = "model.layers.0.block_sparse_moe.e_score_correction_bias"
    assert document(model)["vllm"].startswith(f"refuses it: {name}: vLLM builds no ")


def test_a_model_that_mquant_does_not_know_is_not_judged(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", config={"model_type": "gpt2"})

    assert document(model)["vllm"].startswith("not judged: ")


# --- unusual checkpoints


def test_pruned_experts(model: Path) -> None:
    assert messages(model)["expert-pruned"] == (
        "The checkpoint has 4 of the family's 256 experts: it looks expert-pruned."
    )


def test_mtp_that_config_promises_and_shards_lack(model: Path) -> None:
    assert messages(model)["mtp-without-tensors"] == (
        "config.json says num_mtp_modules 3, but there is no tensor of such a module."
    )


@pytest.mark.parametrize("count", [0, ..., "three"])
def test_config_without_mtp_gives_no_mtp_finding(tmp_path: Path, count: Any) -> None:
    model = make_checkpoint(tmp_path / "model", config={"num_mtp_modules": count})
    assert "mtp-without-tensors" not in messages(model)


def test_mtp_tensors_give_no_mtp_finding(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", edit=adding("model.mtp.0.eh_proj.weight"))
    assert "mtp-without-tensors" not in messages(model)


def test_an_f32_router_beside_bf16(model: Path) -> None:
    assert messages(model)["dtype-differs"] == (
        "4 tensors of router and routing_bias in F32 beside BF16 weights."
    )


def test_fused_sets_cut_by_shard_borders(model: Path) -> None:
    assert messages(model)["fused-set-cut"] == (
        "1 fused set is cut by shard borders (first: qkv of layer 1)."
    )


def test_config_keys_that_loaders_need(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", config={"rotary_dim": ...})
    assert messages(model)["config-key-missing"] == (
        "config.json lacks rotary_dim, which vLLM and SGLang need to load the model."
    )


def test_a_missing_tokenizer(model: Path) -> None:
    assert messages(model)["tokenizer-missing"] == "There are no tokenizer files."
    (model / "tokenizer.json").write_text("{}")
    assert "tokenizer-missing" not in messages(model)


def test_a_plain_whole_model_has_nothing_unusual(tmp_path: Path) -> None:
    def bf16(rows: list[Any]) -> list[Any]:
        return [(n, "BF16" if d == "F32" else d, s, b[: len(b) // (1 + (d == "F32"))])
                for n, d, s, b in rows]  # fmt: skip

    model = make_checkpoint(
        tmp_path / "model", experts=256, shards=1, config={"num_mtp_modules": 0}, edit=bf16
    )
    (model / "tokenizer.json").write_text("{}")
    assert messages(model) == {}


# --- checkpoints that a plan refuses can be inspected


def test_an_unknown_family(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", config={"model_type": "gpt2"})
    report = document(model)
    assert (report["family"], report["model_type"], report["layers"]) == (None, "gpt2", None)
    assert [share["name"] for share in report["roles"]] == ["unknown"]
    assert [f["severity"] for f in report["findings"] if f["rule"] == "family-unknown"] == ["info"]
    assert "Family      unknown (model_type gpt2)" in inspect(model).stdout


def test_a_quantized_checkpoint(tmp_path: Path) -> None:
    def pack(rows: list[Any]) -> list[Any]:
        packed = []
        for name, dtype, shape, data in rows:
            if ".experts." not in name:
                packed.append((name, dtype, shape, data))
                continue
            for part, kind, size in NVFP4A16.outputs(name.removesuffix(".weight"), shape, dtype):
                width = {"U8": 1, "F8_E4M3": 1, "F32": 4}[kind]
                count = width * size[0] * (size[1] if len(size) > 1 else 1)
                packed.append((part, kind, size, bytes(count)))
        return packed

    declared = {"quantization_config": {"quant_method": "compressed-tensors"}}
    model = make_checkpoint(tmp_path / "model", config=declared, edit=pack)
    report = document(model)
    assert report["quantization"] == "compressed-tensors"
    assert report["parameters"] == document(make_checkpoint(tmp_path / "parent"))["parameters"]
    assert {s["name"]: s["tensors"] for s in report["roles"]}["expert"] == 3 * 24
    assert messages(model)["source-quantized"] == (
        'model is already quantized (config.json says "compressed-tensors").'
    )


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (without("layers.1.self_attn.o_proj"), "tensor-missing"),
        (without("experts.2."), "expert-gap"),
        (adding("model.layers.0.surprise.weight"), "tensor-unknown"),
        (lambda rows: renamed(rows, "lm_head", "output"), "tensor-unknown"),
    ],
)
def test_a_checkpoint_that_is_not_whole(tmp_path: Path, edit: Edit, rule: str) -> None:
    assert rule in messages(make_checkpoint(tmp_path / "model", edit=edit))


@pytest.mark.parametrize("value", [True, -1, 10**400, "62", None, [1], 1.5])
def test_nonsense_in_config_is_not_repeated_as_fact(tmp_path: Path, value: Any) -> None:
    model = make_checkpoint(tmp_path / "model", config={"max_position_embeddings": value})
    assert document(model)["context"] is None
    assert "Context     not known" in inspect(model).stdout


def test_escapes_in_config_do_not_reach_the_terminal(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", config={"model_type": "\x1b[31m[bold]x"})
    result = inspect(model)
    assert "\x1b" not in result.output
    assert r"unknown (model_type \x1b[31m[bold]x)" in result.stdout


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    result = inspect(tmp_path, "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["message"] == (
        f"{tmp_path.name} has no config.json, so it is no checkpoint."
    )


def test_a_quantization_config_in_the_text_models_table_is_read(tmp_path: Path) -> None:
    table = {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}}

    assert document(make_checkpoint(tmp_path / "m", config=table))["quantization"] == (
        "compressed-tensors"
    )
