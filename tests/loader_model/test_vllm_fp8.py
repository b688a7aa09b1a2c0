"""vLLM 0.32's method `fp8`: how a config is parsed, and the parameters of each layer."""

from typing import Any

import pytest

from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.layers import Attention, Embedding, Linear, Merged, Qkv, Row
from mquant.loader_model.vllm.methods.fp8 import Fp8
from mquant.loader_model.vllm.tensors import Copies, Kind, Loaded, LoadRefused, Parameter, Unknown

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ATTENTION, EXPERTS = "model.layers.0.self_attn", "model.layers.0.mlp.experts"
BLOCKS = [128, 128]


def method(renames: tuple[tuple[str, str], ...] | None = (), **config: Any) -> Fp8:
    """Return the method of a config, which `build` has told the model's names."""
    made = Fp8.parse({"activation_scheme": "dynamic", "quant_method": "fp8", **config})
    made.fused, made.renames = FUSED, renames
    return made


def qkv() -> Qkv:
    """Return an attention layer of 256 + 128 + 128 rows and 320 columns."""
    name = f"{ATTENTION}.qkv_proj"
    return Qkv(name, name, "QKVParallelLinear", outputs=(256, 128, 128), inputs=320)


def row(name: str = f"{ATTENTION}.o_proj") -> Row:
    """Return a linear layer of 320 rows and 256 columns."""
    return Row(name, name, "RowParallelLinear", outputs=(320,), inputs=256)


def experts(intermediate: int = 128) -> Experts:
    """Return four experts of a model 320 wide."""
    return Experts(
        EXPERTS, EXPERTS, "RoutedExperts", count=4, hidden=320, intermediate=intermediate
    )


def parameters(made: Fp8, layer: Linear | Experts) -> dict[str, Parameter]:
    """Return the parameters that the method creates for a layer; empty for a plain layer."""
    created = made.experts(layer) if isinstance(layer, Experts) else made.linear(layer)
    return {parameter.name: parameter for parameter in created or ()}


def facts(made: Fp8, layer: Linear | Experts) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype and shape of each parameter that the method creates for a layer."""
    return {name: (each.dtype, each.shape) for name, each in parameters(made, layer).items()}


# --- parsing


@pytest.mark.parametrize("scheme", [None, "Dynamic", "none", 1, ["static"]])
def test_activations_are_static_or_dynamic(scheme: object) -> None:
    with pytest.raises(LoadRefused, match="activation_scheme"):
        method(activation_scheme=scheme)


def test_a_config_must_say_its_activation_scheme() -> None:
    with pytest.raises(LoadRefused, match="has no activation_scheme"):
        Fp8.parse({"quant_method": "fp8"})


@pytest.mark.parametrize("block", [[], [128], [128, 128, 1], 128, 0, True, {}, "128"])
def test_a_block_has_two_numbers(block: object) -> None:
    with pytest.raises(LoadRefused, match="not two numbers"):
        method(weight_block_size=block)


def test_static_activations_do_not_go_with_blocks() -> None:
    with pytest.raises(LoadRefused, match="static activations with blocks"):
        method(activation_scheme="static", weight_block_size=BLOCKS)


@pytest.mark.parametrize("block", [[0, 128], [128.0, 128], ["128", "128"], [None, 128], [-1, -1]])
def test_a_block_that_makes_no_shape_is_refused_at_the_first_quantized_layer(block: object) -> None:
    made = method(weight_block_size=block)

    with pytest.raises(LoadRefused, match="o_proj"):
        made.linear(row())


# --- the layers that stay plain


def test_ignored_layers_wins_over_modules_to_not_convert() -> None:
    made = method(ignored_layers=["a"], modules_to_not_convert=[row().name])

    assert parameters(made, row())


@pytest.mark.parametrize("empty", [None, [], {}, ""])
def test_modules_to_not_convert_counts_if_ignored_layers_is_empty(empty: object) -> None:
    made = method(ignored_layers=empty, modules_to_not_convert=[row().name])

    assert not parameters(made, row())


def test_a_name_is_matched_as_a_whole_and_is_no_pattern() -> None:
    made = method(ignored_layers=["o_proj", "model.layers.0", "re:.*o_proj", ATTENTION])

    assert parameters(made, row())


def test_a_fused_layer_stays_plain_by_all_its_parts_or_by_its_own_name() -> None:
    parts = [f"{ATTENTION}.{part}" for part in FUSED["qkv_proj"]]

    assert not parameters(method(ignored_layers=parts), qkv())
    assert not parameters(method(ignored_layers=[qkv().name]), qkv())


def test_a_fused_layer_of_which_a_part_is_ignored_is_refused() -> None:
    with pytest.raises(LoadRefused, match="only some are ignored"):
        method(ignored_layers=[f"{ATTENTION}.q_proj"]).linear(qkv())


@pytest.mark.parametrize("entry", [EXPERTS, f"{EXPERTS}.3.down_proj", f"x.{EXPERTS}"])
def test_experts_stay_plain_if_an_entry_contains_their_name(entry: str) -> None:
    assert not parameters(method(ignored_layers=[entry]), experts())


def test_experts_do_not_stay_plain_by_a_part_of_their_name() -> None:
    assert parameters(method(ignored_layers=["experts", "mlp.experts"]), experts())


def test_a_model_with_a_mapper_renames_the_ignored_layers() -> None:
    made = method((("old.", "model."),), ignored_layers=[row().name.replace("model.", "old.")])

    assert not parameters(made, row())


def test_a_mapper_takes_names_only() -> None:
    with pytest.raises(LoadRefused, match="ignores 5"):
        method((), ignored_layers=[5]).linear(row())


def test_without_a_mapper_only_experts_look_at_entries_that_are_no_names() -> None:
    made = method(None, ignored_layers=[5])

    assert parameters(made, row())
    with pytest.raises(LoadRefused, match="ignores 5"):
        made.experts(experts())


def test_embeddings_and_heads_stay_plain() -> None:
    head = Embedding("lm_head", "lm_head", "ParallelLMHead", vocabulary=64, inputs=64)

    assert method().embedding(head, head=True) is None


# --- parameters


def test_without_blocks_each_matrix_of_a_fused_layer_has_a_scale() -> None:
    assert facts(method(), qkv()) == {
        "weight": ("F8_E4M3", (512, 320)),
        "weight_scale": ("F32", (3,)),
    }
    assert parameters(method(), qkv())["weight_scale"].kind is Kind.SCALES


def test_static_activations_have_an_input_scale_that_the_checkpoint_must_fill() -> None:
    made = method(activation_scheme="static")

    assert facts(made, row())["input_scale"] == ("F32", (1,))
    assert facts(made, experts())["w13_input_scale"] == ("F32", (4,))
    assert not parameters(made, row())["input_scale"].optional


def test_with_blocks_the_scales_are_called_inverse_and_cover_the_last_rows() -> None:
    made = method(weight_block_size=BLOCKS)

    assert facts(made, row()) == {
        "weight": ("F8_E4M3", (320, 256)),
        "weight_scale_inv": ("F32", (3, 2)),
    }


def test_the_parts_of_a_fused_layer_load_into_their_blocks() -> None:
    layer = qkv()
    layer.build(method(weight_block_size=BLOCKS).linear(layer))
    copies = Copies()
    for part, rows in (("q", 2), ("k", 1), ("v", 1)):
        layer.load(copies, "weight_scale_inv", Loaded(part, "F32", (rows, 3)), part)

    assert not layer.parameters["weight_scale_inv"].missing


def test_a_fused_layer_whose_parts_fill_no_blocks_is_refused_as_the_scales_load() -> None:
    layer = Merged("gate_up_proj", "gate_up_proj", outputs=(48, 48), inputs=128)
    layer.build(method(weight_block_size=BLOCKS).linear(layer))

    with pytest.raises(LoadRefused):
        layer.load(Copies(), "weight_scale_inv", Loaded("up", "F32", (1, 1)), 1)


def test_experts_have_a_scale_for_each_matrix_or_block() -> None:
    assert facts(method(), experts()) == {
        "w13_weight": ("F8_E4M3", (4, 256, 320)),
        "w2_weight": ("F8_E4M3", (4, 320, 128)),
        "w13_weight_scale": ("F32", (4, 2)),
        "w2_weight_scale": ("F32", (4,)),
    }
    blocks = facts(method(weight_block_size=BLOCKS), experts())
    assert blocks["w13_weight_scale_inv"] == ("F32", (4, 2, 3))
    assert blocks["w2_weight_scale_inv"] == ("F32", (4, 3, 1))


def test_experts_that_blocks_do_not_divide_get_smaller_blocks_and_repeated_scales() -> None:
    layer = experts(intermediate=192)
    layer.build(method(weight_block_size=BLOCKS).experts(layer))

    assert layer.parameters["w13_weight_scale_inv"].shape == (4, 6, 5)
    assert layer.parameters["w2_weight_scale_inv"].shape == (4, 5, 3)
    with pytest.raises(LoadRefused, match=r"has shape \[4, 6\]"):  # of 2 rows and 3 columns
        layer.load(Copies(), "0.gate_proj.weight_scale_inv", Loaded("gate", "F32", (2, 3)), None)


def test_experts_that_no_block_of_32_divides_are_refused() -> None:
    with pytest.raises(LoadRefused, match="intermediate size 48"):
        method(weight_block_size=BLOCKS).experts(experts(intermediate=48))


def test_experts_stored_as_mxfp4_are_not_known() -> None:
    with pytest.raises(Unknown, match="mxfp4"):
        method(store_dtype="mxfp4").experts(experts())


def test_attention_has_optional_kv_scales_and_latent_attention_has_none() -> None:
    attention = Attention("attn", "attn", "Attention")
    latent = Attention("attn", "attn", "MLAAttention")

    scales = list(method().attention(attention, 8))
    assert [scale.name for scale in scales] == ["q_scale", "k_scale", "v_scale", "prob_scale"]
    assert all(scale.optional and scale.shape == () for scale in scales)
    assert not list(method().attention(latent, 8))
