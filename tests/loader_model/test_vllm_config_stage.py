"""What transformers 5.19 and vLLM 0.32 refuse of a config.json, for the families that ship."""

from typing import Any

import pytest

from config_stages import DROP, FAMILIES, config_of, each_family, judge
from mquant.loader_model.vllm.config_names import built_as
from mquant.loader_model.vllm.model import build
from mquant.loader_model.vllm.predict import predict_of
from mquant.loader_model.vllm.tensors import Loaded, LoadRefused
from mquant.loader_rows import Settings


@each_family
def test_the_configs_of_the_releases_are_taken(family: str) -> None:
    assert judge(family) == "taken"


@pytest.mark.parametrize("own", [32, DROP])
def test_another_class_builds_the_heads_of_deepseek_in_the_size_of_the_rotated_part(
    own: object,
) -> None:
    config = config_of("deepseek_v3", architectures=["LlamaForCausalLM"], head_dim=own)
    read_as = FAMILIES["deepseek_v3"].vllm
    size = Settings(built_as(config, read_as), config, read_as).number("head_dim")
    assert size == (config["qk_rope_head_dim"] if own is DROP else own)


@pytest.mark.parametrize("rows", [256, 320])
def test_a_head_on_disk_is_loaded_whatever_tie_word_embeddings_says(rows: int) -> None:
    config = config_of("llama", tie_word_embeddings=True)
    sizes = (rows, config["hidden_size"])
    outcome = predict_of(config, FAMILIES["llama"], [Loaded("lm_head.weight", "BF16", sizes)])
    assert (outcome.refused is None) == (rows == config["vocab_size"])


# --- types, as transformers' strict classes check them


@each_family
@pytest.mark.parametrize("value", ["2", 2.5, 2.0, True, None, [2], {}])
def test_a_count_is_a_whole_number(family: str, value: object) -> None:
    assert judge(family, hidden_size=value).startswith("refused: says hidden_size")


@each_family
@pytest.mark.parametrize("value", [1, "0.00001", None])
def test_a_number_with_a_point_is_not_written_without(family: str, value: object) -> None:
    rows = FAMILIES[family].vllm
    assert rows
    key = next(key for key in rows.types["float"] if key.endswith(("norm_eps", "norm_epsilon")))
    assert judge(family, **{key: value}).startswith(f"refused: says {key}")


@each_family
@pytest.mark.parametrize("value", [0, 1, "false", None])
def test_a_switch_is_true_or_false(family: str, value: object) -> None:
    assert judge(family, tie_word_embeddings=value).startswith("refused: says tie_word")


@each_family
def test_a_key_that_is_left_out_has_a_default(family: str) -> None:
    assert judge(family, rms_norm_eps=DROP, vocab_size=DROP, eos_token_id=DROP) == "taken"


@each_family
def test_a_key_that_nobody_knows_is_taken_in_any_type(family: str) -> None:
    assert judge(family, a_new_key={"a": [None]}, transformers_version=5) == "taken"


def test_null_is_taken_where_the_class_of_the_family_takes_null() -> None:
    assert judge("llama", head_dim=None, num_key_value_heads=None) == "taken"
    assert judge("qwen3", head_dim=None) == "refused: says head_dim None, not int"
    assert judge("mixtral", num_key_value_heads=None).startswith("refused")
    assert judge("deepseek_v3", num_key_value_heads=None, n_group=None) == "taken"


def test_null_is_refused_where_only_transformers_takes_null() -> None:
    why = judge("deepseek_v3", first_k_dense_replace=None)

    assert why == "refused: says first_k_dense_replace None, not a whole number"


def test_an_alias_is_not_checked_by_transformers_but_by_vllm() -> None:
    assert judge("mixtral", num_local_experts="8").startswith("refused: says num_local_experts")
    assert judge("mixtral", num_experts="x").startswith("refused: says the number of experts")


def test_of_two_names_for_the_experts_the_one_outside_the_class_wins() -> None:
    rows = FAMILIES["qwen3_moe"].vllm
    assert rows is not None

    settings = Settings(rows, config_of("qwen3_moe", num_experts=8, num_local_experts=4))
    assert settings.number("num_local_experts") == 4


# --- what every config class has


@each_family
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", None])
def test_dtypes_of_torch_are_taken(family: str, name: object) -> None:
    assert judge(family, dtype=DROP, torch_dtype=name) == judge(family, dtype=name) == "taken"


@each_family
@pytest.mark.parametrize("name", ["auto", "torch.bfloat16", "BF16", ["bfloat16"]])
def test_other_dtypes_are_refused(family: str, name: object) -> None:
    assert judge(family, dtype=DROP, torch_dtype=name).startswith("refused: says the dtype")


@each_family
def test_dtype_wins_over_torch_dtype(family: str) -> None:
    assert judge(family, torch_dtype="auto", dtype="bfloat16") == "taken"


@each_family
@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": None},
        {"id2label": ["a"]},
        {"id2label": {"a": "b"}},
        {"num_labels": "2"},
        {"layer_types": ["no_attention"]},
        {"layer_types": 4},
        {"per_layer_config": []},
        {"text_config": {}},
        {"quantization_config": "fp8"},
        {"is_encoder_decoder": "maybe"},
        {"output_attentions": True, "attn_implementation": "sdpa"},
        {"model_max_length": "4096"},
        {"max_position_embeddings": 32},
    ],
)
def test_wrong_keys_of_every_class_are_refused(family: str, changes: dict[str, Any]) -> None:
    assert judge(family, **changes).startswith("refused")


@pytest.mark.parametrize("kind", [None, 1, ["llama"]])
def test_a_config_without_a_model_type_is_refused(kind: object) -> None:
    with pytest.raises(LoadRefused, match="model_type"):
        built_as({"model_type": kind}, None)


def test_attention_heads_are_shared_evenly_by_kv_heads() -> None:
    assert judge("qwen3", num_attention_heads=4, num_key_value_heads=3) == (
        "refused: has 4 attention heads for 3 KV heads"
    )
    assert judge("qwen3", num_key_value_heads=0).startswith("refused")
    assert judge("deepseek_v3", num_key_value_heads=3) == "taken"


@pytest.mark.parametrize("kind", ["attn", "expert"])
def test_an_offset_of_jambas_layers_is_below_its_period(kind: str) -> None:
    changes = {f"{kind}_layer_offset": 8}
    assert f"says {kind}_layer_offset 8, which is not below" in judge("jamba", **changes)


def test_glm_reads_the_size_of_heads_without_a_default() -> None:
    outcome = predict_of(config_of("glm4_moe", head_dim=DROP), FAMILIES["glm4_moe"], [])
    assert outcome.refused == ("config.json", "has no head_dim")


def test_only_llama_wants_heads_that_divide_the_hidden_size() -> None:
    numbers = {"hidden_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2}

    assert "does not divide hidden_size" in judge("llama", **numbers, head_dim=32)
    assert judge("mixtral", **numbers, head_dim=32) == "taken"


@pytest.mark.parametrize(
    ("family", "key"), [("mixtral", "num_local_experts"), ("deepseek_v3", "n_routed_experts")]
)
def test_a_model_with_experts_has_at_least_one(family: str, key: str) -> None:
    assert judge(family, **{key: 0}) == "refused: says that there are no experts"


def test_vllm_loads_a_top_k_above_the_number_of_experts() -> None:
    assert judge("mixtral", num_local_experts=4, num_experts_per_tok=5) == "taken"


@pytest.mark.parametrize(
    ("family", "key"), [("qwen3_moe", "decoder_sparse_step"), ("deepseek_v3", "moe_layer_freq")]
)
def test_the_step_between_layers_with_experts_is_not_zero(family: str, key: str) -> None:
    assert judge(family, **{key: 0}).endswith(f"vLLM divides by {key}")


@each_family
def test_sizes_are_not_negative(family: str) -> None:
    assert judge(family, vocab_size=-1) in ("refused: says vocab_size -1",)


@pytest.mark.parametrize("key", ["to_dict", "use_return_dict", "__class__"])
def test_a_key_that_replaces_a_part_of_the_class_is_not_judged(key: str) -> None:
    assert judge("llama", **{key: "x"}) == f"unknown: {key!r} of config.json"


@pytest.mark.parametrize("key", ["index_topk", "vision_config", "head_dtype"])
def test_keys_with_which_vllm_builds_more_are_not_judged(key: str) -> None:
    assert judge("deepseek_v3", **{key: 1}) == f"unknown: {key} of config.json"


# --- sliding windows


@each_family
def test_layer_types_have_a_type_for_every_layer(family: str) -> None:
    rows = FAMILIES[family].vllm
    assert rows is not None
    count = Settings(rows, config_of(family)).number("num_hidden_layers")
    kinds = ["full_attention"] * (count or 0)

    assert judge(family, layer_types=kinds) == "taken"
    assert judge(family, layer_types=[*kinds, "full_attention"]).startswith("refused")
    assert judge(family, layer_types=["x" for _ in kinds]).startswith("refused")


def test_layer_types_that_only_some_classes_take() -> None:
    kinds = ["full_attention", "sliding_attention", "x"]
    assert judge("step3p5", layer_types=kinds) == "taken"  # layer 2 is beyond the last
    assert judge("jamba", layer_types=["mamba"] * 3).startswith("refused")  # a property
    assert judge("nemotron_h", layer_types=["sliding_attention"]).startswith("refused")


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"hybrid_override_pattern": "M*E"}, 3),
        ({"hybrid_override_pattern": DROP}, 4),
        ({"layer_types": ["mamba", "attention"]}, 2),
        ({"layers_block_type": ["mlp"], "num_hidden_layers": DROP}, 1),
    ],
)
def test_a_pattern_of_layers_says_their_number(changes: dict[str, Any], layers: int) -> None:
    rows, config = FAMILIES["nemotron_h"].vllm, config_of("nemotron_h", **changes)
    assert rows
    assert Settings(rows, config).number("num_hidden_layers") == layers
    assert judge("nemotron_h", **changes) == "taken"


def test_a_letter_that_stands_for_no_layer_is_refused() -> None:
    assert judge("nemotron_h", hybrid_override_pattern="MX") == "refused: has a layer of type 'X'"


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"att_impl_type": "MFA"}, "refused: says att_impl_type 'MFA'"),
        ({"att_impl_type": DROP, "need_fp32_gate": DROP}, "taken"),
        ({"partial_rotary_factors": [0.5, 1.0], "swiglu_limits": [0.0, 7.0]}, "taken"),
        ({"partial_rotary_factors": [0.25, 1.0]}, "refused: says partial_rotary_factors"),
        ({"swiglu_limits": [0.0, 5.0]}, "refused: says swiglu_limits"),
        ({"rope_theta": [5e6, 1e4, 1e4]}, "taken"),
        ({"rope_theta": [5e6]}, "refused: says rope_theta"),
        ({"moe_layers_enum": "1,"}, "refused: says moe_layers_enum"),
        ({"architectures": []}, "refused: names no architectures"),
    ],
)
def test_values_that_the_code_of_the_model_does_not_take_are_refused(
    changes: dict[str, Any], verdict: str
) -> None:
    assert judge("step3p5", **changes).startswith(verdict)


def test_old_types_of_layer_are_the_new_ones() -> None:
    old, new = ["mamba", "attention"], ["linear_attention", "full_attention"]

    assert judge("granitemoehybrid", layer_types=old) == "taken"
    assert judge("granitemoehybrid", layer_types=new) == "taken"
    assert judge("granitemoehybrid", layer_types=["mamba", "mlp"]).startswith("refused")


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"mamba_d_head": DROP}, "taken"),
        ({"mamba_d_head": "auto"}, "taken"),
        ({"mamba_d_head": 32}, "refused: says mamba_d_head * mamba_n_heads 512"),
        ({"mamba_n_heads": 3}, "refused: says mamba_n_heads 3"),
        ({"num_local_experts": 0}, "taken"),
        ({"num_local_experts": None}, "refused: says num_local_experts None"),
    ],
)
def test_the_sizes_of_granite_fit_each_other(changes: dict[str, Any], verdict: str) -> None:
    assert judge("granitemoehybrid", **changes).startswith(verdict)


def test_qwen3_takes_a_sliding_window_for_all_layers_or_none() -> None:
    layers = int(config_of("qwen3")["num_hidden_layers"])

    for first, verdict in ((0, "taken"), (layers, "taken"), (1, "refused")):
        changes = {"use_sliding_window": True, "sliding_window": DROP, "max_window_layers": first}
        assert judge("qwen3", **changes).startswith(verdict), first
    assert judge("qwen3", sliding_window=64, max_window_layers=1) == "taken"


def test_llama_needs_the_window_of_layers_with_sliding_attention() -> None:
    kinds = ["sliding_attention"] * int(config_of("llama")["num_hidden_layers"])

    assert judge("llama", layer_types=kinds) == (
        "refused: has sliding attention without sliding_window"
    )
    assert judge("llama", layer_types=kinds, sliding_window=64) == "taken"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_some_families_need_a_layer_with_experts(family: str) -> None:
    rows = FAMILIES[family].vllm
    assert rows is not None
    settings = Settings(rows, config_of(family, num_hidden_layers=0))

    with pytest.raises(LoadRefused, match="no layer has experts"):
        build(rows, settings, None)


def test_a_shared_expert_is_built_where_its_size_is_told() -> None:
    rows = FAMILIES["qwen3_moe"].vllm
    assert rows is not None
    config = config_of("qwen3_moe", shared_expert_intermediate_size=64)

    names = {layer.name for layer in build(rows, Settings(rows, config), None).layers}
    assert "model.layers.0.mlp.shared_expert.down_proj" in names
    assert judge("qwen3_moe", shared_expert_intermediate_size=None).startswith("refused")
