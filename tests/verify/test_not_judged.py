"""`verify` calls no checkpoint clean if it does not know what vLLM makes of config.json or tensors.

What vLLM 0.32 takes and refuses here, vLLM itself said.
"""

from pathlib import Path
from types import EllipsisType
from typing import Any

import pytest

from judges import read_json
from loaders import fake_python
from make import Edit, Row, adding, make_checkpoint
from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.loader_model.modules import read_modules
from mquant.verify.judge import Depth, Report, verify
from mutate import mutated

pytestmark = pytest.mark.upstream

GATE = "model.layers.0.block_sparse_moe.gate.weight"
IN_GROUPS = {"bits": 4, "group_size": 128, "zero_point": True, "desc_act": False, "sym": True}


def report_of(folder: Path) -> Report:
    return verify(Folder(folder), load_families(), Depth.STRUCTURE)


def changed_group(good: Path, part: str, **keys: Any) -> dict[str, Any]:
    """Return the good quantization config with changed keys in one part of its group."""
    config: dict[str, Any] = read_json(good / "config.json")["quantization_config"]
    group = config["config_groups"]["group_0"]
    args = {k: v for k, v in {**(group[part] or {}), **keys}.items() if v is not ...}
    return {**config, "config_groups": {"group_0": {**group, part: args}}}


def cast(name: str, dtype: str) -> Edit:
    """Return an edit that stores a tensor's bytes as another dtype."""

    def edit(rows: list[Row]) -> list[Row]:
        size = {"I32": 4, "I16": 2}[dtype]
        return [
            (row[0], dtype, (len(row[3]) // size,), row[3]) if row[0] == name else row
            for row in rows
        ]

    return edit


def judged(good: Path, tmp_path: Path, quantization: dict[str, Any]) -> Report:
    return report_of(mutated(good, tmp_path, config={"quantization_config": quantization}))


# --- vLLM's strict classes and loose tables


@pytest.mark.parametrize(
    "keys",
    [
        {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"a_key_of_tomorrow": 1},
    ],
)
def test_keys_that_vllm_does_not_read_change_nothing(
    good: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    config = read_json(good / "config.json")["quantization_config"]
    report = judged(good, tmp_path, {**config, **keys})
    assert report.verdict.startswith("Clean")


@pytest.mark.parametrize(
    "keys",
    [
        {"kv_cache_scheme": "fp8"},
        {"kv_cache_scheme": {"num_bits": 4, "type": "int"}},
        {"config_groups": {"group_0": 5}},
    ],
)
def test_values_that_vllm_refuses_are_errors(
    good: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    config = read_json(good / "config.json")["quantization_config"]
    report = judged(good, tmp_path, {**config, **keys})
    assert report.count("error")
    assert not report.undecided


@pytest.mark.parametrize(
    ("part", "keys"),
    [
        ("weights", {"strategy": "channel"}),
        ("weights", {"strategy": None}),
        ("weights", {"symmetric": False}),
        ("weights", {"type": ...}),
        ("weights", {"group_size": ...}),
        ("weights", {"of_tomorrow": 1}),
        ("weights", {"actorder": "group"}),
        ("weights", {"scale_dtype": "quux"}),
        ("weights", {"zp_dtype": 7}),
        ("weights", {"observer": 5}),
        ("weights", {"ignore": []}),
        ("input_activations", {"num_bits": 3, "type": "int"}),
    ],
)
def test_a_group_that_vllm_refuses_is_an_error(
    good: Path, tmp_path: Path, part: str, keys: dict[str, Any]
) -> None:
    report = judged(good, tmp_path, changed_group(good, part, **keys))
    assert [f.rule for f in report.findings if f.severity == "error"] == ["vllm-refuses"]


@pytest.mark.parametrize(
    ("part", "keys"),
    [
        ("weights", {"dynamic": True}),
        ("weights", {"num_bits": 4.0}),
        ("output_activations", {"num_bits": 8}),
    ],
)
def test_a_group_that_vllm_takes_is_clean(
    good: Path, tmp_path: Path, part: str, keys: dict[str, Any]
) -> None:
    report = judged(good, tmp_path, changed_group(good, part, **keys))
    assert report.verdict.startswith("Clean")


def test_a_group_that_the_format_does_not_have_is_an_error(good: Path, tmp_path: Path) -> None:
    config = read_json(good / "config.json")["quantization_config"]
    config["config_groups"]["group_1"] = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int"},
    }
    assert judged(good, tmp_path, config).count("error")


@pytest.mark.parametrize("method", ["fp8", "modelopt", "modelopt_fp4", "modelopt_mixed"])
def test_a_method_that_contradicts_the_tensors_is_an_error(
    good: Path, tmp_path: Path, method: str
) -> None:
    config = read_json(good / "config.json")["quantization_config"]
    fp8 = {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    keys = fp8 if method == "fp8" else {"quant_algo": "NVFP4"}
    declared = {"quant_method": method, **keys, "ignore": config["ignore"]}
    assert judged(good, tmp_path, declared).count("error")


@pytest.mark.parametrize("method", ["bitsandbytes", "nobody"])
def test_a_method_that_vllm_does_not_have_is_an_error(
    good: Path, tmp_path: Path, method: str
) -> None:
    assert judged(good, tmp_path, {"quant_method": method}).count("error")


# --- what is not known


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_method_that_the_model_of_vllm_lacks_is_not_judged(
    good: Path, tmp_path: Path, method: str
) -> None:
    report = judged(good, tmp_path, {"quant_method": method, **IN_GROUPS})
    clause = f"what vLLM makes of the quantization method auto_{method} is not known"
    assert clause in report.undecided
    assert clause in report.not_judged["fused-set-split"]
    assert report.verdict.startswith("Not judged")


def test_an_architecture_that_mquant_does_not_know_is_not_judged(
    good: Path, tmp_path: Path
) -> None:
    report = report_of(mutated(good, tmp_path, config={"architectures": ["Olmo2ForCausalLM"]}))
    assert report.undecided.endswith("architectures ['Olmo2ForCausalLM'] is not known.")
    assert "fused-set-split" in report.not_judged


@pytest.mark.parametrize("architectures", [["NoSuchForCausalLM"], ["MixtralForCausalLM"], [], "x"])
def test_an_architecture_that_the_tensors_do_not_fit_is_an_error(
    good: Path, tmp_path: Path, architectures: object
) -> None:
    report = report_of(mutated(good, tmp_path, config={"architectures": architectures}))
    assert report.count("error")


def test_a_plain_tensor_of_integers_is_an_error(good: Path, tmp_path: Path) -> None:
    report = report_of(mutated(good, tmp_path, edit=cast(GATE, "I32")))
    messages = {finding.rule: finding.message for finding in report.findings}
    assert messages["dtype-not-float"] == f"{GATE} is I32, not floats."


def test_integers_in_an_unknown_family_are_not_judged(parent: Path, tmp_path: Path) -> None:
    unknown: dict[str, Any | EllipsisType] = {"model_type": "olmo2"}
    bad = mutated(parent, tmp_path, edit=cast(GATE, "I16"), config=unknown)
    report = report_of(bad)
    assert "model_type 'olmo2' is of no family" in report.undecided
    assert "the layout of 1 module is not known (first: " in report.undecided


def test_a_quantization_config_under_another_key_is_read(tmp_path: Path) -> None:
    awq = {"quant_method": "awq", **IN_GROUPS}
    report = report_of(make_checkpoint(tmp_path / "a", config={"compression_config": awq}))
    assert report.method == "awq"
    assert "the quantization method auto_awq is not known" in report.undecided
    nested = {"text_config": {"quantization_config": awq}}
    report = report_of(make_checkpoint(tmp_path / "b", config=nested))
    assert report.method == "awq"
    assert report.count("error")  # vLLM takes text_config for the whole config of the model


def test_a_config_of_null_declares_nothing(good: Path, tmp_path: Path) -> None:
    report = report_of(mutated(good, tmp_path, config={"quantization_config": None}))
    assert "quantization-undeclared" in {found.rule for found in report.findings}


def test_fp8_reads_ignored_layers_before_modules_to_not_convert(tmp_path: Path) -> None:
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    lists = {"ignored_layers": ["model.layers.0.mlp"], "modules_to_not_convert": ["lm_head"]}
    for name, more, ignored in (
        ("both", lists, "model.layers.0.mlp"),
        ("empty", {**lists, "ignored_layers": []}, "lm_head"),
    ):
        config = {"quantization_config": {**fp8, **more}}
        checkpoint = open_checkpoint(Folder(make_checkpoint(tmp_path / name, config=config)))
        assert read_modules(checkpoint, load_families()).ignore == (ignored,)


def test_a_checkpoint_with_mistrals_own_config_is_not_judged(good: Path, tmp_path: Path) -> None:
    folder = mutated(good, tmp_path)
    (folder / "params.json").write_text("{}")
    assert not report_of(folder).undecided
    (folder / "consolidated.safetensors").symlink_to(min(folder.glob("*.safetensors")))

    assert "params.json, which vLLM reads instead of config.json" in report_of(folder).undecided


def test_a_folder_of_mistrals_own_format_hides_the_weights(good: Path, tmp_path: Path) -> None:
    folder = mutated(good, tmp_path)
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.safetensors").write_bytes(b"")
    refused = [f.message for f in report_of(folder).findings if f.rule == "vllm-refuses"]
    assert refused == [
        "vLLM 0.32 refuses the checkpoint: the shards lie beside "
        "original/consolidated.00.safetensors, for which vLLM takes all weights for Mistral's "
        "format."
    ]


def test_an_index_without_tensors_hides_the_weights(good: Path, tmp_path: Path) -> None:
    folder = mutated(good, tmp_path)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused = [f.message for f in report_of(folder).findings if f.rule == "vllm-refuses"]
    assert refused == [
        "vLLM 0.32 refuses the checkpoint: the shards are not in model.safetensors.index.json, "
        "which is empty."
    ]


def test_a_model_of_sentence_transformers_is_not_judged(good: Path, tmp_path: Path) -> None:
    folder = mutated(good, tmp_path)
    (folder / "modules.json").write_text("[]")
    assert "modules.json of sentence-transformers" in report_of(folder).undecided


def test_input_scales_of_a_mixed_model_are_no_error_if_the_loader_is_not_known(
    tmp_path: Path,
) -> None:
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"model.layers.0.mlp": {"quant_algo": "NVFP4"}},
    }
    config = {"quantization_config": quantization, "head_dtype": "float32"}
    parts = [
        f"model.layers.0.self_attn.q_proj.{part}" for part in ("weight_scale_2", "input_scale")
    ]
    edit = adding(*parts, dtype="F32", shape=(1,))
    report = report_of(make_checkpoint(tmp_path / "mixed", config=config, edit=edit))
    assert "head_dtype" in report.undecided
    assert "activation-scales-undeclared" not in {finding.rule for finding in report.findings}


def test_a_loader_that_did_not_answer_has_judged_nothing(good: Path, tmp_path: Path) -> None:
    dies = fake_python(tmp_path / "python", "exit 1")
    report = verify(Folder(good), load_families(), Depth.STRUCTURE, vllm=dies)
    assert str(report.stands_for) == "vLLM 0.32"
    assert report.loader is not None
    assert report.loader.verdict == "not asked"
    assert report.checked == ("structure",)
    assert "vllm-refuses" in report.not_judged
