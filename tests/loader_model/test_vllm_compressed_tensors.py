"""Which layers vLLM 0.32 quantizes under compressed-tensors, and with which parameters."""

import pytest

from compressed import (
    EXPERTS,
    FP8,
    FP8_BLOCK,
    FP8_CHANNEL,
    INT4,
    NVFP4,
    O_PROJ,
    PER_TOKEN,
    QKV,
    below,
    config,
    fp8,
    group,
    nvfp4,
    outcome,
    packed,
    parameters,
    refusal,
)
from mquant.loader_model.vllm.tensors import Loaded, Unknown

PLAIN = {"weight": ("BF16", (128, 128))}


def test_nvfp4_has_codes_group_scales_and_a_global_scale_for_each_fused_matrix() -> None:
    assert below(QKV, nvfp4()) == {
        "weight_packed": ("U8", (256, 64)),
        "weight_global_scale": ("F32", (3,)),
        "weight_scale": ("F8_E4M3", (256, 8)),
    }


def test_nvfp4_activations_add_an_input_scale_that_must_be_loaded() -> None:
    both = config(group(NVFP4, "nvfp4-pack-quantized", inputs=NVFP4 | {"dynamic": "local"}))

    assert not parameters(both)[f"{QKV}.input_global_scale"].optional
    assert not parameters(both)[f"{EXPERTS}.routed_experts.w2_input_global_scale"].optional


def test_experts_with_plain_activations_have_an_input_scale_that_nothing_reads() -> None:
    assert parameters(nvfp4())[f"{EXPERTS}.routed_experts.w13_input_global_scale"].optional


def test_nvfp4_experts_hold_gate_above_up() -> None:
    assert below(EXPERTS, nvfp4()) == {
        "w13_weight_packed": ("U8", (4, 128, 64)),
        "w2_weight_packed": ("U8", (4, 128, 32)),
        "w13_weight_scale": ("F8_E4M3", (4, 128, 8)),
        "w2_weight_scale": ("F8_E4M3", (4, 128, 4)),
        "w13_weight_global_scale": ("F32", (4, 2)),
        "w2_weight_global_scale": ("F32", (4,)),
        "w13_input_global_scale": ("F32", (4, 2)),
        "w2_input_global_scale": ("F32", (4,)),
    }


def test_nvfp4_weights_take_no_other_activations() -> None:
    assert "NVFP4" in refusal(config(group(NVFP4, "nvfp4-pack-quantized", inputs=PER_TOKEN)))


def test_asymmetric_nvfp4_is_no_scheme() -> None:
    asymmetric = group(NVFP4 | {"symmetric": False}, "nvfp4-pack-quantized")

    assert refusal(config(asymmetric))


@pytest.mark.parametrize(
    ("weights", "shape"),
    [(FP8, (3,)), (FP8_CHANNEL, (256, 1)), (FP8_BLOCK, (4, 2))],
    ids=["tensor", "channel", "block"],
)
def test_fp8_scales_are_per_matrix_channel_or_block(
    weights: object, shape: tuple[int, ...]
) -> None:
    found = below(QKV, fp8(weights, PER_TOKEN, "re:.*proj"))

    assert found["weight"] == ("F8_E4M3", (256, 128))
    assert found["weight_scale"] == ("F32", shape)
    assert "input_scale" not in found


def test_static_fp8_activations_have_a_scale_for_each_fused_matrix() -> None:
    assert below(QKV, fp8(FP8, FP8, "re:.*proj"))["input_scale"] == ("F32", (3,))


def test_blocks_must_divide_every_fused_matrix_but_the_last() -> None:
    high = FP8 | {"strategy": "block", "block_structure": [128, 64]}

    assert QKV in refusal(fp8(high, PER_TOKEN, "re:.*proj"))
    ragged = FP8 | {"strategy": "block", "block_structure": [96, 64]}
    assert below(O_PROJ, fp8(ragged, PER_TOKEN, "re:.*o_proj"))["weight_scale"] == ("F32", (2, 2))


def test_blocks_take_no_static_activations() -> None:
    assert "blocks" in refusal(fp8(FP8_BLOCK, FP8, "re:.*proj"))


def test_linear_layers_take_fp8_weights_with_plain_activations_and_experts_do_not() -> None:
    assert below(O_PROJ, fp8(FP8_CHANNEL, None, "re:.*o_proj"))["weight"][0] == "F8_E4M3"
    assert EXPERTS in refusal(fp8(FP8_CHANNEL, None))


def test_fp8_experts_want_channels_with_tokens_or_tensors_with_tensors() -> None:
    assert below(EXPERTS, fp8(FP8_CHANNEL, PER_TOKEN))["w2_weight_scale"] == ("F32", (4, 128, 1))
    assert below(EXPERTS, fp8(FP8, FP8))["w13_input_scale"] == ("F32", (4,))
    assert EXPERTS in refusal(fp8(FP8, PER_TOKEN))


def test_the_last_blocks_of_experts_may_be_cut_but_gate_may_not() -> None:
    wide = FP8 | {"strategy": "block", "block_structure": [64, 48]}
    high = FP8 | {"strategy": "block", "block_structure": [48, 64]}

    assert below(EXPERTS, fp8(wide, PER_TOKEN, "RoutedExperts"))["w13_weight_scale"][1] == (4, 2, 3)
    assert "divide" in refusal(fp8(high, PER_TOKEN, "RoutedExperts"))


def test_mx_formats_have_a_byte_of_scale_for_32_weights() -> None:
    mxfp4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    mxfp8 = mxfp4 | {"num_bits": 8, "scale_dtype": "torch.uint8"}

    assert below(QKV, packed(mxfp4, "re:.*proj"))["weight_packed"] == ("U8", (256, 64))
    assert below(EXPERTS, packed(mxfp8))["w2_weight_scale"] == ("U8", (4, 128, 2))
    with pytest.raises(Unknown, match="depend on the GPU"):
        parameters(config(group(mxfp4, "mxfp4-pack-quantized", inputs=PER_TOKEN)))


def test_mx_scales_are_bytes_and_lose_their_meaning_as_e8m0() -> None:
    mxfp4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    scale = Loaded(f"{O_PROJ}.weight_scale", "F8_E8M0", (128, 4))

    read = outcome(packed(mxfp4, "re:.*o_proj"), scale)

    assert read.converted == ((scale.name, "F8_E8M0", "U8"),)


def test_integers_are_packed_along_a_row() -> None:
    assert below(QKV, packed(INT4)) == {
        "weight_packed": ("I32", (256, 16)),
        "weight_scale": ("BF16", (256, 4)),
        "weight_shape": ("I64", (2,)),
    }
    assert below(QKV, packed(INT4 | {"num_bits": 3}))["weight_packed"] == ("I32", (256, 12))


def test_wider_integers_keep_their_values() -> None:
    codes = Loaded(f"{O_PROJ}.weight_packed", "I64", (128, 16))
    assert outcome(packed(INT4, "re:.*o_proj"), codes).converted == ()


def test_zero_points_are_packed_along_the_outputs() -> None:
    found = packed(INT4 | {"symmetric": False})

    assert below(QKV, found)["weight_zero_point"] == ("I32", (32, 4))
    assert below(EXPERTS, found)["w2_weight_zero_point"] == ("I32", (4, 16, 2))


def test_int8_has_a_float_scale_for_each_channel_and_experts_want_dynamic_activations() -> None:
    int8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
    token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    static = {"num_bits": 8, "type": "int", "symmetric": False}
    dynamic = config(group(int8, "int-quantized", inputs=token))

    assert below(O_PROJ, dynamic)["weight_scale"] == ("F32", (128, 1))
    assert below(EXPERTS, dynamic)["w13_weight"] == ("I8", (4, 128, 128))
    assert below(O_PROJ, config(group(int8, "int-quantized", "re:.*proj", inputs=static)))[
        "input_zero_point"
    ] == ("I8", (1,))
    assert EXPERTS in refusal(config(group(int8, "int-quantized", inputs=static)))


def test_groups_must_fill_a_row() -> None:
    assert "groups of 48" in refusal(packed(INT4 | {"group_size": 48}, "re:.*proj"))
    assert "groups of 128" in refusal(packed(INT4 | {"group_size": 128}, "RoutedExperts"))


def test_embeddings_are_taken_as_packed_integers_only() -> None:
    assert below("model.embed", packed(INT4, "model.embed")) == {
        "weight_packed": ("I32", (64, 16)),
        "weight_scale": ("BF16", (64, 4)),
        "weight_shape": ("I64", (2,)),
    }
    assert "embeddings" in refusal(
        config(group(NVFP4, "nvfp4-pack-quantized", "VocabParallelEmbedding"))
    )


def test_a_head_is_quantized_where_a_target_names_it_and_not_by_linear() -> None:
    named = config(group(NVFP4, "nvfp4-pack-quantized", "Linear", "re:.*lm_head$"))

    assert below("lm_head", nvfp4())["weight"] == ("BF16", (64, 128))
    assert below("lm_head", named)["weight_packed"] == ("U8", (64, 64))


def test_a_head_of_bits_that_no_linear_layer_takes_is_packed_as_embeddings_are() -> None:
    wide = INT4 | {"num_bits": 16}

    assert below("lm_head", packed(wide, "lm_head"))["weight_packed"] == ("I32", (64, 64))
    assert "16 bits" in refusal(packed(wide, "re:.*o_proj"))


def test_a_name_wins_over_a_class_whatever_the_order() -> None:
    groups = group(NVFP4, "nvfp4-pack-quantized"), group(INT4, "pack-quantized", "re:.*o_proj")

    assert below(O_PROJ, config(*groups)) == below(O_PROJ, packed(INT4))


def test_of_two_names_the_first_wins() -> None:
    first = group(INT4, "pack-quantized", "re:.*o_proj")
    second = group(NVFP4, "nvfp4-pack-quantized", O_PROJ)

    assert below(O_PROJ, config(first, second)) == below(O_PROJ, packed(INT4))


def test_a_class_matches_if_the_target_is_in_its_name_in_any_case() -> None:
    assert below(O_PROJ, packed(INT4, "rowparallel")) == below(O_PROJ, packed(INT4))
    assert below(O_PROJ, packed(INT4, "QKVParallelLinear")) == PLAIN


def test_expressions_are_anchored_at_the_start_only() -> None:
    assert below(O_PROJ, packed(INT4, "re:o_proj")) == PLAIN
    assert below(O_PROJ, packed(INT4, "re:.*o_pr")) == below(O_PROJ, packed(INT4))


def test_a_fused_layer_is_quantized_if_each_matrix_has_a_target() -> None:
    some = packed(INT4, "re:.*q_proj", "re:.*k_proj")
    every = packed(INT4, "re:.*q_proj", "re:.*k_proj", "re:.*v_proj")

    assert below(QKV, some)["weight"] == ("BF16", (256, 128))
    assert below(QKV, every) == below(QKV, packed(INT4))


def test_a_fused_layer_is_ignored_as_a_whole_or_not_at_all() -> None:
    assert "only some" in refusal(nvfp4(ignore=["re:.*q_proj"]))
    assert below(QKV, nvfp4(ignore=["re:.*[qkv]_proj"]))["weight"] == ("BF16", (256, 128))
    assert below(QKV, nvfp4(ignore=[QKV]))["weight"] == ("BF16", (256, 128))


def test_ignore_names_layers_and_never_classes() -> None:
    assert below(O_PROJ, nvfp4(ignore=["Linear", "RowParallelLinear"])) == below(O_PROJ, nvfp4())


def test_experts_are_ignored_by_the_matrices_of_the_first_expert() -> None:
    ignored = nvfp4(ignore=["re:.*experts.0.*"])

    assert below(EXPERTS, ignored)["w2_weight"] == ("BF16", (4, 128, 64))
    assert below(EXPERTS, nvfp4(ignore=[EXPERTS])) == below(EXPERTS, nvfp4())
    assert "different schemes" in refusal(nvfp4(ignore=["re:.*experts.0.w2"]))


def test_linear_stands_for_experts_unless_a_target_is_their_class() -> None:
    groups = (
        group(NVFP4, "nvfp4-pack-quantized"),
        group(INT4, "pack-quantized", "RoutedExperts"),
    )

    assert below(EXPERTS, config(*groups)) == below(EXPERTS, packed(INT4))


def test_names_in_the_config_are_renamed_as_tensors_are() -> None:
    matrices = [f"{EXPERTS}.0.{name}" for name in ("gate_proj.", "w2", "w3")]
    named = nvfp4(ignore=[matrices[0].removesuffix(".") + ".", *matrices[1:]])

    assert "different schemes" in refusal(named)  # a rename wants the dot after the name
    assert below(EXPERTS, nvfp4(ignore=[f"{EXPERTS}.0.{name}" for name in ("w1", "w2", "w3")]))[
        "w2_weight"
    ] == ("BF16", (4, 128, 64))
