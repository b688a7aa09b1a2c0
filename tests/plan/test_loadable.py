"""A plan is refused, before a weight is read, if vLLM would not load the output."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from make import write_json
from mquant.checkpoint import CONFIG_NAME, Folder, open_checkpoint, read_json
from mquant.family_files import load_families
from mquant.findings import Finding
from mquant.plan import make_bf16_plan, make_plan
from mquant.plan.loadable import checked
from mquant.recipe import load_recipes
from mquant.synth import Precision, synth
from plan.planning import Make, planned, refusal

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


def test_a_family_that_does_not_say_what_vllm_builds_is_not_judged(make: Make) -> None:
    family = FAMILIES["minimax_m2"].model_copy(update={"vllm": None})
    checkpoint = open_checkpoint(Folder(make(config={"num_experts": 256})))

    plan = make_plan(checkpoint, load_recipes()["nvfp4"], {family.name: family})

    assert plan.findings == ()


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8_BLOCK])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_shipped_recipe_makes_what_vllm_would_not_load(
    tmp_path: Path, name: str, precision: Precision
) -> None:
    checkpoint = open_checkpoint(
        Folder(synth(tmp_path / "src", FAMILIES[name], precision=precision).path)
    )
    for recipe in load_recipes().values():
        rules = {finding.rule for finding in make_plan(checkpoint, recipe, FAMILIES).findings}
        assert "output-not-loadable" not in rules, recipe.name
