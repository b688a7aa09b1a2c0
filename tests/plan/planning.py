"""Plans and recipes for the tests of plans and refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from make import Edit, Row, make_row
from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.family_rows import Role
from mquant.findings import Finding
from mquant.plan import DEFAULT_SHARD_BYTES, Plan, make_plan
from mquant.recipe import Recipe, find_recipe

Make = Callable[..., Path]

MOE = "model.layers.1.block_sparse_moe"
ATTENTION = "model.layers.0.self_attn"


def planned(
    src: Path,
    recipe: Recipe | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    allow_unsafe: bool = False,
) -> Plan:
    """Return the plan of a checkpoint, by default with the recipe nvfp4."""
    checkpoint = open_checkpoint(Folder(src))
    recipe = recipe or find_recipe("nvfp4")
    return make_plan(
        checkpoint,
        recipe,
        load_families(),
        max_shard_bytes=shard_bytes,
        allow_unsafe=allow_unsafe,
    )


def own_recipe(*roles: Role, ignore: tuple[str, ...] = ()) -> Recipe:
    """Return a recipe that quantizes some roles."""
    scheme = dict.fromkeys(roles, "NVFP4A16")
    return Recipe(name="mine", suffix="MINE", roles=scheme, ignore=ignore)


def refusal(src: Path, recipe: Recipe | None = None) -> Finding:
    """Return the only finding that a plan is refused for."""
    plan = planned(src, recipe)
    (only,) = plan.refusals
    assert plan.findings == (only,)
    return only


def first_refusal(src: Path) -> Finding:
    """Return the first of several refusals."""
    return planned(src).refusals[0]


def swapped(name: str, dtype: str, shape: tuple[int, ...]) -> Edit:
    """Return an edit that gives one tensor another dtype and shape."""

    def edit(rows: list[Any]) -> list[Any]:
        assert any(row[0] == name for row in rows)
        return [make_row(name, dtype, shape) if row[0] == name else row for row in rows]

    return edit


def with_odd_norm(rows: list[Row]) -> list[Row]:
    """Give a norm an odd length, so that the next tensor would begin at an odd address."""
    name = "model.layers.0.input_layernorm.weight"
    return [make_row(name, "BF16", (65,)) if old[0] == name else old for old in rows]
