"""A plan gives every tensor one action, and lists every kept matrix in ignore."""

import json
from pathlib import Path
from typing import Any

import pytest

from make import make_checkpoint
from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_rows import Role
from mquant.plan import Plan, natural
from mquant.recipe import KeptLayers, Recipe, find_recipe
from plan.planning import own_recipe, planned

# --- actions


def test_every_source_tensor_has_exactly_one_action(src: Path) -> None:
    plan = planned(src, shard_bytes=20_000)

    tensors = open_checkpoint(Folder(src)).tensors
    assert sorted(action.source.name for action in plan.actions) == sorted(tensors)


def test_nvfp4_quantizes_experts_and_attention_and_copies_the_rest(src: Path) -> None:
    kinds = {(action.role, action.kind) for action in planned(src).actions}

    assert kinds == {
        (Role.EXPERT, "quantize"),
        (Role.ATTENTION, "quantize"),
        (Role.ROUTER, "copy"),
        (Role.ROUTING_BIAS, "copy"),
        (Role.EMBEDDING, "copy"),
        (Role.HEAD, "copy"),
        (Role.NORM, "copy"),
    }


def awq(*roles: Role, **options: Any) -> Recipe:
    scheme = dict.fromkeys(roles, "NVFP4A16")
    return Recipe(name="mine", suffix="MINE", smoothing="awq", roles=scheme, **options)


NORMS_AND_GATE = ("input_layernorm", "post_attention_layernorm", "block_sparse_moe.gate")


@pytest.mark.parametrize(
    ("recipe", "scaled"),
    [
        (awq(Role.EXPERT, Role.ATTENTION), {0: NORMS_AND_GATE, 1: NORMS_AND_GATE}),
        (awq(Role.EXPERT), {0: NORMS_AND_GATE[1:], 1: NORMS_AND_GATE[1:]}),
        (awq(Role.ATTENTION), {0: NORMS_AND_GATE[:1], 1: NORMS_AND_GATE[:1]}),
        (awq(Role.ATTENTION, keep_layers=KeptLayers(first=1)), {1: NORMS_AND_GATE[:1]}),
    ],
)
def test_awq_scales_the_norm_before_quantized_weights_and_the_router_that_reads_it(
    src: Path, recipe: Recipe, scaled: dict[int, tuple[str, ...]]
) -> None:
    actions = [action for action in planned(src, recipe).actions if action.kind == "scale"]

    assert {action.module for action in actions} == {
        f"model.layers.{layer}.{name}" for layer, names in scaled.items() for name in names
    }
    for action in actions:
        (output,) = action.outputs
        source = action.source
        assert (output.name, output.dtype, output.shape) == (
            source.name,
            source.dtype,
            source.shape,
        )
        assert action.reason == "not quantized, but scaled by AWQ"


def test_a_copied_tensor_keeps_name_dtype_and_shape_and_says_why(src: Path) -> None:
    copied = [action for action in planned(src).actions if action.kind == "copy"]

    for action in copied:
        (output,) = action.outputs
        kept = (action.source.name, action.source.dtype, action.source.shape)
        assert (output.name, output.dtype, output.shape) == kept
        assert action.output_bytes == action.source.nbytes
        assert action.reason
    assert {a.source.dtype for a in copied if a.role in (Role.ROUTER, Role.ROUTING_BIAS)} == {"F32"}


def test_a_role_the_recipe_leaves_out_is_copied_because_the_recipe_keeps_it(src: Path) -> None:
    plan = planned(src, own_recipe(Role.EXPERT))

    assert {a.reason for a in plan.actions if a.role is Role.ATTENTION} == {"mine keeps it"}


def test_a_quantized_tensor_becomes_packed_codes_scales_and_a_global_scale(src: Path) -> None:
    (action,) = [a for a in planned(src).actions if a.module.endswith("layers.1.self_attn.k_proj")]

    assert action.source.shape == (32, 64)
    assert [(o.name, o.dtype, o.shape, o.nbytes) for o in action.outputs] == [
        ("model.layers.1.self_attn.k_proj.weight_packed", "U8", (32, 32), 1024),
        ("model.layers.1.self_attn.k_proj.weight_scale", "F8_E4M3", (32, 4), 128),
        ("model.layers.1.self_attn.k_proj.weight_global_scale", "F32", (1,), 4),
    ]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_weights_of_any_float_are_quantized(tmp_path: Path, dtype: str) -> None:
    plan = planned(make_checkpoint(tmp_path / "src", dtype=dtype))

    assert plan.findings == ()
    assert {a.source.dtype for a in plan.actions if a.scheme} == {dtype}


# --- ignore and config


def test_ignore_names_every_matrix_that_is_kept_in_natural_order(tmp_path: Path) -> None:
    plan = planned(make_checkpoint(tmp_path / "src", layers=12, experts=2))

    assert plan.ignore == (
        "lm_head",
        "model.embed_tokens",
        *(f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(12)),
    )


def test_ignore_names_attention_if_the_recipe_keeps_attention(src: Path) -> None:
    plan = planned(src, own_recipe(Role.EXPERT))

    assert {name for name in plan.ignore if ".self_attn." in name} == {
        f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkvo"
    }


def test_ignore_has_no_regular_expressions(src: Path) -> None:
    assert not [name for name in planned(src).ignore if name.startswith("re:")]


def test_quantization_config_targets_linear_with_the_ignore_list(src: Path) -> None:
    plan = planned(src)
    config = plan.quantization_config

    assert list(config["config_groups"]) == ["group_0"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["config_groups"]["group_0"]["input_activations"] is None
    assert config["ignore"] == list(plan.ignore)
    assert config["format"] == "nvfp4-pack-quantized"
    assert config["quantization_status"] == "compressed"
    json.dumps(config)


@pytest.mark.parametrize(
    "names",
    [
        ["layers.2", "layers.10"],
        ["a", "a.1", "a.1.b", "b"],
        ["lm_head", "model.x"],
        ["y", "\u00b2"],
    ],
)
def test_natural_order_puts_layer_two_before_layer_ten(names: list[str]) -> None:
    assert sorted(sorted(names), key=natural) == names


# --- fingerprint


def test_equal_plans_have_equal_fingerprints_in_any_folder(tmp_path: Path) -> None:
    one, other = (make_checkpoint(tmp_path / name) for name in ("a", "b"))

    assert planned(one).fingerprint == planned(other).fingerprint


def test_equal_decisions_of_recipes_have_equal_fingerprints(src: Path) -> None:
    assert (
        planned(src).fingerprint
        == planned(src, own_recipe(Role.EXPERT, Role.ATTENTION)).fingerprint
    )


def test_another_recipe_shard_size_or_source_has_another_fingerprint(
    src: Path, tmp_path: Path
) -> None:
    wider = make_checkpoint(tmp_path / "wider", intermediate=48, shards=3)
    halves = make_checkpoint(tmp_path / "halves", dtype="F16", shards=3)
    kept = "model.layers.0.self_attn.o_proj"
    prints = {
        planned(src).fingerprint,
        planned(src, own_recipe(Role.EXPERT)).fingerprint,
        planned(src, own_recipe(Role.EXPERT, Role.ATTENTION, ignore=(kept,))).fingerprint,
        planned(src, shard_bytes=20_000).fingerprint,
        planned(wider).fingerprint,
        planned(halves).fingerprint,
    }

    assert len(prints) == 6


def test_a_shard_size_that_changes_no_shard_keeps_the_fingerprint(src: Path) -> None:
    assert planned(src).fingerprint == planned(src, shard_bytes=10**9).fingerprint


# --- several schemes


def groups_of(plan: Plan) -> dict[str, list[str]]:
    groups = plan.quantization_config["config_groups"].values()
    return {group["weights"]["strategy"]: group["targets"] for group in groups}


def test_each_of_several_schemes_targets_its_modules_by_the_names_of_every_loader(
    src: Path,
) -> None:
    plan = planned(src, find_recipe("nvfp4-fp8"))

    targets = groups_of(plan)
    assert targets["channel"] == [rf"re:model\.layers\.\d+\.self_attn\.{p}_proj$" for p in "qkvo"]
    assert targets["tensor_group"][:3] == [
        r"re:model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w1$",
        r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.w1$",
        r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.gate_proj$",
    ]
    assert plan.quantization_config["format"] == "mixed-precision"


def test_a_single_scheme_targets_all_linear_layers(src: Path) -> None:
    plan = planned(src, find_recipe("fp8-dynamic"))

    assert groups_of(plan) == {"channel": ["Linear"]}
    assert plan.quantization_config["format"] == "float-quantized"


def test_layers_at_the_ends_are_kept_and_ignored_by_name(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", layers=4, experts=2)
    ends = Recipe.model_validate(
        {
            "name": "mine",
            "suffix": "MINE",
            "roles": {"expert": "NVFP4A16"},
            "keep_layers": {"first": 1, "last": 2},
        }
    )
    plan = planned(src, ends)

    assert {action.layer for action in plan.actions if action.scheme} == {1}
    (reason,) = {a.reason for a in plan.actions if a.role is Role.EXPERT and not a.scheme}
    assert reason == "mine keeps the layers at the ends"
    experts = [entry for entry in plan.ignore if "experts" in entry and "layers.3" in entry]
    assert experts == [
        *(f"model.layers.3.block_sparse_moe.experts.{e}.w{m}" for e in (0, 1) for m in (1, 2, 3)),
        *(f"model.layers.3.mlp.experts.0.w{m}" for m in (1, 2, 3)),
    ]


def test_fp8_has_a_scale_for_every_row_or_block_in_the_weights_dtype(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", hidden=256, intermediate=128, heads=8, head_dim=64)
    shapes = {}
    for recipe in ("fp8-dynamic", "fp8-block"):
        outputs = [o for a in planned(src, find_recipe(recipe)).actions for o in a.outputs]
        shapes[recipe] = {
            o.name.split("experts.0.")[1]: (o.dtype, o.shape)
            for o in outputs
            if "layers.0.block_sparse_moe.experts.0.w2" in o.name
        }

    assert shapes["fp8-dynamic"] == {
        "w2.weight": ("F8_E4M3", (256, 128)),
        "w2.weight_scale": ("BF16", (256, 1)),
    }
    assert shapes["fp8-block"] == {
        "w2.weight": ("F8_E4M3", (256, 128)),
        "w2.weight_scale": ("BF16", (2, 1)),
    }
