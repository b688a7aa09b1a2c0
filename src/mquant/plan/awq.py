"""Tensors that AWQ scales besides quantized weights: norms before them, routers beside them."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from mquant.family import Family
from mquant.findings import Finding, rule
from mquant.plan.action import Action
from mquant.plan.members import Member
from mquant.recipe import Recipe

NOT_SCALABLE: Final = rule(
    "not-scalable",
    "If the recipe scales weights, the family file says which layers feed which.",
    "If weights are scaled without the layers that feed them, the model computes something else.",
    "Take another recipe: mquant recipes lists all.",
    needs="plan",
)


def scaled(members: Iterable[Member], actions: list[Action], family: Family) -> list[Action]:
    """Return the actions; mark norms and routers as scaled if AWQ scales weights of their layer."""
    row_of = {member.info.name: member.tensor_role.row.name for member in members}
    names: set[str] = set()
    for rows in ({row.name for row in group} for group in family.smoothings):
        layers: dict[int | None, list[Action]] = defaultdict(list)
        for action in actions:
            if row_of[action.source.name] in rows:
                layers[action.layer].append(action)
        for group in layers.values():
            if any(action.scheme for action in group):
                names |= {action.source.name for action in group if not action.scheme}
    reason = "not quantized, but scaled by AWQ"
    return [
        replace(action, scaled=True, reason=reason) if action.source.name in names else action
        for action in actions
    ]


def unscalable(family: Family, recipe: Recipe) -> list[Finding]:
    """Return an error if the recipe scales weights of a family without a `smoothing` table."""
    if recipe.smoothing == "none" or family.smoothing:
        return []
    return [
        NOT_SCALABLE.finding(
            recipe.name,
            f"Recipe {recipe.name} scales weights and the layers that feed them, but mquant does "
            f"not know which layers feed which in {family.title}.",
            "Take another recipe: mquant recipes lists all.",
        )
    ]
