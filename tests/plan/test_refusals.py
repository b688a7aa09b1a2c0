"""`mquant.plan` refuses a recipe whose checkpoint loaders would refuse, by name and with a fix."""

from pathlib import Path

import pytest
import yaml

from make import without
from mquant.family_rows import Role
from mquant.findings import Finding
from mquant.recipe import Recipe, find_recipe, load_recipe
from plan.planning import ATTENTION, MOE, Make, own_recipe, planned, refusal, swapped


def card(tmp_path: Path, ignore: str) -> Recipe:
    """Return an llmcompressor recipe, as published model cards have one."""
    path = tmp_path / "card.yaml"
    path.write_text(
        "quant_stage:\n  quant_modifiers:\n    QuantizationModifier:\n"
        f"      targets: [Linear]\n      scheme: NVFP4A16\n      ignore: {ignore}\n"
    )
    return load_recipe(path)


# --- recipes that quantize modules that loaders refuse

SAFE = r"[lm_head, model.embed_tokens, 're:model\.layers\.\d+\.block_sparse_moe\.gate$']"
UNSAFE_FIX = f"Use ignore: {SAFE} (or --allow-unsafe to do so anyway)."


def test_ignoring_lm_head_alone_would_quantize_every_router(make: Make, tmp_path: Path) -> None:
    assert refusal(make(layers=62, experts=2), card(tmp_path, "[lm_head]")) == Finding(
        "router-quantized",
        "error",
        "model.layers.0.block_sparse_moe.gate",
        "Recipe card would quantize 62 routers (model.layers.0.block_sparse_moe.gate, "
        "model.layers.1.block_sparse_moe.gate and 60 more); vLLM 0.32 refuses such a checkpoint.",
        UNSAFE_FIX,
    )


def test_the_ignore_list_of_the_fix_leads_to_a_sound_plan(make: Make, tmp_path: Path) -> None:
    src = make()
    fix = refusal(src, card(tmp_path, "[lm_head]")).fix
    ignore = fix.removeprefix("Use ignore: ").removesuffix(" (or --allow-unsafe to do so anyway).")

    plan = planned(src, card(tmp_path, ignore))

    assert plan.findings == ()
    assert plan.ignore == planned(src).ignore


def test_the_fix_keeps_the_recipes_own_ignore_list(make: Make, tmp_path: Path) -> None:
    own = r"['re:.*\.layers\.0\..*', \"it's, odd\", lm_head]".replace('\\"', '"')
    findings = planned(make(), card(tmp_path, own)).findings

    (finding,) = [finding for finding in findings if finding.rule == "router-quantized"]

    listed = finding.fix.removeprefix("Use ignore: ").partition(" (or --allow")[0]
    assert yaml.safe_load(listed) == [
        "it's, odd",
        "lm_head",
        "model.embed_tokens",
        r"re:.*\.layers\.0\..*",
        r"re:model\.layers\.\d+\.block_sparse_moe\.gate$",
    ]


def test_allow_unsafe_turns_a_quantized_router_into_a_warning(make: Make, tmp_path: Path) -> None:
    plan = planned(make(), card(tmp_path, "[lm_head]"), allow_unsafe=True)

    assert plan.refusals == ()
    assert [(finding.rule, finding.severity) for finding in plan.findings] == [
        ("router-quantized", "warning")
    ]
    assert {a.kind for a in plan.actions if a.role is Role.ROUTER} == {"quantize"}
    assert "model.layers.0.block_sparse_moe.gate" not in plan.ignore


def test_a_recipe_that_ignores_nothing_would_quantize_lm_head_too(
    make: Make, tmp_path: Path
) -> None:
    router, head = planned(make(), card(tmp_path, "[]")).refusals

    assert router.rule == "router-quantized"
    assert head == Finding(
        "head-quantized",
        "error",
        "lm_head",
        "Recipe card would quantize 1 output head (lm_head); vLLM 0.32 refuses such a checkpoint.",
        UNSAFE_FIX,
    )


def test_a_recipe_that_quantizes_the_embeddings_is_refused(make: Make) -> None:
    assert refusal(make(), own_recipe(Role.EXPERT, Role.EMBEDDING)) == Finding(
        "embedding-quantized",
        "error",
        "model.embed_tokens",
        "Recipe mine would quantize 1 embedding (model.embed_tokens); vLLM 0.32 refuses such "
        "a checkpoint.",
        UNSAFE_FIX,
    )


@pytest.mark.parametrize("allow_unsafe", [False, True])
def test_allow_unsafe_does_not_allow_missing_tensors(make: Make, *, allow_unsafe: bool) -> None:
    src = make(edit=without("model.norm"))

    assert len(planned(src, allow_unsafe=allow_unsafe).refusals) == 1


# --- tensors that the scheme cannot store


def test_a_shape_that_16_does_not_divide_is_refused(make: Make) -> None:
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"

    assert refusal(make(intermediate=40)) == Finding(
        "not-quantizable",
        "error",
        name,
        f"{name} is [64, 40]: 40 columns do not divide into groups of 16 (and 7 more like it).",
        "Leave expert out of the recipe's roles, or list all such modules in ignore.",
    )


def test_rows_need_not_be_a_multiple_of_16(make: Make) -> None:
    assert planned(make(vocab=50, heads=2, head_dim=16, experts=3)).findings == ()


def test_blocks_of_128_must_not_span_two_members_of_a_fused_set(make: Make) -> None:
    src = make(hidden=256, intermediate=128, heads=8, head_dim=32)
    name = "model.layers.0.self_attn.k_proj.weight"

    assert refusal(src, find_recipe("fp8-block")) == Finding(
        "not-quantizable",
        "error",
        name,
        f"{name} is [64, 256]: 64 rows do not divide into blocks of 128, and loaders put another "
        "matrix below them (and 1 more like it).",
        "Leave attention out of the recipe's roles, or list all such modules in ignore.",
    )


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "F64"])
def test_a_weight_of_another_dtype_is_refused(make: Make, dtype: str) -> None:
    name = f"{ATTENTION}.o_proj.weight"

    assert refusal(make(edit=swapped(name, dtype, (64, 64)))) == Finding(
        "not-quantizable",
        "error",
        name,
        f"{name} is {dtype}; NVFP4A16 is made from BF16, F16 or F32.",
        "Leave attention out of the recipe's roles, or list all such modules in ignore.",
    )


@pytest.mark.parametrize(
    ("role", "name", "shape", "more"),
    [
        (Role.NORM, "model.layers.0.input_layernorm.weight", [64], 8),
        (Role.ROUTING_BIAS, "model.layers.0.block_sparse_moe.e_score_correction_bias", [4], 1),
    ],
)
def test_a_recipe_that_asks_for_vectors_is_refused(
    make: Make, role: Role, name: str, shape: list[int], more: int
) -> None:
    finding = refusal(make(), own_recipe(Role.EXPERT, role))

    assert (finding.rule, finding.message, finding.fix) == (
        "not-quantizable",
        f"{name} is {shape}; NVFP4A16 needs the weight matrix of a layer "
        f"(and {more} more like it).",
        f"Leave {role} out of the recipe's roles, or list all such modules in ignore.",
    )


@pytest.mark.parametrize(
    ("kept", "name", "members"),
    [
        (f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj.weight",
         f"{ATTENTION}.k_proj, {ATTENTION}.q_proj, {ATTENTION}.v_proj"),
        (f"{MOE}.experts.2.w3", f"{MOE}.experts.2.w1.weight",
         f"{MOE}.experts.2.w1, {MOE}.experts.2.w3"),
    ],
)  # fmt: skip
def test_a_fused_set_that_ignore_splits_is_refused(
    make: Make, kept: str, name: str, members: str
) -> None:
    assert refusal(make(), own_recipe(Role.EXPERT, Role.ATTENTION, ignore=(kept,))) == Finding(
        "fused-set-mixed",
        "error",
        name,
        f"{members} are one matrix to loaders, but the recipe keeps only {kept}.",
        "Quantize all members of the set, or list all of them in ignore.",
    )


def test_one_plain_expert_among_quantized_experts_is_refused(make: Make) -> None:
    kept = f"re:{MOE}.experts.2."
    assert refusal(make(), own_recipe(Role.EXPERT, Role.ATTENTION, ignore=(kept,))) == Finding(
        "experts-mixed",
        "error",
        f"{MOE}.experts.2.w1",
        f"The recipe keeps {MOE}.experts.2.w1, {MOE}.experts.2.w2, {MOE}.experts.2.w3 of layer 1 "
        "and quantizes its other experts; vLLM refuses such a checkpoint.",
        "Quantize all experts of a layer, or list all of them in ignore.",
    )


def test_kept_experts_are_also_ignored_by_vllms_names(make: Make) -> None:
    ignore = planned(make(), own_recipe(Role.ATTENTION)).ignore
    assert f"{MOE}.experts.0.w1" in ignore
    assert "model.layers.1.mlp.experts.0.w1" in ignore


@pytest.mark.parametrize(
    "recipe", [own_recipe(), own_recipe(Role.OTHER), own_recipe(Role.EXPERT, ignore=("re:",))]
)
def test_a_recipe_that_quantizes_nothing_is_refused(make: Make, recipe: Recipe) -> None:
    assert refusal(make(), recipe) == Finding(
        "nothing-to-quantize",
        "error",
        "mine",
        "Recipe mine quantizes no tensor of this checkpoint.",
        "Check the recipe's roles, targets and ignore.",
    )
