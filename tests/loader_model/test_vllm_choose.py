"""vLLM 0.32 takes one quantization config of several places, and one method for the config."""

from typing import Any

import pytest

from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.layers import Linear
from mquant.loader_model.vllm.methods.choose import choose, read_method
from mquant.loader_model.vllm.tensors import Copies, Loaded, LoadRefused, Unknown

NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
FILE = {
    "producer": {"name": "modelopt"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    },
}


def method(config: dict[str, Any], hf_quant_config: Any = None) -> str | None:
    """Return the name of the method that vLLM takes."""
    chosen = choose(config, hf_quant_config)
    return chosen.method if chosen else None


def quantized(**values: Any) -> dict[str, Any]:
    """Return a config.json with a quantization config."""
    return {"quantization_config": values}


# --- where vLLM looks


def test_a_checkpoint_without_a_config_is_unquantized() -> None:
    assert choose({}) is None


def test_config_json_wins_over_modelopts_file() -> None:
    assert method({"quantization_config": NVFP4}, {"quantization": "junk"}) == "modelopt_fp4"


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}])
def test_modelopts_file_counts_if_config_json_has_no_config(config: dict[str, Any]) -> None:
    chosen = choose(config, FILE)

    assert chosen and chosen.method == "modelopt_fp4"
    assert chosen.config["quantization"] == FILE["quantization"]


def test_compression_config_counts_last() -> None:
    old = {"compression_config": {"quant_method": "compressed-tensors"}}

    assert method(old) == "compressed-tensors"
    assert method(old, FILE) == "modelopt_fp4"


def test_a_config_inside_text_config_is_no_config_of_the_model() -> None:
    assert choose({"text_config": quantized(quant_method="fp8")}) is None


@pytest.mark.parametrize("junk", [False, "fp8", ["fp8"], 4])
def test_a_config_that_is_no_table_is_refused(junk: object) -> None:
    with pytest.raises(LoadRefused, match="no table"):
        choose({"quantization_config": junk})


# --- ModelOpt's file


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        ("FP8", "modelopt"),
        ("fp8_pb_wo", "modelopt"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "modelopt"),
        ("NVFP4", "modelopt_fp4"),
    ],
)
def test_the_algorithm_in_modelopts_file_decides(algo: str, expected: str) -> None:
    file = {**FILE, "quantization": {"quant_algo": algo}}

    assert method({}, file) == expected


@pytest.mark.parametrize("algo", ["W4A16_NVFP4", "MIXED_PRECISION", "MXFP8"])
def test_vllm_takes_few_algorithms_from_modelopts_file(algo: str) -> None:
    with pytest.raises(LoadRefused, match=algo):
        choose({}, {**FILE, "quantization": {"quant_algo": algo}})


def test_a_file_that_does_not_name_modelopt_and_no_method_is_unquantized() -> None:
    assert choose({}, {"quantization": FILE["quantization"]}) is None


def test_the_producer_counts_for_nothing_in_compression_config() -> None:
    table = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_NVFP4"}}

    assert method({"compression_config": {**table, "quant_method": "modelopt"}}) == "modelopt_fp4"


# --- the method


@pytest.mark.parametrize(
    ("name", "algo", "expected"),
    [
        ("modelopt", "FP8", "modelopt"),
        ("modelopt_fp4", "fp8", "modelopt"),
        ("modelopt", "NVFP4_AWQ", "modelopt_fp4"),
        ("ModelOpt", "W4A16_NVFP4", "modelopt_fp4"),
        ("modelopt", "MXFP8", "modelopt_mxfp8"),
        ("modelopt", "FP8_PB_WO", "modelopt"),
        ("modelopt_fp4", "FP8_PB_WO", "modelopt_fp4"),
    ],
)
def test_the_algorithm_overrides_the_method(name: str, algo: str, expected: str) -> None:
    assert method(quantized(quant_method=name, quant_algo=algo)) == expected


def test_an_underscore_is_no_difference_in_compressed_tensors() -> None:
    assert method(quantized(quant_method="Compressed_Tensors")) == "compressed-tensors"


def test_a_config_without_a_method_is_unquantized() -> None:
    assert choose(quantized(weight_block_size=[128, 128])) is None


@pytest.mark.parametrize("name", ["bitsandbytes", "gguf", "modelopt_x", None, 4])
def test_an_unknown_method_is_refused(name: object) -> None:
    with pytest.raises(LoadRefused, match="quant"):
        choose(quantized(quant_method=name))


def test_a_method_that_quantizes_while_loading_is_refused() -> None:
    with pytest.raises(LoadRefused, match="no checkpoint"):
        choose(quantized(quant_method="fp8_per_tensor"))


def test_a_deprecated_method_is_refused() -> None:
    with pytest.raises(LoadRefused, match="deprecated"):
        choose(quantized(quant_method="fbgemm_fp8"))


_READ: dict[str, dict[str, Any]] = {
    "awq": {"bits": 4, "group_size": 128, "zero_point": True},
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "auto-round": {"bits": 4, "group_size": 128},
    "quark": {"export": {}},
}
"""Methods that are not modelled, and the keys that each reads."""


@pytest.mark.parametrize("name", _READ)
def test_the_other_methods_of_vllm_are_not_judged(name: str) -> None:
    with pytest.raises(Unknown, match="quantization method"):
        choose(quantized(quant_method=name, **_READ[name]))


@pytest.mark.parametrize("name", _READ)
def test_another_method_is_refused_without_a_key_that_it_reads(name: str) -> None:
    for missing in _READ[name]:
        keys = {key: value for key, value in _READ[name].items() if key != missing}
        with pytest.raises(LoadRefused, match=f"has no .*{missing}"):
            choose(quantized(quant_method=name, **keys))


def test_mxfp4_keeps_linear_layers_plain_and_its_experts_are_not_known() -> None:
    method = read_method(quantized(quant_method="mxfp4"), None, (4, 2))
    assert method is not None
    assert method.linear(Linear("model.o_proj", "model.o_proj", outputs=(8,), inputs=8)) is None
    experts = Experts("model.experts", "model.experts")
    experts.build(method.experts(experts))
    with pytest.raises(Unknown, match="experts of the quantization method mxfp4"):
        experts.load(Copies(), "0.w1.weight", Loaded("x", "U8", (8,)), None)


def test_rules_of_gptq_that_are_no_table_stop_any_method() -> None:
    with pytest.raises(LoadRefused, match="dynamic"):
        choose(quantized(quant_method="fp8", dynamic=["-:lm_head"]))


def test_mxfp8_takes_no_float16() -> None:
    mxfp8 = quantized(quant_method="mxfp8")

    assert method({**mxfp8, "torch_dtype": "bfloat16"}) == "mxfp8"
    with pytest.raises(LoadRefused, match="bfloat16"):
        choose({**mxfp8, "torch_dtype": "float16"})


# --- MIXED_PRECISION

MIXED = quantized(quant_method="modelopt", quant_algo="MIXED_PRECISION")


def test_the_layers_of_a_mixed_config_may_stand_in_modelopts_file() -> None:
    chosen = choose(MIXED, FILE)

    assert chosen and (chosen.method, chosen.config) == ("modelopt_mixed", FILE)


def test_a_mixed_config_without_its_layers_needs_modelopts_file() -> None:
    with pytest.raises(LoadRefused, match=r"no hf_quant_config\.json"):
        choose(MIXED)
    with pytest.raises(LoadRefused, match="ModelOpt wrote"):
        choose(MIXED, {"quantization": {}})
