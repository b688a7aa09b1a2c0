"""vLLM 0.32 parses a ModelOpt config, and builds the parameters of each layer after the config."""

from typing import Any

import pytest

from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.layers import Attention, Embedding, Linear, Qkv, Row
from mquant.loader_model.vllm.methods.modelopt import ModelOpt, parse
from mquant.loader_model.vllm.tensors import Copies, Kind, Loaded, LoadRefused, Parameter, Unknown

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
QKV, DOWN = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"
EXPERTS = "model.layers.0.mlp.experts"


def method(algo: str, name: str = "modelopt_fp4", **values: Any) -> ModelOpt:
    """Return the method of a flat config, for a model whose class has a mapper of names."""
    return ready(parse(name, {"quant_method": name, "quant_algo": algo, **values}))


def mixed(layers: dict[str, Any], **values: Any) -> ModelOpt:
    """Return the method of a mixed config."""
    return method("MIXED_PRECISION", "modelopt_mixed", quantized_layers=layers, **values)


def ready(made: ModelOpt) -> ModelOpt:
    """Tell a method the names of a model, as `build` does."""
    made.fused, made.renames = FUSED, ()
    return made


def qkv(prefix: str = QKV) -> Qkv:
    """Return an attention layer of 64 + 32 + 32 rows and 256 columns."""
    return Qkv(prefix, prefix, outputs=(64, 32, 32), inputs=256)


def row(prefix: str = DOWN, inputs: int = 256) -> Row:
    """Return a linear layer of 128 rows."""
    return Row(prefix, prefix, outputs=(128,), inputs=inputs)


def experts() -> Experts:
    """Return four experts, 128 wide, of a model 256 wide."""
    return Experts(EXPERTS, EXPERTS, count=4, hidden=256, intermediate=128)


def facts(parameters: Any) -> dict[str, tuple[Any, ...]]:
    """Return the dtype and shape of each parameter."""
    return {each.name: (each.dtype, each.shape) for each in parameters}


def quantizes(made: ModelOpt, layer: Linear) -> bool:
    """Return whether the layer is quantized."""
    return made.linear(layer) is not None


# --- parsing


@pytest.mark.parametrize(
    ("name", "algo"),
    [
        ("modelopt", "NVFP4"),
        ("modelopt_fp4", "NVFP4_AWQ"),
        ("modelopt_fp4", "FP8"),
        ("modelopt_mxfp8", "FP8"),
        ("modelopt_mixed", "W4A8_AWQ"),
        ("modelopt", ""),
    ],
)
def test_an_algorithm_that_the_method_does_not_know_is_refused(name: str, algo: str) -> None:
    with pytest.raises(LoadRefused, match="quant_algo"):
        method(algo, name)


def test_a_nested_nvfp4_config_must_say_what_is_excluded() -> None:
    nested: dict[str, Any] = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None}

    with pytest.raises(LoadRefused, match="exclude_modules"):
        parse("modelopt_fp4", {"quantization": nested})
    parse("modelopt_fp4", {"quantization": {**nested, "exclude_modules": []}})


def test_a_nested_config_reads_exclude_modules_and_a_flat_one_ignore() -> None:
    nested: dict[str, Any] = {"group_size": 16, "kv_cache_quant_algo": None, "ignore": [DOWN]}
    nested |= {"quant_algo": "NVFP4", "exclude_modules": []}

    assert quantizes(ready(parse("modelopt_fp4", {"quantization": nested})), row())
    assert quantizes(method("NVFP4", exclude_modules=[DOWN]), row())
    assert not quantizes(method("NVFP4", ignore=[DOWN]), row())


@pytest.mark.parametrize(
    "values",
    [{"ignore": None}, {"ignore": "lm_head"}, {"group_size": "a"}, {"group_size": [16]}],
)
def test_a_value_of_another_type_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(LoadRefused, match="quantization config"):
        method("NVFP4", **values)


@pytest.mark.parametrize("group", [0, -16])
def test_a_group_size_that_makes_no_shape_is_refused_with_the_layer(group: int) -> None:
    with pytest.raises(LoadRefused, match=DOWN):
        method("NVFP4", group_size=group).linear(row())


def test_nvfp4_without_activations_in_any_group_is_w4a16() -> None:
    groups: dict[str, Any] = {"group_0": {"weights": {}, "input_activations": None}}
    scale = {each.name: each for each in method("NVFP4", config_groups=groups).linear(row()) or ()}

    assert scale["input_scale"].optional


def test_minimaxs_mxfp8_config_names_its_list_ignored_layers() -> None:
    made = ready(parse("mxfp8", {"quant_method": "mxfp8", "ignored_layers": [DOWN]}))

    assert quantizes(made, qkv()) and not quantizes(made, row())


# --- what is excluded


@pytest.mark.parametrize(
    "entry",
    [QKV, "self_attn", "model.layers.0*", "*.qkv_proj", "model.layers.?.self_attn.*", "l", ""],
)
def test_a_layer_is_excluded_by_its_name_a_part_of_it_or_a_glob(entry: str) -> None:
    assert not quantizes(method("NVFP4", ignore=[entry]), qkv())


@pytest.mark.parametrize("entry", ["model.layers.1*", "re:.*qkv_proj", "layers.0.self_attn.?"])
def test_other_entries_exclude_nothing(entry: str) -> None:
    assert quantizes(method("NVFP4", ignore=[entry]), qkv())


def test_a_fused_layer_is_excluded_by_the_names_of_all_its_parts() -> None:
    parts = [QKV.replace("qkv_proj", part) for part in FUSED["qkv_proj"]]

    assert not quantizes(method("NVFP4", ignore=parts), qkv())
    with pytest.raises(LoadRefused, match=f"{QKV}: has parts that are excluded"):
        method("NVFP4", ignore=parts[:2]).linear(qkv())


def test_a_star_after_a_module_also_stands_for_the_module() -> None:
    parts = [QKV.replace("qkv_proj", part) + "*" for part in FUSED["qkv_proj"]]

    assert not quantizes(method("NVFP4", ignore=parts), qkv())


def test_a_class_without_a_mapper_takes_a_star_as_it_is() -> None:
    made = method("NVFP4", ignore=[QKV.replace("qkv_proj", part) + "*" for part in ("q_proj",)])
    made.renames = None

    assert quantizes(made, qkv())


def test_experts_are_excluded_by_any_entry_that_holds_their_name() -> None:
    assert method("NVFP4", ignore=[f"{EXPERTS}.0.down_proj"]).experts(experts()) is None


def test_an_entry_that_is_no_text_is_refused() -> None:
    with pytest.raises(LoadRefused, match="no string"):
        method("NVFP4", ignore=["lm_head", None]).linear(row())


# --- linear layers


def test_nvfp4_builds_packed_weights_and_two_scales_of_them() -> None:
    assert facts(method("NVFP4", group_size=16).linear(qkv())) == {
        "weight": ("U8", (128, 128)),
        "weight_scale": ("F8_E4M3", (128, 16)),
        "weight_scale_2": ("F32", (3,)),
        "input_scale": ("F32", (3,)),
    }


def test_fp8_builds_a_scale_for_each_matrix() -> None:
    made = method("FP8", "modelopt").linear(qkv())

    assert facts(made) == {
        "weight": ("F8_E4M3", (128, 256)),
        "weight_scale": ("F32", (3,)),
        "input_scale": ("F32", (3,)),
    }


def test_fp8_per_channel_builds_a_scale_for_each_row() -> None:
    made = method("FP8_PER_CHANNEL_PER_TOKEN", "modelopt").linear(row())

    assert facts(made)["weight_scale"] == ("F32", (128,))


def test_fp8_in_blocks_builds_scales_of_four_dimensions() -> None:
    made = method("FP8_PB_WO", "modelopt")

    assert facts(made.linear(row()))["weight_scale"] == ("F32", (1, 1, 2, 1))
    with pytest.raises(LoadRefused, match="128 does not divide"):
        made.linear(row(inputs=192))


def test_mxfp8_builds_bytes_for_scales() -> None:
    made = method("MXFP8", "modelopt_mxfp8")

    assert facts(made.linear(row()))["weight_scale"] == ("U8", (128, 8))
    with pytest.raises(LoadRefused, match="32 does not divide"):
        made.linear(row(inputs=48))


def test_nvfp4_needs_inputs_in_sixteens() -> None:
    with pytest.raises(LoadRefused, match="16 does not divide"):
        method("NVFP4").linear(row(inputs=24))


def test_the_head_is_quantized_unless_excluded_and_the_embeddings_never() -> None:
    head = Embedding("lm_head", "lm_head", vocabulary=100, inputs=256)
    table = Embedding("model.embed_tokens", "model.embed_tokens", vocabulary=100, inputs=256)

    assert facts(method("NVFP4").embedding(head, head=True))["weight"] == ("U8", (128, 128))
    assert method("NVFP4", ignore=["lm_head"]).embedding(head, head=True) is None
    assert method("NVFP4").embedding(table, head=False) is None


# --- experts


def loaded_experts(algo: str, name: str) -> Experts:
    """Return experts with the parameters of an algorithm."""
    layer = experts()
    layer.build(method(algo, name).experts(layer))
    return layer


def test_nvfp4_experts_have_a_scale_of_the_scales_for_gate_and_for_up() -> None:
    layer = experts()
    made: list[Parameter] = list(method("NVFP4").experts(layer) or ())

    assert layer.layout == "modelopt"
    assert facts(made) == {
        "w13_weight": ("U8", (4, 256, 128)),
        "w2_weight": ("U8", (4, 256, 64)),
        "w13_weight_scale": ("F8_E4M3", (4, 256, 16)),
        "w2_weight_scale": ("F8_E4M3", (4, 256, 8)),
        "w13_weight_scale_2": ("F32", (4, 2)),
        "w2_weight_scale_2": ("F32", (4,)),
        "w13_input_scale": ("F32", (4, 2)),
        "w2_input_scale": ("F32", (4,)),
    }


@pytest.mark.parametrize("algo", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"])
def test_experts_in_any_fp8_have_one_scale_for_each_matrix(algo: str) -> None:
    made = facts(method(algo, "modelopt").experts(experts()))

    assert made["w13_weight_scale"] == ("F32", (4, 2))
    assert made["w13_input_scale"] == ("F32", (4,))


def test_gate_and_up_fill_their_own_place_of_a_pair_of_scales() -> None:
    layer, copies = loaded_experts("NVFP4", "modelopt_fp4"), Copies()
    for name in ("gate_proj", "up_proj"):
        for suffix in ("weight_scale_2", "input_scale"):
            layer.load(copies, f"1.{name}.{suffix}", Loaded(suffix, "F32", ()), None)

    assert layer.parameters["w13_weight_scale_2"].missing == 6
    assert layer.parameters["w13_input_scale"].missing == 6


def test_scales_of_rows_are_no_vector() -> None:
    layer = loaded_experts("NVFP4", "modelopt_fp4")

    with pytest.raises(LoadRefused, match="not rows"):
        layer.load(Copies(), "0.up_proj.weight_scale", Loaded("a", "F8_E4M3", (16,)), None)


# --- the KV cache


def test_attention_always_has_scales_of_the_cache_which_may_be_missing() -> None:
    scales = list(method("NVFP4").attention(Attention("a", "a", "Attention"), 8))

    assert [each.name for each in scales] == ["q_scale", "k_scale", "v_scale", "prob_scale"]
    assert all(each.optional and each.kind is Kind.PLAIN for each in scales)


def test_a_mixed_config_has_scales_of_the_cache_if_the_cache_has_an_algorithm() -> None:
    layers = {DOWN: {"quant_algo": "FP8"}}
    scheme = {"num_bits": 8, "type": "float"}
    attention = Attention("a", "a", "Attention")

    assert not list(mixed(layers).attention(attention, 8))
    assert list(mixed(layers, kv_cache_scheme=scheme).attention(attention, 8))
    latent = Attention("a", "a", "MLAAttention")
    assert not list(mixed(layers, kv_cache_scheme=scheme).attention(latent, 8))


@pytest.mark.parametrize(
    "cache",
    [{"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, {"kv_cache_quant_algo": "NVFP4"}],
)
def test_latent_attention_keeps_no_cache_in_nvfp4(cache: dict[str, Any]) -> None:
    made = method("NVFP4", **cache)

    assert made.attention(Attention("a", "a", "Attention"), 8)
    with pytest.raises(LoadRefused, match="latent attention"):
        made.attention(Attention("a", "a", "MLAAttention"), 8)


# --- MIXED_PRECISION


def test_a_mixed_config_names_the_algorithm_of_each_layer() -> None:
    made = mixed({DOWN: {"quant_algo": "fp8"}})

    assert facts(made.linear(row()))["weight"] == ("F8_E4M3", (128, 256))
    assert not quantizes(made, qkv())


def test_a_fused_layer_has_the_algorithm_of_its_parts() -> None:
    layers = {
        QKV.replace("qkv_proj", part): {"quant_algo": "NVFP4"} for part in ("k_proj", "v_proj")
    }

    assert quantizes(mixed(layers), qkv())
    layers[QKV.replace("qkv_proj", "q_proj")] = {"quant_algo": "FP8"}
    with pytest.raises(LoadRefused, match="has parts in FP8 and NVFP4"):
        mixed(layers).linear(qkv())


@pytest.mark.parametrize("name", [EXPERTS, f"{EXPERTS}.3.up_proj", "model.layers.0.mlp.up_proj"])
def test_experts_have_the_algorithm_of_an_entry_below_or_beside_them(name: str) -> None:
    made = mixed({name: {"quant_algo": "W4A16_NVFP4"}}).experts(experts())

    assert facts(made)["w13_weight"] == ("U8", (4, 256, 128))


def test_experts_in_blocks_of_fp8_are_those_of_the_method_fp8() -> None:
    layers = {EXPERTS: {"quant_algo": "FP8_PB_WO", "group_size": 64}}

    assert facts(mixed(layers).experts(experts()))["w2_weight_scale_inv"] == ("F32", (4, 4, 2))
    with pytest.raises(LoadRefused, match="no one group_size"):
        mixed({**layers, DOWN: {"quant_algo": "FP8_BLOCK_SCALES"}})


def test_a_mixed_config_takes_the_group_size_of_its_first_nvfp4_layer() -> None:
    made = mixed({"a": {"quant_algo": "NVFP4", "group_size": 32}, DOWN: {"quant_algo": "NVFP4"}})

    assert facts(made.linear(row()))["weight_scale"] == ("F8_E4M3", (128, 8))


@pytest.mark.parametrize("layers", [{}, None, ["a"], {DOWN: None}, {DOWN: {"quant_algo": 8}}])
def test_quantized_layers_that_vllm_cannot_read_are_refused(layers: Any) -> None:
    with pytest.raises(LoadRefused, match="has no quant"):
        mixed(layers)


def test_an_entry_without_an_algorithm_is_refused_with_its_layer() -> None:
    with pytest.raises(LoadRefused, match=f"no quant_algo for {DOWN}"):
        mixed({DOWN: {"group_size": 16}}).linear(row())


def test_what_is_not_modelled_is_not_judged() -> None:
    q8 = {"quant_algo": "Q8_0", "group_size": 32, "block_payload_bytes": 34, "packing": "ggml"}

    with pytest.raises(Unknown, match="Q8_0"):
        mixed({DOWN: q8}).linear(row())
