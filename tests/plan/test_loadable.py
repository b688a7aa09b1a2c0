"""A plan is refused, before a weight is read, if vLLM would not load the output."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from family_cases import DEEP
from make import write_json
from mquant.checkpoint import CONFIG_NAME, Checkpoint, Folder, open_checkpoint, read_json
from mquant.family_files import load_families
from mquant.family_rows import Role
from mquant.findings import Finding
from mquant.plan import make_bf16_plan, make_plan
from mquant.plan.loadable import checked
from mquant.recipe import load_recipes
from mquant.synth import Precision, synth
from plan.planning import Make, own_recipe, planned, refusal

FAMILIES = load_families()
SOURCE_FIX = (
    "Correct config.json of the source: the output gets all its keys (or --allow-unsafe to do so "
    "anyway)."
)


def test_an_alias_that_vllm_prefers_to_the_hub_s_key_is_refused(make: Make) -> None:
    found = refusal(make(config={"num_experts": 256}))

    name = "model.layers.0.block_sparse_moe.e_score_correction_bias"
    assert found == Finding(
        "output-not-loadable",
        "error",
        name,
        f"vLLM 0.32 refuses src in BF16, and so any output: {name} has shape [4], and "
        f"vLLM's {name} takes [256].",
        SOURCE_FIX,
    )


def test_a_routing_bias_that_config_json_switches_off_is_refused(make: Make) -> None:
    found = refusal(make(config={"use_routing_bias": False}))

    name = "model.layers.0.block_sparse_moe.e_score_correction_bias"
    assert (found.rule, found.where, found.fix) == ("output-not-loadable", name, SOURCE_FIX)
    assert found.message.startswith("vLLM 0.32 refuses src in BF16, and so any output: ")


def test_a_key_without_which_vllm_builds_nothing_is_refused(make: Make) -> None:
    found = refusal(make(config={"rotary_dim": ...}))

    assert found.message == (
        "vLLM 0.32 refuses src in BF16, and so any output: config.json says no rotary_dim."
    )


def test_more_experts_for_a_token_than_there_are_is_refused(make: Make) -> None:
    found = refusal(make(experts=8, config={"num_experts_per_tok": 9}))

    assert found == Finding(
        "top-k-beyond-experts",
        "error",
        "config.json",
        "config.json says num_experts_per_tok 9, but a layer has 8 experts.",
        "Correct the number of experts per token in config.json.",
    )


@pytest.mark.parametrize("change", [{"num_experts": 256}, {"num_experts_per_tok": 9}])
def test_allow_unsafe_turns_the_refusal_into_a_warning(make: Make, change: dict[str, Any]) -> None:
    plan = planned(make(config=change), allow_unsafe=True)

    assert plan.refusals == ()
    assert [finding.severity for finding in plan.findings] == ["warning"]


def test_a_list_that_does_not_fit_is_the_recipe_s_fault_if_the_source_loads(make: Make) -> None:
    plan = planned(make())
    declared = {**plan.quantization_config, "ignore": ["re:.*experts.*"]}

    (found,) = checked(replace(plan, declared=declared)).refusals

    assert found.message.startswith("vLLM 0.32 refuses the output of recipe nvfp4: ")
    assert found.fix == (
        "Correct the recipe's roles, targets or ignore (or --allow-unsafe to do so anyway)."
    )


def test_the_source_of_a_dequantization_is_blamed(tmp_path: Path) -> None:
    src = synth(tmp_path / "src", FAMILIES["minimax_m2"], precision=Precision.FP8_BLOCK).path
    config = {**read_json(Folder(src), CONFIG_NAME), "use_routing_bias": False}
    write_json(src / CONFIG_NAME, config)

    (found,) = make_bf16_plan(open_checkpoint(Folder(src)), FAMILIES).refusals

    assert found.rule == "output-not-loadable"
    assert found.fix == "Correct config.json of the source: the output gets all its keys."


def test_a_plan_says_that_it_is_not_known_what_vllm_does(make: Make) -> None:
    plan = planned(make(config={"max_model_len": 4096}))

    assert plan.findings == (
        Finding(
            "output-not-judged",
            "warning",
            "src",
            "Whether vLLM loads the output of recipe nvfp4 is not judged: what vLLM 0.32 makes of "
            "max_model_len of config.json is not known.",
            "Have vLLM itself judge the output of a run: mquant verify OUT --loader vllm",
        ),
    )


def test_a_family_that_does_not_say_what_vllm_builds_is_not_judged(make: Make) -> None:
    family = FAMILIES["minimax_m2"].model_copy(update={"vllm": None})
    checkpoint = open_checkpoint(Folder(make(config={"num_experts": 256})))

    (found,) = make_plan(checkpoint, load_recipes()["nvfp4"], {family.name: family}).findings

    assert (found.rule, found.severity) == ("output-not-judged", "warning")


def changed(
    out: Path, name: str, precision: Precision = Precision.BF16, **config: Any
) -> Checkpoint:
    """Return a tiny checkpoint of a family with other values in config.json."""
    family = FAMILIES[name]
    tiny = {**family.synth.tiny, **config}
    other = family.model_copy(update={"synth": family.synth.model_copy(update={"tiny": tiny})})
    return open_checkpoint(Folder(synth(out, other, precision=precision).path))


def test_quantized_routers_are_no_refusal_where_vllm_loads_them(tmp_path: Path) -> None:
    recipe = own_recipe(Role.EXPERT, Role.ATTENTION, Role.ROUTER)

    plan = make_plan(changed(tmp_path / "src", "qwen3_moe"), recipe, FAMILIES)

    assert plan.findings == (
        Finding(
            "router-quantized",
            "warning",
            "model.layers.0.mlp.gate",
            "Recipe mine would quantize 2 routers (model.layers.0.mlp.gate, "
            "model.layers.1.mlp.gate); vLLM 0.32 loads such a checkpoint, and other loaders may "
            "not.",
            r"Use ignore: [lm_head, model.embed_tokens, 're:model\.layers\.\d+\.mlp\.gate$'].",
        ),
    )


def test_a_quantized_head_is_a_target_by_name_and_loads(make: Make) -> None:
    plan = planned(make(), own_recipe(Role.EXPERT, Role.ATTENTION, Role.HEAD))

    assert plan.quantization_config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert [(found.rule, found.severity) for found in plan.findings] == [
        ("head-quantized", "warning")
    ]


@pytest.mark.parametrize("roles", [(Role.EXPERT,), (Role.MLP,), (Role.EXPERT, Role.ATTENTION)])
def test_lists_name_what_vllm_asks_for_in_a_dense_layer(
    tmp_path: Path, roles: tuple[Role, ...]
) -> None:
    source = changed(tmp_path / "src", "qwen3_moe", mlp_only_layers=[0])

    assert make_plan(source, own_recipe(*roles), FAMILIES).findings == ()


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in DEEP),
    *((name, {"tie_word_embeddings": True}) for name in ("llama", "mixtral", "qwen3")),
    ("nemotron_h", {}),
    ("qwen3_moe", {"tie_word_embeddings": True, "mlp_only_layers": [0]}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("deepseek_v3", {"first_k_dense_replace": 0, "n_shared_experts": 2}),
    ("deepseek_v3", {"first_k_dense_replace": 2, "q_lora_rank": None}),
    ("deepseek_v3", {"num_nextn_predict_layers": 1}),
]


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8_BLOCK])
@pytest.mark.parametrize(("name", "config"), VARIANTS)
def test_no_shipped_recipe_makes_what_vllm_would_not_load(
    tmp_path: Path, name: str, config: dict[str, Any], precision: Precision
) -> None:
    checkpoint = changed(tmp_path / "src", name, precision, **config)
    for recipe in load_recipes().values():
        rules = {finding.rule for finding in make_plan(checkpoint, recipe, FAMILIES).findings}
        assert rules.isdisjoint({"output-not-loadable", "output-not-judged"}), recipe.name


@pytest.mark.parametrize("roles", [(Role.EXPERT,), (Role.ATTENTION,)])
def test_lists_name_what_vllm_asks_for_in_experts_without_a_gate(
    tmp_path: Path, roles: tuple[Role, ...]
) -> None:
    source = changed(tmp_path / "src", "nemotron_h")

    assert make_plan(source, own_recipe(*roles), FAMILIES).findings == ()


def test_what_vllm_cannot_load_of_a_family_is_refused(tmp_path: Path) -> None:
    source = changed(tmp_path / "src", "granitemoehybrid")
    findings = make_plan(source, load_recipes()["nvfp4-w4a4"], FAMILIES).findings

    assert [finding.rule for finding in findings] == ["output-not-loadable"]
    assert "has no parameter input_global_scale" in findings[0].message
