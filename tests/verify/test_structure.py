"""`verify` finds every fault that headers and JSON show; code breaks a good checkpoint."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges import opened, read_json
from make import Edit, Row, adding, make_checkpoint, renamed, without, write_index, write_shard
from mquant.checkpoint import INDEX_NAME
from mquant.findings import RULES
from mutate import changed, judged, mutated

pytestmark = pytest.mark.upstream

LAYER = "model.layers.0."
EXPERT = f"{LAYER}block_sparse_moe.experts.1."
GATE = f"{LAYER}block_sparse_moe.gate.weight"
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*gate$", "model.embed_tokens"],
}


def grouped(*groups: object, **keys: object) -> dict[str, Any]:
    """Return a quantization_config with these groups."""
    table = {f"group_{n}": group for n, group in enumerate(groups)}
    return {"quantization_config": {**QUANTIZATION, "config_groups": table, **keys}}


def group_of(good: Path, **keys: object) -> dict[str, Any]:
    """Return the good checkpoint's config group, with some keys changed."""
    table = read_json(good / "config.json")["quantization_config"]["config_groups"]
    return {**table["group_0"], **keys}


def test_mquants_own_output_is_clean(good: Path) -> None:
    assert judged(good) == {}


def test_a_plain_checkpoint_is_clean(parent: Path) -> None:
    assert judged(parent) == {}


@pytest.mark.parametrize(
    ("edit", "rule", "words"),
    [
        (without("lm_head.weight"), "tensor-missing", "lacks lm_head.weight"),
        (without(f"{LAYER}input_layernorm"), "tensor-missing", "input_layernorm.weight"),
        (without("e_score_correction_bias"), "tensor-missing", "e_score_correction_bias"),
        (without("layers.1."), "tensor-missing", "model.layers.1."),
        (without(f"{EXPERT}w2."), "tensor-missing", f"{EXPERT}w2.weight"),
        (without(f"{EXPERT}w1."), "fused-set-incomplete", f"without {EXPERT}w1.weight"),
        (without(EXPERT), "expert-gap", "has no expert 1 of 0 to 3"),
        (without("experts.3."), "experts-disagree", "3 experts, but config.json says"),
        (without(f"{EXPERT}w1.weight_scale"), "part-missing", "has no weight_scale"),
        (without(f"{EXPERT}w1.weight_global"), "part-missing", "has no weight_global_scale"),
        (without(f"{EXPERT}w1.weight_packed"), "part-missing", "has no weight_packed"),
        (without("weight_global_scale"), "part-missing", "and 31 more like it"),
        (adding("model.layers.0.mystery.weight"), "tensor-unknown", "no such tensor as"),
        (adding("model.layers.9.self_attn.q_proj.weight"), "layers-disagree", "layer 9"),
        (
            lambda rows: renamed(rows, ".self_attn.q_norm.", ".self_attn.q_nrom."),
            "tensor-unknown",
            "q_nrom.weight (and 1 more like it)",
        ),
        (
            lambda rows: renamed(rows, ".block_sparse_moe.gate.", ".mlp.gate."),
            "tensor-renamed",
            "on disk the module is model.layers.0.block_sparse_moe.gate",
        ),
        (adding(f"{EXPERT}w1.weight_zero_point"), "part-unexpected", "no part of a module"),
        (
            adding(f"{LAYER}self_attn.o_proj.input_global_scale", dtype="F32", shape=(1,)),
            "activation-scales-undeclared",
            f"{LAYER}self_attn.o_proj has a scale of its input",
        ),
        (adding(f"{EXPERT}w1.weight", shape=(32, 64)), "weight-stored-twice", "both weight and"),
        (changed(f"{EXPERT}w1.weight_scale", dtype="U8"), "part-dtype", "is U8; NVFP4 has F8"),
        (changed(f"{EXPERT}w1.weight_packed", dtype="I8"), "part-dtype", "is I8; NVFP4 has U8"),
        (changed(f"{EXPERT}w1.weight_scale", shape=(16, 8)), "part-shape", "needs [32, 4]"),
        (changed(f"{EXPERT}w1.weight_packed", shape=(16, 64)), "shape-disagrees", "[32, 64]"),
        (
            changed(GATE, shape=(3, 64), data=lambda raw: raw[: 3 * 64 * 4]),
            "shape-disagrees",
            "config.json implies [4, 64]",
        ),
    ],
)
def test_a_tensor_that_breaks_a_rule_is_found(
    good: Path, tmp_path: Path, edit: Edit, rule: str, words: str
) -> None:
    findings = judged(mutated(good, tmp_path, edit=edit))
    assert words in findings[rule]


def test_a_weight_of_another_shape_beside_codes_is_one_fault(good: Path, tmp_path: Path) -> None:
    bad = mutated(good, tmp_path, edit=adding(f"{EXPERT}w1.weight", shape=(8, 8)))
    assert set(judged(bad)) == {"weight-stored-twice"}


def plain_again(*modules: str) -> Edit:
    """Return an edit that stores some modules as BF16 weights; other modules stay quantized."""

    def edit(rows: list[Row]) -> list[Row]:
        kept = [row for row in rows if not row[0].startswith(tuple(f"{m}." for m in modules))]
        shapes = {row[0]: row[2] for row in rows}
        for module in modules:
            out, half = shapes[f"{module}.weight_packed"]
            kept += adding(f"{module}.weight", shape=(out, half * 2))([]) or []
        return kept

    return edit


def test_one_plain_expert_among_quantized_experts_is_found(good: Path, tmp_path: Path) -> None:
    whole = [f"{EXPERT}{name}" for name in ("w1", "w2", "w3")]
    findings = judged(mutated(good, tmp_path, edit=plain_again(*whole)))
    assert "experts.1.w1 is not quantized, but" in findings["experts-mixed"]
    assert "and 0" not in findings["experts-mixed"]
    assert "fused-set-mixed" not in findings


def test_one_plain_member_of_a_fused_set_is_found(good: Path, tmp_path: Path) -> None:
    findings = judged(mutated(good, tmp_path, edit=plain_again(f"{LAYER}self_attn.k_proj")))
    assert f"{LAYER}self_attn.k_proj is not quantized, but" in findings["fused-set-mixed"]
    assert "experts-mixed" not in findings


@pytest.mark.parametrize(
    ("config", "rule", "words"),
    [
        ({"rotary_dim": ...}, "config-key-missing", "no rotary_dim"),
        ({"hidden_size": ...}, "config-key-unusable", "hidden_size"),
        ({"num_local_experts": 5}, "experts-disagree", "num_local_experts 5"),
        ({"num_hidden_layers": 1}, "layers-disagree", "num_hidden_layers 1"),
        ({"num_hidden_layers": 3}, "tensor-missing", "model.layers.2."),
        ({"model_type": "unheard"}, "family-unknown", "'unheard'"),
        ({"quantization_config": ...}, "quantization-undeclared", "no quantization_config"),
        ({"quantization_config": 4}, "quantization-config-invalid", "no table of keys"),
        ({"quantization_config": {}}, "quantization-config-invalid", "no quant_method"),
        (grouped(), "quantization-config-invalid", "has no config_groups"),
        (grouped(7), "quantization-config-invalid", "'group_0' that is no table"),
        (grouped({}), "quantization-config-invalid", "no list of targets"),
        (grouped({"targets": [], "weights": {}}), "quantization-config-invalid", "targets"),
        (
            grouped({"targets": ["Linear"], "weights": {"strategy": "x"}}),
            "quantization-config-invalid",
            "how many bits",
        ),
        (
            grouped({"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "x"}}),
            "quantization-config-invalid",
            "unknown strategy 'x'",
        ),
        (
            grouped({"targets": ["Linear"], "format": "zip"}),
            "quantization-config-invalid",
            "unknown format 'zip'",
        ),
    ],
)
def test_a_config_that_breaks_a_rule_is_found(
    good: Path, tmp_path: Path, config: Any, rule: str, words: str
) -> None:
    assert words in judged(mutated(good, tmp_path, config=config))[rule]


def test_quant_method_may_be_written_in_any_case(good: Path, tmp_path: Path) -> None:
    awq = {"quant_method": "AWQ", "w_bit": 4, "q_group_size": 128, "zero_point": True}
    config = {"quantization_config": awq}
    assert "quantization-config-invalid" not in judged(mutated(good, tmp_path, config=config))


def test_missing_activation_scales_are_found(good: Path, tmp_path: Path) -> None:
    group = group_of(good, input_activations={"num_bits": 4, "dynamic": "local"})
    findings = judged(mutated(good, tmp_path, config=grouped(group)))
    assert "has no input_global_scale (and 31 more" in findings["activation-scales-missing"]


def test_a_format_that_the_tensors_do_not_have_is_found(good: Path, tmp_path: Path) -> None:
    group = group_of(good, format="float-quantized")
    findings = judged(mutated(good, tmp_path, config=grouped(group)))
    assert "'float-quantized', but" in findings["format-differs"]


def test_a_quantization_config_of_a_plain_checkpoint_is_found(parent: Path, tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    findings = judged(mutated(parent, tmp_path, config=config))
    assert "no tensor is quantized" in findings["quantization-unused"]


def test_a_truncated_shard_is_a_finding_and_the_rest_is_judged(good: Path, tmp_path: Path) -> None:
    bad = mutated(good, tmp_path, config={"rotary_dim": ...})
    shard = opened(good).shards[0]
    (bad / shard).write_bytes((good / shard).read_bytes()[:-7])
    findings = judged(bad)
    assert set(findings) == {"shard-damaged", "config-key-missing"}
    assert f"{shard} is truncated" in findings["shard-damaged"]


@pytest.mark.parametrize("which", [0, slice(None)], ids=["one", "all"])
def test_a_missing_shard_is_a_finding(good: Path, tmp_path: Path, which: Any) -> None:
    bad = mutated(good, tmp_path)
    shards = np.atleast_1d(np.array(opened(good).shards)[which]).tolist()
    for shard in shards:
        (bad / shard).unlink()
    assert shards[0] in judged(bad)["shard-missing"]
    assert "quantization-unused" not in judged(bad)


def test_disagreements_of_index_and_headers_are_found(good: Path, tmp_path: Path) -> None:
    first, last = opened(good).shards[0], opened(good).shards[-1]

    def falsified(index: dict[str, str]) -> dict[str, str]:
        del index["lm_head.weight"]
        index["model.norm.weight"] = first if index["model.norm.weight"] == last else last
        return {**index, "model.ghost": first}

    findings = judged(mutated(good, tmp_path, index=falsified, total_size=7))
    assert "lm_head.weight" in findings["tensor-not-in-index"]
    assert "model.norm.weight" in findings["index-wrong-shard"]
    assert "model.ghost" in findings["index-without-tensor"]
    assert "total_size 7" in findings["total-size-wrong"]


def test_a_missing_index_is_found(good: Path, tmp_path: Path) -> None:
    bad = mutated(good, tmp_path)
    (bad / "model.safetensors.index.json").unlink()
    assert "no model.safetensors.index.json" in judged(bad)["index-missing"]


def test_a_tensor_that_is_stored_twice_is_found(good: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    write_shard(bad / "model-99.safetensors", adding("lm_head.weight", shape=(64, 64))([]) or [])
    assert "does not name model-99" in judged(bad)["shard-not-in-index"]
    index = read_json(bad / INDEX_NAME)
    write_index(bad, {**index["weight_map"], "spare": "model-99.safetensors"}, 1)
    assert "stored twice" in judged(bad)["tensor-stored-twice"]


def test_kv_scales_are_clean(good: Path, tmp_path: Path) -> None:
    name = f"{LAYER}self_attn.k_proj.k_scale"
    assert judged(mutated(good, tmp_path, edit=adding(name, dtype="F32", shape=(1,)))) == {}


def test_every_structure_rule_is_tested() -> None:
    tests = Path(__file__).parents[1].rglob("test_*.py")
    text = "".join(path.read_text("utf-8") for path in tests)
    declared = [rule.id for rule in RULES.values() if rule.needs == "structure"]
    assert [rule for rule in declared if f'"{rule}"' not in text] == []


def test_missing_experts_are_findings(tmp_path: Path) -> None:
    assert "tensor-missing" in judged(make_checkpoint(tmp_path / "src", edit=without("experts.")))
