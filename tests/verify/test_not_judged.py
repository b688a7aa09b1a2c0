"""`verify` calls no checkpoint clean whose config, layout or architecture it does not know."""

from pathlib import Path
from types import EllipsisType
from typing import Any

import pytest
from compressed_tensors.quantization import preset_name_to_scheme

from judges import read_json
from loaders import fake_python
from make import Edit, Row, make_checkpoint
from mquant.checkpoint import Folder, open_checkpoint
from mquant.family import load_families
from mquant.loader_model.modules import read_modules
from mquant.loader_model.vllm_methods import _stored_by_groups
from mquant.verify.judge import Depth, Report, verify
from mutate import mutated

pytestmark = pytest.mark.upstream

GATE = "model.layers.0.block_sparse_moe.gate.weight"


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


@pytest.mark.parametrize(
    "keys",
    [
        {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"kv_cache_scheme": "fp8"},
        {"kv_cache_scheme": {"num_bits": 4, "type": "int"}},
        {"a_key_of_tomorrow": 1},
        {"config_groups": {"group_0": 5}},
    ],
)
def test_a_config_with_an_unknown_key_or_value_is_not_judged(
    good: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    config = {**read_json(good / "config.json")["quantization_config"], **keys}
    report = report_of(mutated(good, tmp_path, config={"quantization_config": config}))
    broken = report.count("error")
    assert broken or report.undecided.endswith(
        f"what vLLM makes of {next(iter(keys))!r} in the quantization config is not known."
    )
    assert not report.verdict.startswith(("Clean", "Sound"))


@pytest.mark.parametrize(
    ("part", "keys"),
    [
        ("weights", {"strategy": "channel"}),
        ("weights", {"strategy": None}),
        ("weights", {"dynamic": True}),
        ("weights", {"symmetric": False}),
        ("weights", {"type": ...}),
        ("weights", {"group_size": ...}),
        ("weights", {"num_bits": 4.0}),
        ("weights", {"of_tomorrow": 1}),
        ("weights", {"actorder": "group"}),
        ("weights", {"scale_dtype": "quux"}),
        ("weights", {"zp_dtype": 7}),
        ("weights", {"observer": 5}),
        ("weights", {"ignore": []}),
        ("input_activations", {"num_bits": 3, "type": "int"}),
        ("output_activations", {"num_bits": 8}),
    ],
)
def test_a_group_with_an_unknown_value_is_not_judged(
    good: Path, tmp_path: Path, part: str, keys: dict[str, Any]
) -> None:
    config = changed_group(good, part, **keys)
    report = report_of(mutated(good, tmp_path, config={"quantization_config": config}))
    assert report.undecided or report.count("error")
    assert not report.verdict.startswith(("Clean", "Sound"))


@pytest.mark.parametrize("name", ["NVFP4A16", "NVFP4", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W4A16"])
def test_the_config_of_every_scheme_is_known(name: str) -> None:
    scheme = preset_name_to_scheme(name, ["Linear"])
    group = {**scheme.model_dump(mode="json"), "format": None}
    stored = {
        "N": "compressed-tensors NVFP4",
        "F": "compressed-tensors FP8",
        "W": "packed integers",
    }
    assert _stored_by_groups({"config_groups": {"group_0": group}}) == {stored[name[0]]}


def test_a_group_without_tensors_is_not_judged(good: Path, tmp_path: Path) -> None:
    config = read_json(good / "config.json")["quantization_config"]
    int8 = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}
    config["config_groups"]["group_1"] = int8
    report = report_of(mutated(good, tmp_path, config={"quantization_config": config}))
    assert report.undecided.endswith("under this quantization config is not known.")


@pytest.mark.parametrize("method", ["fp8", "modelopt", "modelopt_fp4", "modelopt_mixed"])
def test_a_method_that_contradicts_the_tensors_is_not_judged(
    good: Path, tmp_path: Path, method: str
) -> None:
    config = read_json(good / "config.json")["quantization_config"]
    wrong = {
        "fp8": {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    }.get(method, {"quant_algo": "NVFP4"})
    ignore = {"ignore": config["ignore"]}
    declared = {"quant_method": method, **wrong, **ignore}
    report = report_of(mutated(good, tmp_path, config={"quantization_config": declared}))
    assert report.undecided or report.count("error")
    assert not report.verdict.startswith(("Clean", "Sound"))


@pytest.mark.parametrize("architectures", [["NoSuchForCausalLM"], ["MixtralForCausalLM"], [], "x"])
def test_another_architecture_is_not_judged(
    good: Path, tmp_path: Path, architectures: object
) -> None:
    report = report_of(mutated(good, tmp_path, config={"architectures": architectures}))
    assert report.undecided.endswith(f"architectures {architectures} is not MiniMax-M2's.")
    assert "fused-set-split" in report.not_judged


def test_a_plain_tensor_of_integers_is_an_error(good: Path, tmp_path: Path) -> None:
    report = report_of(mutated(good, tmp_path, edit=cast(GATE, "I32")))
    messages = {finding.rule: finding.message for finding in report.findings}
    assert messages["dtype-not-float"] == f"{GATE} is I32, not floats."


def test_integers_in_an_unknown_family_are_not_judged(parent: Path, tmp_path: Path) -> None:
    unknown: dict[str, Any | EllipsisType] = {"model_type": "nobody_knows"}
    bad = mutated(parent, tmp_path, edit=cast(GATE, "I16"), config=unknown)
    report = report_of(bad)
    assert "model_type 'nobody_knows' is of no family" in report.undecided
    assert "the layout of 1 module is not known (first: " in report.undecided


def test_a_quantization_config_under_another_key_is_read(tmp_path: Path) -> None:
    for key, value in (
        ("compression_config", {"quant_method": "awq"}),
        ("text_config", {"quantization_config": {"quant_method": "awq"}}),
    ):
        report = report_of(make_checkpoint(tmp_path / key, config={key: value}))
        assert report.method == "awq"
        assert "what vLLM makes of quant_method 'awq' is not known" in report.undecided


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


def test_a_loader_that_did_not_answer_has_judged_nothing(good: Path, tmp_path: Path) -> None:
    dies = fake_python(tmp_path / "python", "exit 1")
    report = verify(Folder(good), load_families(), Depth.STRUCTURE, vllm=dies)
    assert str(report.stands_for) == "vLLM 0.32"
    assert report.loader is not None
    assert report.loader.verdict == "not asked"
    assert report.checked == ("structure",)
    assert "vllm-refuses" in report.not_judged
