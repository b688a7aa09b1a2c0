"""The recipe that a broken checkpoint was made with.

The recipe comes from mquant.json, or from the checkpoint itself: the tensors say which modules are
quantized, and an intact fused set, quantized again, says how scales were chosen.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Final

from pydantic import ValidationError

from mquant.checkpoint import Assembly, AssemblyReader, Checkpoint, Source
from mquant.engines.importance import Importance, weigher
from mquant.errors import Refused
from mquant.family import Family, FusedSet
from mquant.family_rows import Role
from mquant.findings import Finding, rule
from mquant.loader_model.modules import Module, ModuleView
from mquant.output import known_table
from mquant.plan import RepairPlan, WorkUnit, from_parent
from mquant.recipe import AS_STORED, Recipe, load_recipes
from mquant.schemes import NVFP4A16
from mquant.text import names

_QUANTIZE: Final = "Quantize the parent again: mquant quantize PARENT --recipe nvfp4."
_IMPORTANCE: Final = "If the scales need an importance file, give the file with --importance. "
_TRIED: Final = 3
"""The number of fused sets to requantize as evidence."""

RECIPE_NOT_KNOWN: Final = rule(
    "recipe-not-known",
    "The recipe of the modules that must be quantized again is known.",
    "Modules made with another recipe have other scales than the rest.",
    "Quantize the parent again: mquant quantize PARENT --recipe nvfp4.",
    needs="run",
)


def stated_recipe(checkpoint: Checkpoint) -> Recipe | None:
    """Return the recipe in mquant.json without the roles that loaders refuse, or None."""
    try:
        recipe = Recipe.model_validate(known_table(checkpoint.source).get("recipe"))
    except ValidationError:
        return None
    roles = {role: name for role, name in recipe.roles.items() if not role.refused_by_loaders}
    return recipe.model_copy(update={"roles": roles, "foreign": True})


def recipe_of(view: ModuleView, parent: Checkpoint, as_source: Collection[Role] = ()) -> Recipe:
    """Return a recipe from the checkpoint's own tensors: which modules are quantized.

    The weights of the roles `as_source` are stored as the parent stores them. The majority decides
    for modules that loaders treat as one (a layer's experts, a fused set). A missing module counts
    as most modules of its role.
    """
    family = view.family
    if family is None:
        return as_found({}, [])  # make_plan names the known families
    units: dict[FusedSet, Counter[bool]] = defaultdict(Counter)
    members: dict[FusedSet, list[str]] = defaultdict(list)
    roles: dict[Role, Counter[bool]] = defaultdict(Counter)
    of: dict[FusedSet, Role] = {}
    for module, name, role, unit in _linear(view, family):
        units[unit][bool(module.quantized)] += 1
        roles[role][bool(module.quantized)] += 1
        members[unit].append(name)
        of[unit] = role
    quantized = {role for role, votes in roles.items() if votes[True] >= votes[False]}
    kept = [
        name
        for unit, votes in units.items()
        if votes[False] > votes[True] and of[unit] in quantized
        for name in members[unit]
    ]
    present = {name.removesuffix(".weight") for name in parent.tensors}
    wishes = {role: AS_STORED if role in as_source else NVFP4A16.name for role in quantized}
    return as_found(wishes, [name for name in kept if name in present])


def as_found(roles: Mapping[Role, str], ignore: list[str]) -> Recipe:
    """Return the recipe of a checkpoint that no recipe's name is known of."""
    return Recipe(
        name="as-found",
        title="As the repaired checkpoint had it",
        suffix="NVFP4",
        roles=roles,
        ignore=tuple(ignore),
    )


def _linear(view: ModuleView, family: Family) -> Iterator[tuple[Module, str, Role, FusedSet]]:
    """Yield each linear module that may be quantized: module, hub name, role and fused set."""
    for module in view.modules.values():
        tensor_role = module.tensor_role or family.classify_in_memory(f"{module.name}.weight")
        if (
            tensor_role is None
            or not tensor_role.row.role.linear
            or tensor_role.row.role.refused_by_loaders
        ):
            continue
        role, row = tensor_role.row.role, tensor_role.row
        name = row.format(tensor_role.layer, tensor_role.expert).removesuffix(".weight")
        yield module, name, role, tensor_role.loaded_with


def scales_known(
    repair_plan: RepairPlan, assembly: Assembly, stated: Recipe | None, weights: Importance | None
) -> RepairPlan:
    """Return `repair_plan` with the recipe that chose the scales of the checkpoint.

    `stated` is the recipe in mquant.json, if there is one. Raises Refused if the recipe is not
    known, or needs data.
    """
    recipe = repair_plan.right.recipe
    if recipe.needs_data:
        raise Refused([_needs_data(repair_plan, recipe)])
    candidates = [recipe] if stated else _candidates(recipe)
    reproduced = _reproduced(repair_plan, assembly, candidates, weights)
    if reproduced is not None:
        return _made_by(repair_plan, reproduced)
    if stated and not _intact(repair_plan):
        return repair_plan
    raise Refused([_unknown(repair_plan, stated)])


def _intact(repair_plan: RepairPlan) -> list[tuple[WorkUnit, set[str]]]:
    """Return the work units that quantize and have all their codes, with the tensors to compare.

    The smallest units come first. Codes depend on every scale, so they show how scales were chosen.
    """
    units = []
    for unit in (unit for unit in repair_plan.right.units if unit.scheme):
        present = {output.name for output in unit.outputs} & repair_plan.sound.keys()
        if all(action.outputs[0].name in present for action in unit.actions):
            units.append((unit, present))
    return sorted(units, key=lambda pair: pair[0].source_bytes)


def _candidates(recipe: Recipe) -> list[Recipe]:
    """Return the shipped recipes with the schemes of `recipe`, one for each way to choose scales.

    Recipes that need data are left out: tensors cannot be reproduced without the data.
    """
    shipped = [other for other in load_recipes().values() if not other.needs_data]
    alike = [other for other in shipped if _schemes(other) == _schemes(recipe)]
    return list({other.scales: other for other in alike}.values())


def _schemes(recipe: Recipe) -> set[str]:
    return set(recipe.roles.values()) - {AS_STORED}


def _reproduced(
    plan: RepairPlan, assembly: Assembly, recipes: Iterable[Recipe], importance: Importance | None
) -> Recipe | None:
    """Return the recipe that reproduces an intact fused set byte for byte, or None."""
    from mquant.engines import stream  # numba

    with closing(AssemblyReader(assembly)) as reader:
        for unit, present in _intact(plan)[:_TRIED]:
            infos = {name: plan.sound[name] for name in present}
            reference = {n: assembly.read(i.shard, i.start, i.end) for n, i in infos.items()}
            for recipe in recipes:
                tensors = stream.make(reader, from_parent(unit), weigher(recipe, importance))
                if all(tensors[name] == data for name, data in reference.items()):
                    return recipe
    return None


def _made_by(repair_plan: RepairPlan, reproduced: Recipe) -> RepairPlan:
    """Return `repair_plan` with the name and the scales of the recipe that was reproduced."""
    values = {key: getattr(reproduced, key) for key in ("name", "title", "suffix", "scales")}
    recipe = repair_plan.right.recipe.model_copy(update=values)
    return replace(
        repair_plan,
        right=replace(repair_plan.right, recipe=recipe),
        plan=replace(repair_plan.plan, recipe=recipe),
    )


def nothing_known(bad: Source) -> Finding:
    """Return the finding of a checkpoint without any sign of its recipe."""
    return RECIPE_NOT_KNOWN.finding(
        bad.name,
        f"{bad.name} has no mquant.json and no quantized module with a known name: mquant cannot "
        "tell how the checkpoint was made.",
        _QUANTIZE,
    )


def _needs_data(repair_plan: RepairPlan, stated: Recipe) -> Finding:
    lost = [action.module for action in repair_plan.replaced if action.scheme]
    return RECIPE_NOT_KNOWN.finding(
        lost[0],
        f"{names(lost)} must be quantized again, but recipe {stated.name}, which mquant.json "
        "names, depends on the data it was calibrated with.",
        f"Quantize the parent again: mquant quantize PARENT --recipe {stated.name} --data FILE.",
    )


def _unknown(repair_plan: RepairPlan, stated: Recipe | None) -> Finding:
    lost = [action.module for action in repair_plan.replaced if action.scheme]
    how = (
        f"recipe {stated.name}, which mquant.json names"
        if stated
        else "any recipe that needs no data"
    )
    what = (
        f"the intact parts were not made from this parent with {how}"
        if _intact(repair_plan)
        else "no intact part shows the recipe"
    )
    return RECIPE_NOT_KNOWN.finding(
        lost[0],
        f"{names(lost)} must be quantized again, but {what}.",
        _IMPORTANCE + _QUANTIZE if stated and stated.scales == "search" else _QUANTIZE,
    )
