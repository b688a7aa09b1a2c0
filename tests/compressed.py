"""A model of one layer in vLLM, and quantization configs of compressed-tensors."""

from collections.abc import Mapping
from typing import Any

import pytest

from mquant.loader_model.vllm.load import Outcome, load
from mquant.loader_model.vllm.methods.compressed_tensors import CompressedTensors
from mquant.loader_model.vllm.model import build
from mquant.loader_model.vllm.tensors import Loaded, LoadRefused, Parameter
from mquant.loader_rows import Settings, VllmRows

ROWS = VllmRows.model_validate(
    {
        "architectures": ["Small"],
        "stacked": [[f".{x}_proj", ".qkv_proj", x] for x in "qkv"],
        "renames": [[".gate_proj.", ".w1."]],
        "fused": {"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
        "layers": [
            {"name": "model.embed", "kind": "embedding", "rows": ["64"], "columns": "128"},
            {"name": "lm_head", "kind": "head", "rows": ["64"], "columns": "128"},
            {
                "name": "model.layers.{layer}.qkv_proj",
                "kind": "qkv",
                "rows": ["128", "64", "64"],
                "columns": "128",
            },
            {
                "name": "model.layers.{layer}.o_proj",
                "kind": "row",
                "rows": ["128"],
                "columns": "128",
            },
            {"name": "model.layers.{layer}.attn", "kind": "attention", "rows": ["2"]},
            {
                "name": "model.layers.{layer}.experts",
                "kind": "experts",
                "rows": ["4", "64"],
                "columns": "128",
                "names": ["w1", "w2", "w3"],
            },
        ],
    }
)
CONFIG = {
    "architectures": ["Small"],
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
FP8_CHANNEL = FP8 | {"strategy": "channel"}
FP8_BLOCK = FP8 | {"strategy": "block", "block_structure": [64, 64]}
PER_TOKEN = FP8 | {"strategy": "token", "dynamic": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
QKV, O_PROJ, EXPERTS = (f"model.layers.0.{name}" for name in ("qkv_proj", "o_proj", "experts"))


def group(weights: object, form: str, *targets: str, inputs: object = None) -> dict[str, Any]:
    return {
        "weights": weights,
        "input_activations": inputs,
        "format": form,
        "targets": list(targets or ("Linear",)),
    }


def config(*groups: Mapping[str, Any], ignore: object = (), **keys: object) -> dict[str, Any]:
    named = {f"group_{number}": each for number, each in enumerate(groups)}
    return {"config_groups": named, "ignore": list(ignore), **keys}  # type: ignore[call-overload]


def nvfp4(**keys: Any) -> dict[str, Any]:
    return config(group(NVFP4, "nvfp4-pack-quantized"), **keys)


def packed(weights: object, *targets: str) -> dict[str, Any]:
    return config(group(weights, "pack-quantized", *targets))


def fp8(weights: object, inputs: object, *targets: str) -> dict[str, Any]:
    return config(group(weights, "float-quantized", *targets, inputs=inputs))


def parameters(quantization: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return the parameters of vLLM's model. Raises LoadRefused and Unknown."""
    settings = Settings(ROWS, CONFIG)
    model = build(ROWS, settings, CompressedTensors.parse(quantization, 4, 2))
    return {each.name: each for each in model.parameters()}


def below(name: str, quantization: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtypes and shapes of a module's parameters."""
    found = parameters(quantization).items()
    return {
        key.removeprefix(f"{name}.").removeprefix("routed_experts."): (each.dtype, each.shape)
        for key, each in found
        if key.startswith(f"{name}.")
    }


def refusal(quantization: Mapping[str, Any]) -> str:
    with pytest.raises(LoadRefused) as refused:
        parameters(quantization)
    return str(refused.value)


def outcome(quantization: Mapping[str, Any], *tensors: Loaded) -> Outcome:
    settings = Settings(ROWS, CONFIG)
    return load(lambda: build(ROWS, settings, CompressedTensors.parse(quantization, 4, 2)), tensors)
