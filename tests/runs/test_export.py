"""`export` turns compressed-tensors into ModelOpt's layout and back, with the same bytes."""

import json
from pathlib import Path

import numpy as np
import pytest

from judges import (
    converted_by,
    data,
    differences,
    hashes,
    model_free_ptq,
    one_shard,
    opened,
    read_json,
)
from make import Row, make_checkpoint, without, write_index, write_json
from mquant.checkpoint import INDEX_NAME, Folder
from mquant.errors import Refused
from mquant.family_files import load_families
from mquant.numerics.reciprocal import reciprocal, recovered
from mquant.plan import Target
from mquant.runs.export import export
from mquant.runs.quantize import quantize
from mquant.synth import Precision, synth
from mquant.verify.judge import Depth, verify
from mutate import changed, mutated, scalar
from run import TRAINED, plan_of, quantize_nvfp4
from schemes import w4a4, with_input_scales

FAMILIES = load_families()
KEY = "model.layers.1.self_attn.k_proj"
EXPERT = "model.layers.1.block_sparse_moe.experts.1.w1"


def exported(src: Path, out: Path, target: Target = Target.MODELOPT) -> Path:
    return export(Folder(src), FAMILIES, target, out).out


def exported_back(src: Path, out: Path) -> Path:
    return exported(src, out, Target.COMPRESSED_TENSORS)


def messages(folder: Path) -> list[str]:
    findings = verify(Folder(folder), FAMILIES, Depth.NUMBERS, Folder(TRAINED)).findings
    return [finding.message for finding in findings if finding.severity != "info"]


def number(folder: Path, name: str) -> np.float32:
    value: np.float32 = np.frombuffer(data(opened(folder), name), "<f4")[0]
    return value


@pytest.fixture(scope="module")
def nvfp4a16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("q") / "nvfp4", shard_bytes=10**6)


@pytest.fixture(scope="module")
def nvfp4(nvfp4a16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W4A4, with an input scale that differs from the reciprocal of its reciprocal by one step."""

    def edit(rows: list[Row]) -> list[Row]:
        scale = np.array([1.9062501], "<f4").tobytes()
        return [
            (n, d, s, scale if n == f"{KEY}.input_global_scale" else raw)
            for n, d, s, raw in with_input_scales(rows)
        ]

    folder = mutated(nvfp4a16, tmp_path_factory.mktemp("w4a4"), edit=edit)
    total = opened(folder).nbytes
    write_index(folder, dict(sorted(read_json(folder / INDEX_NAME)["weight_map"].items())), total)
    config = read_json(folder / "config.json")
    w4a4(config)
    write_json(folder / "config.json", config)
    return folder


@pytest.fixture(params=["W4A16_NVFP4", "NVFP4"])
def source(request: pytest.FixtureRequest) -> Path:
    name = "nvfp4" if request.param == "NVFP4" else "nvfp4a16"
    folder: Path = request.getfixturevalue(name)
    return folder


# --- to ModelOpt


def test_codes_and_block_scales_are_the_same_bytes_and_global_scales_reciprocals(
    source: Path, tmp_path: Path
) -> None:
    result, expected = opened(exported(source, tmp_path / "out")), opened(source)
    names = {"weight_packed": "weight", "weight_scale": "weight_scale"}
    scalars = {"weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}
    for info in expected.tensors.values():
        module, _, suffix = info.name.rpartition(".")
        renamed = {**names, **scalars}.get(suffix, suffix)
        tensor = result.tensors[f"{module}.{renamed}"]
        assert tensor.shard == info.shard
        if suffix in scalars:
            assert (tensor.dtype, tensor.shape) == ("F32", ())
            factor = np.frombuffer(data(result, tensor.name), "<f4")[0]
            assert factor == np.float32(1) / np.frombuffer(data(expected, info.name), "<f4")[0]
        else:
            assert (tensor.dtype, tensor.shape) == (info.dtype, info.shape)
            assert data(result, tensor.name) == data(expected, info.name)
    assert len(result.tensors) == len(expected.tensors)


def test_both_configs_say_the_same_in_modelopts_words(source: Path, tmp_path: Path) -> None:
    out = exported(source, tmp_path / "out")
    algorithm = "NVFP4" if f"{KEY}.input_global_scale" in opened(source).tensors else "W4A16_NVFP4"
    gates = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(3)]
    exclude = ["lm_head", "model.embed_tokens", *gates]
    producer = {"name": "modelopt", "version": "0.39.0"}
    assert read_json(out / "hf_quant_config.json") == {
        "producer": producer,
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": exclude,
        },
    }
    config = read_json(out / "config.json")
    declared = config.pop("quantization_config")
    assert config == read_json(TRAINED / "config.json")
    fp4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    inputs = {"input_activations": fp4} if algorithm == "NVFP4" else {}
    assert declared == {
        "config_groups": {"group_0": {**inputs, "weights": fp4, "targets": ["Linear"]}},
        "group_size": 16,
        "ignore": exclude,
        "producer": producer,
        "quant_algo": algorithm,
        "quant_method": "modelopt",
    }


def test_patterns_in_ignore_become_exact_names(nvfp4a16: Path, tmp_path: Path) -> None:
    config = read_json(nvfp4a16 / "config.json")["quantization_config"]
    config["ignore"] = ["lm_head", r"re:.*block_sparse_moe\.gate$"]
    src = mutated(nvfp4a16, tmp_path, config={"quantization_config": config})
    out = exported(src, tmp_path / "out")
    entries = read_json(out / "hf_quant_config.json")["quantization"]["exclude_modules"]
    assert entries == list(plan_of(TRAINED).ignore)


def test_verify_finds_no_error_and_no_warning(source: Path, tmp_path: Path) -> None:
    assert messages(exported(source, tmp_path / "out")) == []


@pytest.mark.upstream
def test_compressed_tensors_own_converter_gives_our_tensors_back(
    nvfp4: Path, tmp_path: Path
) -> None:
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter

    out = exported(nvfp4, tmp_path / "out")
    modules = [n.removesuffix(".weight_packed") for n in opened(nvfp4).tensors if "_packed" in n]
    upstream = converted_by(ModelOptNvfp4Converter(targets=modules), out, tmp_path / "theirs")
    names = set(opened(nvfp4).tensors)
    assert opened(upstream).tensors.keys() == names
    scalars = {name for name in names if name.endswith("_global_scale")}
    assert differences(upstream, nvfp4, names - scalars) == []
    for name in scalars:  # upstream's have no dimension, and are the reciprocal's plain reciprocal
        exact = number(nvfp4, name)
        assert number(upstream, name) == np.float32(1) / (np.float32(1) / exact)
        assert number(upstream, name) in (
            exact,
            *np.nextafter(exact, np.array([0, np.inf], np.float32)),
        )


# --- from ModelOpt back


def test_every_file_is_the_same_after_both_exports(source: Path, tmp_path: Path) -> None:
    modelopt = exported(source, tmp_path / "there")
    again = hashes(exported_back(modelopt, tmp_path / "back"))
    first = hashes(source)
    assert again.pop("mquant.json") != first.pop("mquant.json")
    assert again == first


@pytest.mark.upstream
def test_a_checkpoint_of_upstream_comes_back_in_its_order(tmp_path: Path) -> None:
    src = model_free_ptq(one_shard(TRAINED, tmp_path / "one"), tmp_path / "src")
    again = exported_back(exported(src, tmp_path / "there"), tmp_path / "back")
    assert list(opened(again).tensors) == list(opened(src).tensors)
    assert differences(again, src, set(opened(src).tensors)) == []
    assert read_json(again / "config.json") == read_json(src / "config.json")


def test_a_scale_that_its_reciprocal_does_not_give_is_recorded(nvfp4: Path, tmp_path: Path) -> None:
    modelopt = exported(nvfp4, tmp_path / "there")
    record = read_json(modelopt / "mquant.json")["compressed_tensors"]
    name = f"{KEY}.input_global_scale"
    assert record["scales"] == {name: float(number(nvfp4, name))}
    (modelopt / "mquant.json").unlink()
    assert number(exported_back(modelopt, tmp_path / "back"), name) != number(nvfp4, name)


def test_a_record_that_does_not_fit_its_scale_is_not_believed(nvfp4: Path, tmp_path: Path) -> None:
    modelopt = exported(nvfp4, tmp_path / "there")
    table = read_json(modelopt / "mquant.json")
    table["compressed_tensors"] = {
        "scales": {f"{KEY}.input_global_scale": 7.5, f"{KEY}.weight_global_scale": "1"},
        "quantization_config": {"quant_method": "gptq"},
    }
    (modelopt / "mquant.json").write_text(json.dumps(table))
    out = exported_back(modelopt, tmp_path / "back")
    assert number(out, f"{KEY}.input_global_scale") != 7.5
    assert messages(out) == []


def test_every_bf16_number_survives_its_reciprocal() -> None:
    words = np.arange(0x0080, 0x7E80, dtype=np.uint32) << 16
    for value in words.view(np.float32):
        assert recovered(reciprocal(value)) == value


def test_the_export_of_a_checkpoint_of_modelopt_verifies(source: Path, tmp_path: Path) -> None:
    modelopt = exported(source, tmp_path / "there")
    (modelopt / "mquant.json").unlink()
    out = exported_back(modelopt, tmp_path / "back")
    config = read_json(out / "config.json")["quantization_config"]
    assert config["ignore"] == list(plan_of(TRAINED).ignore)
    assert config["quant_method"] == "compressed-tensors"
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs is None) == (f"{KEY}.input_global_scale" not in opened(source).tensors)
    assert messages(out) == []
    assert not (out / "hf_quant_config.json").exists()


# --- second runs and refusals


def test_a_second_run_is_already_done(nvfp4a16: Path, tmp_path: Path) -> None:
    out = exported(nvfp4a16, tmp_path / "out")
    before = hashes(out)
    assert not export(Folder(nvfp4a16), FAMILIES, Target.MODELOPT, out).fresh
    assert hashes(out) == before


def test_other_layouts_are_refused(nvfp4a16: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is not compressed-tensors NVFP4, the source of modelopt"):
        exported(make_checkpoint(tmp_path / "bf16"), tmp_path / "out")
    with pytest.raises(Refused, match="is already quantized"):
        exported_back(nvfp4a16, tmp_path / "out")


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan, 1e-40])
def test_a_scale_without_a_reciprocal_is_refused_by_name(
    nvfp4a16: Path, tmp_path: Path, value: float
) -> None:
    src = mutated(
        nvfp4a16, tmp_path, edit=changed(f"{EXPERT}.weight_global_scale", data=scalar(value))
    )
    with pytest.raises(Refused, match=rf"{EXPERT}.weight_global_scale is .* has no reciprocal"):
        exported(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_are_scaled_in_all_modules_or_in_none(nvfp4: Path, tmp_path: Path) -> None:
    src = mutated(nvfp4, tmp_path, edit=without(f"{KEY}.input_global_scale"))
    with pytest.raises(Refused, match=f"{KEY}.weight_packed has no input scale, but 101 other"):
        exported(src, tmp_path / "out")


def test_a_quantized_cache_is_refused(nvfp4a16: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_scale"

    def edit(rows: list[Row]) -> list[Row]:
        return [*rows, (name, "F32", (1,), np.ones(1, "<f4").tobytes())]

    with pytest.raises(Refused, match=f"mquant does not export {name}"):
        exported(mutated(nvfp4a16, tmp_path, edit=edit), tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "precision", "stored"),
    [
        ("minimax_m2", "mxfp4", "compressed-tensors MXFP4"),
        ("minimax_m2", "int4", "packed integers"),
        ("mistral", "fp8-tensor", "FP8 per tensor"),
        ("deepseek_v4", "mxfp4-fp8", "DeepSeek FP8 and DeepSeek MXFP4"),
        ("gpt_oss", "mxfp4-blocks", "gpt-oss MXFP4"),
    ],
)
def test_a_source_in_another_format_is_told_that_only_nvfp4_is_exported(
    tmp_path: Path, family: str, precision: str, stored: str
) -> None:
    src = synth(tmp_path / "src", FAMILIES[family], precision=Precision(precision)).path
    with pytest.raises(Refused) as caught:
        exported(src, tmp_path / "out")
    (finding,) = caught.value.findings
    assert finding.rule == "nothing-to-export"
    assert finding.message == (
        f"src is already quantized, as {stored}; mquant exports NVFP4 only, and to modelopt only "
        "checkpoints whose quantized weights are all compressed-tensors NVFP4."
    )
    assert finding.fix == "Make such a checkpoint first: mquant quantize src --recipe nvfp4."


def test_a_checkpoint_that_is_nvfp4_only_in_part_is_not_exported(tmp_path: Path) -> None:
    mixed = quantize(plan_of(TRAINED, "nvfp4-fp8"), tmp_path / "mixed").out
    with pytest.raises(Refused, match="as compressed-tensors FP8 and compressed-tensors NVFP4; "):
        exported(mixed, tmp_path / "out")
