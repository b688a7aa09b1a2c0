"""A plan gives every tensor one action and every output one place, before a weight is read."""

import gzip
import json
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from make import NUMPY, Row, make_checkpoint, make_config, write_index, write_shard
from make import make_row as row
from mquant.checkpoint import Checkpoint, Folder, TensorInfo, open_checkpoint, read_header
from mquant.dtypes import nbytes
from mquant.events import Emit
from mquant.family import Role, load_families
from mquant.plan import DEFAULT_SHARD_BYTES, Plan, make_plan, natural
from mquant.recipe import KeptLayers, Recipe, find_recipe

LISTING = Path(__file__).parent.parent / "data" / "minimax-m2.7-reap-154.tensors.tsv.gz"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "src", shards=3)


def planned(
    src: Path, recipe: Recipe | None = None, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Plan:
    checkpoint = open_checkpoint(Folder(src))
    recipe = recipe or find_recipe("nvfp4")
    return make_plan(checkpoint, recipe, load_families(), max_shard_bytes=shard_bytes)


def only(*roles: Role, ignore: tuple[str, ...] = ()) -> Recipe:
    """Return a recipe that quantizes some roles."""
    scheme = dict.fromkeys(roles, "NVFP4A16")
    return Recipe(name="mine", suffix="MINE", roles=scheme, ignore=ignore)


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
    plan = planned(src, only(Role.EXPERT))

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


# --- work units and shards


@pytest.mark.parametrize("shard_bytes", [1, 3_000, 10_000, DEFAULT_SHARD_BYTES])
def test_a_fused_set_is_one_work_unit_even_if_the_parent_cuts_it(
    src: Path, shard_bytes: int
) -> None:
    plan = planned(src, shard_bytes=shard_bytes)
    units = [
        {action.module.rpartition(".")[2] for action in unit.actions}
        for shard in plan.shards
        for unit in shard.units
        if len(unit.actions) > 1
    ]
    cut = [
        unit
        for shard in plan.shards
        for unit in shard.units
        if len({action.source.shard for action in unit.actions}) > 1
    ]

    assert Counter(map(frozenset, units)) == {
        frozenset({"q_proj", "k_proj", "v_proj"}): 2,
        frozenset({"w1", "w3"}): 8,
    }
    assert len(cut) == 2  # the parent has three shards, and each of the two cuts splits a fused set
    for shard in plan.shards:
        for unit in shard.units:
            assert len({(action.layer, action.expert) for action in unit.actions}) == 1


@pytest.mark.parametrize("limit", [1, 5_000, 20_000, 60_000])
def test_a_shard_stays_within_the_limit_unless_one_work_unit_exceeds_it(
    src: Path, limit: int
) -> None:
    shards = planned(src, shard_bytes=limit).shards

    assert len(shards) > 1
    for shard in shards:
        size = sum(unit.output_bytes for unit in shard.units)
        assert size <= limit or len(shard.units) == 1
    for shard, following in pairwise(shards):
        size = sum(unit.output_bytes for unit in shard.units)
        assert size + following.units[0].output_bytes > limit  # every new shard was necessary


def test_shards_are_numbered_to_their_total(src: Path) -> None:
    shards = planned(src, shard_bytes=40_000).shards

    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]


def test_planned_files_are_what_safetensors_reads(src: Path, tmp_path: Path) -> None:
    plan = planned(src, shard_bytes=20_000)

    for shard in plan.shards:
        outputs = [output for unit in shard.units for output in unit.outputs]
        first, starts = shard.layout
        file = tmp_path / shard.name
        file.write_bytes(first + bytes(shard.file_bytes - len(first)))
        tensors = {t.name: (t.start, t.dtype, t.shape) for t in _tensors(file)}
        assert tensors == {o.name: (starts[o.name], o.dtype, o.shape) for o in outputs}
        with safe_open(file, framework="np") as opened:
            assert set(opened.keys()) == tensors.keys()
        assert shard.tensors == len(outputs)
    assert plan.file_bytes == sum(shard.file_bytes for shard in plan.shards)
    assert plan.output_bytes == sum(a.output_bytes for a in plan.actions)
    assert plan.source_bytes == open_checkpoint(Folder(src)).nbytes


def test_tensors_are_stored_in_the_order_of_the_work_units(src: Path) -> None:
    for shard in planned(src, shard_bytes=20_000).shards:
        first, starts = shard.layout
        position = len(first)
        for output in (output for unit in shard.units for output in unit.outputs):
            assert starts[output.name] == position
            position += output.nbytes


def test_tensors_are_stored_in_safetensors_order_if_one_would_be_misaligned(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(Folder(make_checkpoint(tmp_path / "src", edit=_odd_norm)))
    plan = make_plan(checkpoint, find_recipe("nvfp4"), load_families())
    (shard,) = plan.shards
    outputs = [output for unit in shard.units for output in unit.outputs]
    arrays = {o.name: np.zeros(o.shape, NUMPY[o.dtype]) for o in outputs}
    save_file(arrays, tmp_path / "expected.safetensors", metadata={"format": "pt"})

    first, starts = shard.layout

    assert (tmp_path / "expected.safetensors").read_bytes().startswith(first)
    assert all(starts[o.name] % NUMPY[o.dtype].itemsize == 0 for o in outputs)


def _odd_norm(rows: list[Row]) -> list[Row]:
    """Give a norm an odd length, so that the next tensor would begin at an odd address."""
    name = "model.layers.0.input_layernorm.weight"
    return [row(name, "BF16", (65,)) if old[0] == name else old for old in rows]


def _tensors(path: Path) -> tuple[TensorInfo, ...]:
    return read_header(Folder(path.parent), path.name)


# --- ignore and config


def test_ignore_names_every_matrix_that_is_kept_in_natural_order(tmp_path: Path) -> None:
    plan = planned(make_checkpoint(tmp_path / "src", layers=12, experts=2))

    assert plan.ignore == (
        "lm_head",
        "model.embed_tokens",
        *(f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(12)),
    )


def test_ignore_names_attention_if_the_recipe_keeps_attention(src: Path) -> None:
    plan = planned(src, only(Role.EXPERT))

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
    assert planned(src).fingerprint == planned(src, only(Role.EXPERT, Role.ATTENTION)).fingerprint


def test_another_recipe_shard_size_or_source_has_another_fingerprint(
    src: Path, tmp_path: Path
) -> None:
    wider = make_checkpoint(tmp_path / "wider", intermediate=48, shards=3)
    halves = make_checkpoint(tmp_path / "halves", dtype="F16", shards=3)
    kept = "model.layers.0.self_attn.o_proj"
    prints = {
        planned(src).fingerprint,
        planned(src, only(Role.EXPERT)).fingerprint,
        planned(src, only(Role.EXPERT, Role.ATTENTION, ignore=(kept,))).fingerprint,
        planned(src, shard_bytes=20_000).fingerprint,
        planned(wider).fingerprint,
        planned(halves).fingerprint,
    }

    assert len(prints) == 6


def test_a_shard_size_that_changes_no_shard_keeps_the_fingerprint(src: Path) -> None:
    assert planned(src).fingerprint == planned(src, shard_bytes=10**9).fingerprint


# --- the full-size model


class Listed:
    """A source that has only names, sizes and shapes of tensors."""

    name = "MiniMax-M2.7-REAP-154"
    folders = ()

    def __init__(self, files: Mapping[str, int]) -> None:
        self.files = files
        self.stamps = {path: (size, 0) for path, size in files.items()}

    def materialize(self, emit: Emit, only: Collection[str] | None = None) -> "Listed":
        return self

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        raise AssertionError(f"a plan reads no byte of {path} [{start}, {end})")

    def identity(self) -> dict[str, str]:
        return {}


@cache
def golden() -> Plan:
    """Return the plan of the full-size listing."""
    tensors, places = {}, Counter[str]()
    lines = gzip.decompress(LISTING.read_bytes()).decode().splitlines()
    for number, line in enumerate(line for line in lines if not line.startswith("#")):
        name, dtype, sizes = line.split("\t")
        shape = tuple(map(int, sizes.split("x")))
        shard = f"model-{number // 300 + 1:05d}-of-00098.safetensors"
        end = places[shard] + nbytes(dtype, shape)
        tensors[name] = TensorInfo(name, dtype, shape, shard, places[shard], end)
        places[shard] = end
    source = Listed(places)
    checkpoint = Checkpoint(source, make_config(), tensors, tuple(sorted(places)), ())
    return make_plan(checkpoint, find_recipe("nvfp4"), load_families())


def test_the_full_size_model_is_planned_from_names_alone() -> None:
    plan = golden()

    assert plan.findings == ()
    assert (plan.survey.layers, plan.survey.experts) == (62, 154)
    assert len(plan.survey.checkpoint.tensors) == 29_267
    assert plan.source_bytes == 278_357_089_584
    assert plan.survey.checkpoint.parameters == 139_149_203_788


def test_the_full_size_model_becomes_80_gb() -> None:
    plan = golden()

    assert sum(shard.tensors for shard in plan.shards) == 87_051
    assert plan.output_bytes == 80_140_558_496
    assert all(sum(j.output_bytes for j in s.units) <= DEFAULT_SHARD_BYTES for s in plan.shards)


def test_the_full_size_model_ignores_head_embeddings_and_62_gates() -> None:
    assert golden().ignore == (
        "lm_head",
        "model.embed_tokens",
        *(f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(62)),
    )


def test_fused_sets_stay_whole_in_the_full_size_model() -> None:
    sizes = Counter(len(unit.actions) for shard in golden().shards for unit in shard.units)

    assert sizes[3] == 62
    assert sizes[2] == 62 * 154


def test_an_unsorted_parent_is_planned(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", edit=lambda rows: rows[::-1])

    assert planned(src).findings == ()


def test_a_fused_set_in_three_shards_is_one_work_unit(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", shards=1)
    rows = {t.name: row(t.name, t.dtype, t.shape) for t in _tensors(src / "model.safetensors")}
    (src / "model.safetensors").unlink()
    where = {}
    for number, (name, tensor) in enumerate(rows.items()):
        where[name] = f"{number % 47:02d}.safetensors"
        write_shard(src / where[name], [tensor])
    write_index(src, where)

    plan = planned(src)

    assert plan.findings == ()
    (unit,) = [
        unit
        for shard in plan.shards
        for unit in shard.units
        if any(a.module == "model.layers.0.self_attn.q_proj" for a in unit.actions)
    ]
    assert len({action.source.shard for action in unit.actions}) == 3


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
