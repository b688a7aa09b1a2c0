"""What vLLM 0.32 makes of a quantization config of compressed-tensors, on a model of one layer."""

from collections.abc import Mapping
from typing import Any

import pytest

from mquant.loader_model.vllm.load import Outcome, load
from mquant.loader_model.vllm.methods.compressed_tensors import CompressedTensors
from mquant.loader_model.vllm.model import build
from mquant.loader_model.vllm.tensors import Loaded, LoadRefused, Parameter, Unknown
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
    assert below(O_PROJ, fp8(high, PER_TOKEN, "re:.*o_proj"))["weight_scale"] == ("F32", (1, 2))


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


def test_integers_are_packed_along_a_row() -> None:
    assert below(QKV, packed(INT4)) == {
        "weight_packed": ("I32", (256, 16)),
        "weight_scale": ("BF16", (256, 4)),
        "weight_shape": ("I64", (2,)),
    }
    assert below(QKV, packed(INT4 | {"num_bits": 3}))["weight_packed"] == ("I32", (256, 12))


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


@pytest.mark.parametrize(
    "weights",
    [
        None,
        NVFP4 | {"scales": "fp8"},
        NVFP4 | {"group_size": None},
        FP8 | {"group_size": 16},
        FP8 | {"strategy": "block"},
        FP8 | {"strategy": "token"},
        FP8 | {"num_bits": 6},
        FP8 | {"scale_dtype": "torch.float9"},
        FP8 | {"strategy": "channel", "dynamic": True},
        FP8 | {"dynamic": "local"},
        FP8 | {"type": "complex"},
        INT4 | {"actorder": "group"},
        INT4 | {"actorder": "dynamic"},
        INT4 | {"actorder": True},
        INT4 | {"group_size": "32x"},
    ],
    ids=str,
)
def test_arguments_that_compressed_tensors_or_vllm_refuses(weights: object) -> None:
    assert "config.json" in refusal(packed(weights))


@pytest.mark.parametrize(
    "weights",
    [
        INT4 | {"strategy": None},
        INT4 | {"num_bits": "4", "type": "INT", "strategy": "Group"},
        INT4 | {"actorder": "static", "observer": "mse", "observer_kwargs": {"a": 1}},
    ],
    ids=str,
)
def test_arguments_that_are_inferred_and_coerced(weights: object) -> None:
    assert below(QKV, packed(weights)) == below(QKV, packed(INT4))


def test_integers_with_quantized_activations_need_input_activations() -> None:
    assert "without input_activations" in refusal(config(group(INT4, "int-quantized")))


def test_the_groups_format_wins_over_the_global_one() -> None:
    one = group(INT4, "pack-quantized")
    other = {**one, "format": None}

    assert below(QKV, config(one, format="dense")) == below(QKV, packed(INT4))
    assert below(QKV, config(other, format="pack-quantized")) == below(QKV, packed(INT4))
    assert refusal(config(other, format="dense"))


def test_a_group_for_attention_alone_is_passed_over_unread() -> None:
    attention = {"targets": ["SmallAttention"], "weights": "no table"}

    assert below(O_PROJ, config(attention, group(INT4, "pack-quantized"))) == below(
        O_PROJ, packed(INT4)
    )


def test_unknown_keys_of_a_group_and_of_the_config_are_allowed() -> None:
    assert below(O_PROJ, config({**group(INT4, "pack-quantized"), "new": 1}, new=1)) == below(
        O_PROJ, packed(INT4)
    )


def test_sparsity_is_refused_where_it_has_targets() -> None:
    assert "sparsity" in refusal(nvfp4(sparsity_config={"format": "x", "targets": ["Linear"]}))
    assert below(O_PROJ, nvfp4(sparsity_config={"format": "dense"})) == below(O_PROJ, nvfp4())


def test_transforms_of_activations_are_not_judged() -> None:
    apply = [{"targets": "Linear", "location": "input"}]

    with pytest.raises(Unknown):
        parameters(nvfp4(transform_config={"config_groups": {"a": {"type": "x", "apply": apply}}}))


def test_attention_takes_scales_of_the_kv_cache_that_no_checkpoint_needs() -> None:
    scale = Loaded("model.layers.0.attn.k_scale", "F32", (1,))
    plain = outcome(config(), scale)

    assert not plain.dropped
    assert not any("attn" in name for name, _ in plain.unset)


@pytest.mark.parametrize(
    "change", [{"num_bits": 4}, {"type": "int"}, {"strategy": "channel"}, {"symmetric": False}]
)
def test_the_kv_cache_is_symmetric_fp8_per_tensor_or_head(change: dict[str, object]) -> None:
    assert "kv_cache_scheme" in refusal(nvfp4(kv_cache_scheme=CACHE | change))
    assert parameters(nvfp4(kv_cache_scheme=CACHE | {"strategy": "attn_head"}))


def test_per_head_query_scales_are_reduced_to_kv_heads() -> None:
    heads = config(kv_cache_scheme=CACHE | {"strategy": "attn_head"})
    query = Loaded("model.layers.0.attn.q_scale", "F32", (4, 1, 1))
    key = Loaded("model.layers.0.attn.k_scale", "F32", (2, 1, 1))

    assert outcome(heads, query, key).dropped == (query.name,)


def test_an_expression_that_python_and_vllm_cannot_read_is_refused_where_it_is_reached() -> None:
    bad = group(NVFP4, "nvfp4-pack-quantized", "re:.*o_proj", "re:(")

    assert "expression" in refusal(nvfp4(ignore=["re:("]))
    assert "expression" in refusal(config(bad))


def test_an_expression_that_only_vllm_reads_is_not_judged() -> None:
    with pytest.raises(Unknown):
        parameters(nvfp4(ignore=["re:[[:alpha:]]+"]))


def test_an_expression_that_never_ends_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mquant.name_patterns.TIME_LIMIT", 0.3)

    with pytest.raises(Unknown):
        parameters(nvfp4(ignore=["re:(([a-z.0-9_]+)+)+$!"]))
