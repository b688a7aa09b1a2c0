"""What vLLM builds and reads by the names in config.json: `architectures` and model_type."""

from typing import Any

import pytest

from config_stages import DROP, FAMILIES, config_of, each_family, judge
from mquant.loader_model.vllm.config_names import built_as, config_class
from mquant.loader_model.vllm.config_stage import check
from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.load import Outcome, load
from mquant.loader_model.vllm.model import build
from mquant.loader_model.vllm.predict import predict_of
from mquant.loader_model.vllm.tensors import Loaded, LoadRefused, Unknown
from mquant.loader_rows import Settings


def test_a_model_type_of_no_known_family_is_not_judged() -> None:
    with pytest.raises(Unknown, match="model_type 'gpt2'"):
        built_as({"model_type": "gpt2"}, None)


@each_family
def test_architectures_are_a_list_of_names(family: str) -> None:
    assert judge(family, architectures="LlamaForCausalLM").startswith("refused")
    assert judge(family, architectures=[1]).startswith("refused")


@each_family
def test_architectures_that_are_not_the_familys_are_not_judged(family: str) -> None:
    assert judge(family, architectures=["GPT2LMHeadModel"]).startswith("unknown")


@each_family
def test_an_architecture_that_vllm_does_not_know_is_refused(family: str) -> None:
    assert judge(family, architectures=["NoSuchModel"]).startswith("refused")


def test_architectures_decide_what_is_built_and_the_model_type_what_is_read() -> None:
    config = {"model_type": "llama", "architectures": ["Qwen3ForCausalLM"]}
    rows = built_as(config, FAMILIES["llama"].vllm)

    assert rows is FAMILIES["qwen3"].vllm


@pytest.mark.parametrize("kind", ["qwen3", "llama", "mixtral", "deepseek_v3"])
def test_an_architecture_finds_its_experts_in_the_config_of_another_model_type(kind: str) -> None:
    config = config_of("qwen3_moe", model_type=kind, norm_topk_prob=True)
    read_as, rows = FAMILIES[kind].vllm, FAMILIES["qwen3_moe"].vllm
    assert read_as is not None
    assert rows is not None
    model = build(rows, Settings(rows, config, read_as), None)
    experts = [layer.count for layer in model.layers if isinstance(layer, Experts)]
    assert experts == [config["num_experts"]] * config["num_hidden_layers"]


def test_an_architecture_with_experts_needs_their_number() -> None:
    config = config_of("qwen3_moe", model_type="qwen3", num_experts=DROP)
    read_as, rows = FAMILIES["qwen3"].vllm, FAMILIES["qwen3_moe"].vllm
    assert read_as is not None
    assert rows is not None
    with pytest.raises(LoadRefused, match="has no num_experts"):
        build(rows, Settings(rows, config, read_as), None)


def test_a_config_class_without_a_family_is_read_too() -> None:
    config = config_of("minimax_m2", model_type="minimax", intermediate_size="64")
    rows, read_as = FAMILIES["minimax_m2"].vllm, config_class("minimax")
    assert built_as(config, read_as) is rows
    with pytest.raises(LoadRefused, match="says intermediate_size '64', not int"):
        check(Settings(rows, config, read_as), rows)


def test_the_types_of_layers_that_another_config_class_makes_are_not_known() -> None:
    config = config_of("qwen3_next", model_type="minimax")
    rows, read_as = FAMILIES["qwen3_next"].vllm, config_class("minimax")
    assert rows is not None
    with pytest.raises(Unknown, match="layer_types"):
        check(Settings(rows, config, read_as), rows)


def test_without_a_number_that_vllm_divides_layers_by_it_divides_by_1() -> None:
    config = config_of("deepseek_v3", model_type="minimax", moe_layer_freq=DROP)
    rows = FAMILIES["deepseek_v3"].vllm
    assert rows is not None
    assert Settings(rows, config, config_class("minimax")).has("moe", 1)


def test_a_model_type_that_vllm_does_not_know_is_refused() -> None:
    with pytest.raises(LoadRefused, match="'no_such_model', which vLLM does not know"):
        built_as({"model_type": "no_such_model"}, None)


def outcome(**changes: Any) -> Outcome:
    """Load one tensor, the head, into a Qwen3 without layers."""
    config = config_of("qwen3", num_hidden_layers=0, hidden_size=64, vocab_size=64, **changes)
    rows = FAMILIES["qwen3"].vllm
    assert rows is not None
    head = Loaded("lm_head.weight", "BF16", (64, 64))
    return load(lambda: build(rows, Settings(rows, config), None), [head])


@pytest.mark.parametrize("named", [DROP, None, [], ["Qwen3Model"]])
def test_vllm_drops_the_head_of_a_model_without_architecture(named: object) -> None:
    bare = outcome(architectures=named)

    assert bare.dropped == ("lm_head.weight",)
    assert "lm_head.weight" not in dict(bare.unset)
    assert not outcome().dropped


def test_a_model_of_a_family_that_this_vllm_does_not_have_is_not_judged() -> None:
    with pytest.raises(Unknown, match="'minimax_m3', which vLLM does not have"):
        built_as({"model_type": "minimax_m3"}, FAMILIES["minimax_m3_vl"].vllm)


def test_a_model_type_whose_code_is_in_the_repo_is_not_judged() -> None:
    config = {"model_type": "no_such_model", "auto_map": {"AutoConfig": "own.Config"}}
    with pytest.raises(Unknown, match="'no_such_model', whose code is in the repo"):
        built_as(config, None)


@pytest.mark.parametrize("name", ["PhiMoEForConditionalGeneration", "PhimoeForCausalLM"])
def test_an_architecture_of_another_task_or_of_transformers_is_not_judged(name: str) -> None:
    assert judge("phimoe", architectures=[name]).startswith("unknown")


def test_an_activation_is_read_by_layers_of_the_text_model_only() -> None:
    config = config_of("qwen3_vl_moe")  # no layer without experts, and a tower
    config = {**config, "text_config": {**config["text_config"], "hidden_act": "swiglu"}}
    assert predict_of(config, FAMILIES["qwen3_vl_moe"], []).refused is None
    dense = {**config, "text_config": {**config["text_config"], "mlp_only_layers": [0]}}
    refused = predict_of(dense, FAMILIES["qwen3_vl_moe"], []).refused
    assert refused == ("config.json", "says hidden_act 'swiglu'")


@pytest.mark.parametrize("key", ["num_heads", "hidden_act"])
def test_null_in_the_config_of_a_tower_is_not_judged(key: str) -> None:
    config = config_of("qwen3_vl_moe")
    outcome = predict_of({**config, "vision_config": {key: None}}, FAMILIES["qwen3_vl_moe"], [])
    assert outcome.unknown == f"vision_config.{key} null"


@pytest.mark.parametrize(
    ("family", "table", "key"),
    [
        ("qwen3_vl_moe", "text_config", "norm_topk_prob"),
        ("minimax_m3_vl", "text_config.sparse_attention_config", "sparse_num_index_heads"),
    ],
)
def test_a_key_that_vllm_reads_without_a_default_must_be_there(
    family: str, table: str, key: str
) -> None:
    config = config_of(family)
    inner = config
    for name in table.split("."):
        inner = inner[name]
    del inner[key]
    outcome = predict_of(config, FAMILIES[family], [])
    assert outcome.refused is not None
    assert key in outcome.refused[1]


@pytest.mark.parametrize(
    ("model_type", "dropped", "loads"),
    [
        ("mistral", (), True),
        ("mistral", ("rms_norm_eps",), False),  # a default of another class
        ("olmoe", (), False),  # vLLM was not asked
    ],
)
def test_a_model_in_the_config_class_of_another_is_judged_if_the_pair_is_proven(
    model_type: str, dropped: tuple[str, ...], loads: bool
) -> None:
    family, config = FAMILIES["llama"], config_of("llama", num_hidden_layers=0)
    sizes = (config["vocab_size"], config["hidden_size"])
    tensors = [
        Loaded(f"{name}.weight", "BF16", sizes) for name in ("model.embed_tokens", "lm_head")
    ]
    tensors.append(Loaded("model.norm.weight", "BF16", sizes[1:]))
    assert predict_of(config, family, tensors).loads
    config = {k: v for k, v in config.items() if k not in dropped} | {"model_type": model_type}
    outcome = predict_of(config, FAMILIES[model_type], tensors)
    assert outcome.loads is loads
    assert outcome.unknown == ("" if loads else "config.json in the config class of another model")
