"""Experts without a gate: what vLLM 0.32 builds of them, and for which names vLLM asks."""

from typing import Any

import pytest

from mquant.family_files import load_families
from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.methods.choose import read_method
from mquant.loader_model.vllm.tensors import Copies, Loaded

NAME = "model.layers.1.mixer.experts"
CONFIGS: tuple[tuple[dict[str, Any], str, int], ...] = (
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "weight_scale", 64),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}, "weight_scale_2", 32),
)


def experts() -> Experts:
    """Return the experts of a layer, each with up and down only."""
    names = ("up_proj", "down_proj")
    return Experts(NAME, NAME, "RoutedExperts", count=2, hidden=64, intermediate=32, names=names)


def test_up_fills_the_first_parameter_alone() -> None:
    layer, copies = experts(), Copies()
    layer.build(None)
    for number in range(2):
        layer.load(copies, f"{number}.up_proj.weight", Loaded("up", "BF16", (32, 64)), None)
        layer.load(copies, f"{number}.down_proj.weight", Loaded("down", "BF16", (64, 32)), None)

    assert not any(parameter.missing for parameter in layer.parameters.values())


def test_a_tensor_of_all_experts_has_the_name_of_up() -> None:
    layer, copies = experts(), Copies()
    layer.build(None)
    layer.load(copies, "up_proj", Loaded("up", "BF16", (2, 32, 64)), None)
    layer.load(copies, "down_proj", Loaded("down", "BF16", (2, 64, 32)), None)

    assert not any(parameter.missing for parameter in layer.parameters.values())


@pytest.mark.parametrize(("config", "scale", "columns"), CONFIGS)
def test_every_method_makes_parameters_of_up_alone(
    config: dict[str, Any], scale: str, columns: int
) -> None:
    method, layer = read_method({"quantization_config": config}, None, (4, 2)), experts()
    assert method
    method.fused = {}
    layer.build(method.experts(layer))

    assert layer.parameters["w13_weight"].shape == (2, 32, columns)
    assert layer.parameters[f"w13_{scale}"].shape == (2, 1)


def test_vllm_asks_for_a_third_matrix_named_none() -> None:
    family = load_families()["nemotron_h"]

    assert experts().asked == ("up_proj", "down_proj", "None")
    assert family.third_in_vllm("backbone.layers.1.mixer.experts.0.up_proj") == f"{NAME}.0.None"
    assert family.third_in_vllm("backbone.layers.1.mixer.up_proj") == "model.layers.1.mixer.up_proj"
