"""The part of vLLM's model that one of several ranks builds, and what the ranks cannot share."""

from collections.abc import Iterable
from typing import Any

import pytest

from compressed import CONFIG, FP8_BLOCK, INT4, PER_TOKEN, ROWS
from mquant.loader_model.vllm.layers import Linear
from mquant.loader_model.vllm.methods.compressed_tensors import CompressedTensors
from mquant.loader_model.vllm.methods.fp8 import Fp8
from mquant.loader_model.vllm.model import Method, Model, build
from mquant.loader_model.vllm.tensors import LoadRefused
from mquant.loader_rows import LayerRow, Settings, VllmRows

LAYER = "model.layers.0"


def compressed(weights: dict[str, Any], **group: Any) -> Method:
    form = "float-quantized" if weights["type"] == "float" else "pack-quantized"
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, **group}}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    return CompressedTensors.parse(config, 4, 2)


def fp8(block: int) -> Method:
    return Fp8.parse({"activation_scheme": "dynamic", "weight_block_size": [block, block]})


def of_rank(ranks: int, method: Method | None = None) -> Model:
    """Return what one of several ranks builds of a model with q, k, v (128, 64, 64), o and experts
    of 64; k and v have two heads."""
    return build(ROWS, Settings(ROWS, CONFIG), method, ranks)


def rows_of(layers: Iterable[LayerRow]) -> VllmRows:
    """Return the rows of the same model with other layers."""
    return VllmRows.model_validate({**ROWS.model_dump(), "layers": tuple(layers)})


def shapes(model: Model) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return the rows and columns of each linear layer."""
    return {
        layer.name.rpartition(".")[2]: (layer.outputs, layer.inputs)
        for layer in model.layers
        if isinstance(layer, Linear)
    }


def refusal(ranks: int, method: Method) -> str:
    with pytest.raises(LoadRefused) as caught:
        of_rank(ranks, method)
    return str(caught.value)


def test_ranks_share_outputs_of_q_k_v_and_inputs_of_o() -> None:
    assert shapes(of_rank(1)) == {"qkv_proj": ((128, 64, 64), 128), "o_proj": ((128,), 128)}
    assert shapes(of_rank(2)) == {"qkv_proj": ((64, 32, 32), 128), "o_proj": ((128,), 64)}


def test_of_fewer_kv_heads_than_ranks_several_ranks_have_the_same() -> None:
    assert shapes(of_rank(4))["qkv_proj"] == ((32, 32, 32), 128)


def test_ranks_share_every_expert() -> None:
    (experts,) = (layer for layer in of_rank(4).layers if layer.class_name == "RoutedExperts")
    parameters = [
        (each.name.rpartition(".")[2], each.shape) for each in experts.parameters.values()
    ]
    assert parameters == [("w13_weight", (4, 32, 128)), ("w2_weight", (4, 128, 16))]


def test_a_size_that_ranks_do_not_divide_is_refused() -> None:
    assert refusal(3, None) == (  # type: ignore[arg-type]
        f"{LAYER}.qkv_proj: writes a part of 128, which 3 does not divide"
    )


@pytest.mark.parametrize("made", ["compressed-tensors", "fp8"])
def test_a_rank_holds_whole_blocks_of_fp8(made: str) -> None:
    blocks = {**FP8_BLOCK, "block_structure": [32, 32]}
    small = fp8(32) if made == "fp8" else compressed(blocks, input_activations=PER_TOKEN)
    of_rank(2, small)
    large = fp8(64) if made == "fp8" else compressed(FP8_BLOCK, input_activations=PER_TOKEN)
    of_rank(1, large)
    assert refusal(2, large) == f"{LAYER}.qkv_proj: writes 32, no multiple of 64"


def test_blocks_of_fp8_experts_are_made_smaller_down_to_32() -> None:
    """vLLM 0.32 does so for the method `fp8` alone."""
    rows = rows_of(ROWS.layers[-1:])

    def build_experts(ranks: int, method: Method) -> Model:
        return build(rows, Settings(rows, CONFIG), method, ranks)

    build_experts(2, fp8(64))
    with pytest.raises(LoadRefused, match="has intermediate size 16, which blocks of 64"):
        build_experts(4, fp8(64))
    with pytest.raises(LoadRefused, match="has gate and up that 64 does not divide"):
        build_experts(2, compressed(FP8_BLOCK, input_activations=PER_TOKEN))


def test_a_rank_holds_whole_groups_of_integers() -> None:
    of_rank(2, compressed(INT4))
    assert refusal(4, compressed(INT4)) == (
        f"{LAYER}.experts: has matrices that groups of 32 do not fill"
    )
    assert refusal(2, compressed({**INT4, "group_size": 128})) == (
        f"{LAYER}.o_proj: has 64 columns, which groups of 128 do not fill"
    )


def test_layers_that_ranks_do_not_split_are_whole() -> None:
    rows = rows_of(row.model_copy(update={"split": False}) for row in ROWS.layers)
    model = build(rows, Settings(rows, CONFIG), None, 2)
    assert shapes(model) == shapes(of_rank(1))
