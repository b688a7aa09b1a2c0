"""Diagnose a broken checkpoint, given its parent, and find the recipe of its good tensors.

The findings are those of `verify`. The recipe comes from mquant.json, or from the checkpoint
itself: the tensors say which modules are quantized, and an intact fused set, quantized again, says
how scales were chosen. `diagnose` reads the parent's headers, a few norms, and up to three fused
sets.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from mquant.checkpoint import (
    Assembly,
    AssemblyReader,
    Checkpoint,
    Source,
    is_shard,
    open_checkpoint,
)
from mquant.checkpoint.checkpoint import TENSOR_STORED_TWICE
from mquant.engines.importance import Importance, read_importance, weigher
from mquant.errors import Refused
from mquant.events import Emit, silent
from mquant.family import Family, FusedSet, Role
from mquant.findings import Finding, rule
from mquant.loader_model.modules import Module, ModuleView, read_modules
from mquant.loader_model.storage import SUFFIXES, StorageFormat, activations, format_of
from mquant.output import config_json, known_table, side_files
from mquant.plan import BAD, PARENT, RepairPlan, WorkUnit, from_parent, make_plan, make_repair_plan
from mquant.recipe import Recipe, load_recipes
from mquant.schemes import NVFP4A16
from mquant.text import names
from mquant.verify.judge import Depth, Report, verify

_QUANTIZE: Final = "Quantize the parent again: mquant quantize PARENT --recipe nvfp4."
_IMPORTANCE: Final = "If the scales need an importance file, give the file with --importance. "
_TRIED: Final = 3
"""The number of fused sets to requantize, and of norms to compare, as evidence."""

LAYOUT_NOT_REPAIRABLE: Final = rule(
    "layout-not-repairable",
    "The broken checkpoint is NVFP4A16.",
    "mquant can remake missing modules in NVFP4A16 only.",
    "Quantize the checkpoint again, with the tool that made it.",
    needs="run",
)
PARENT_DIFFERS: Final = rule(
    "parent-differs",
    "The broken checkpoint was made from the given parent.",
    "Tensors of another parent would make another model.",
    "Give the checkpoint's own parent with --from.",
    needs="run",
)
RECIPE_NOT_KNOWN: Final = rule(
    "recipe-not-known",
    "The recipe of the modules that must be quantized again is known.",
    "Modules made with another recipe have other scales than the rest.",
    "Quantize the parent again: mquant quantize PARENT --recipe nvfp4.",
    needs="run",
)


@dataclass(frozen=True)
class Diagnosis:
    """A broken checkpoint, the report of `verify` on the checkpoint, and the plan of its repair.

    `made_by` says how the recipe is known: `mquant.json`, `reproduced`, or empty if no tensor must
    be quantized again. `importance` is the file that scales were searched with. `config_differs`
    says whether config.json differs from the correct config.json. `missing` are side files of the
    parent that the checkpoint lacks.
    """

    bad: Checkpoint
    parent: Checkpoint
    report: Report
    repair_plan: RepairPlan
    made_by: str
    config_differs: bool
    importance: Importance | None
    missing: tuple[str, ...]

    @property
    def needed(self) -> bool:
        """Whether the checkpoint needs a repair."""
        repair_plan = self.repair_plan
        faulty = any(finding.severity != "info" for finding in self.report.findings)
        whole = len(repair_plan.kept) == len(repair_plan.plan.shards)
        return faulty or not whole or self.config_differs or bool(self.missing)

    @property
    def obsolete(self) -> list[str]:
        """The shards of the broken checkpoint that the repaired checkpoint does not have."""
        shards = {shard.name for shard in self.repair_plan.plan.shards}
        return [path for path in self.bad.source.files if is_shard(path) and path not in shards]


def assemble(bad: Source, parent: Source) -> Assembly:
    """Return the files of both checkpoints, under the names that the plan of a repair uses."""
    parts = {BAD + path: (bad, path) for path in bad.files}
    parts |= {PARENT + path: (parent, path) for path in parent.files}
    return Assembly(bad.name, parts)


def diagnose(
    bad: Source,
    parent: Source,
    families: Mapping[str, Family],
    depth: Depth | None = None,
    emit: Emit = silent,
    *,
    importance: Path | None = None,
) -> Diagnosis:
    """Return what is wrong with `bad`, and how tensors of `parent` repair `bad`.

    `importance` is the file that scales were searched with, if there was one. Raises Refused if
    `bad` cannot be repaired: if `parent` is incomplete or is another model, if the layout is not
    NVFP4A16, or if tensors must be quantized again and the recipe is unknown or needs data.
    """
    report = verify(bad, families, depth, emit=emit)
    checkpoint, original = open_checkpoint(bad, tolerant=True), open_checkpoint(parent)
    # config.json of `bad` may be broken; config.json of the parent describes the same model.
    config = {**original.config, **_quantization(checkpoint.config)}
    view = read_modules(replace(checkpoint, config=config), families)
    _refuse_other_layouts(view)
    stated = _stated_recipe(checkpoint)
    recipe = stated or _recipe_of(view, original)
    if view.family and not recipe.roles:
        raise Refused([_nothing_known(bad)])
    right = make_plan(original, recipe, families)
    if right.refusals:
        raise Refused(right.refusals)
    wrong = report.wrong | {f.where for f in report.findings if f.rule == TENSOR_STORED_TWICE.id}
    wrong |= _unlike_parent(view, original, wrong)
    repair_plan = make_repair_plan(right, checkpoint, wrong)
    made_by = ""
    weights = read_importance(importance, right)
    if any(action.scheme for action in repair_plan.replaced):
        made_by = "mquant.json" if stated else "reproduced"
        candidates = [recipe] if stated else _candidates(recipe)
        if recipe.needs_data:
            raise Refused([_needs_data(repair_plan, recipe)])
        reproduced = _reproduced(repair_plan, assemble(bad, parent), candidates, weights)
        if reproduced is None and not (stated and not _intact(repair_plan)):
            raise Refused([_unknown(repair_plan, stated)])
        if reproduced is not None:
            repair_plan = _made_by(repair_plan, reproduced)
    plain = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    return Diagnosis(
        bad=checkpoint,
        parent=original,
        report=report,
        repair_plan=repair_plan,
        made_by=made_by,
        config_differs={**plain, **_quantization(config_json(right))} != config_json(right),
        importance=weights,
        missing=tuple(path for path in side_files(original) if path not in bad.files),
    )


def _quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key == "quantization_config"}


def _stated_recipe(checkpoint: Checkpoint) -> Recipe | None:
    """Return the recipe in mquant.json without the roles that loaders refuse, or None."""
    try:
        recipe = Recipe.model_validate(known_table(checkpoint.source).get("recipe"))
    except ValidationError:
        return None
    roles = {role: name for role, name in recipe.roles.items() if not role.refused_by_loaders}
    return recipe.model_copy(update={"roles": roles, "foreign": True})


def _recipe_of(view: ModuleView, parent: Checkpoint) -> Recipe:
    """Return a recipe from the checkpoint's own tensors: which modules are quantized.

    The majority decides for modules that loaders treat as one (a layer's experts, a fused set). A
    missing module counts as most modules of its role.
    """
    family = view.family
    if family is None:
        return _recipe({}, [])  # make_plan names the known families
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
    return _recipe(dict.fromkeys(quantized, NVFP4A16.name), [n for n in kept if n in present])


def _recipe(roles: Mapping[Role, str], ignore: list[str]) -> Recipe:
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


def _refuse_other_layouts(view: ModuleView) -> None:
    """Raise Refused if most quantized modules of a role are not NVFP4A16."""
    kinds: dict[Role | None, Counter[StorageFormat]] = defaultdict(Counter)
    for module in view.quantized:
        role = module.tensor_role.row.role if module.tensor_role else None
        if (kind := format_of(view, module)) and not (role and role.refused_by_loaders):
            kinds[role][kind] += 1
    most = [counter.most_common(1)[0][0] for counter in kinds.values()]
    common = next((kind for kind in most if kind is not StorageFormat.NVFP4), StorageFormat.NVFP4)
    inputs = sum(SUFFIXES[StorageFormat.NVFP4].input in module.tensors for module in view.quantized)
    static = activations(common, view) and inputs * 2 > len(view.quantized)
    if common is StorageFormat.NVFP4 and not static:
        return
    what = "NVFP4 with quantized activations" if common is StorageFormat.NVFP4 else common.short
    raise Refused(
        [
            LAYOUT_NOT_REPAIRABLE.finding(
                view.checkpoint.source.name,
                f"{view.checkpoint.source.name} is quantized as {what}; mquant repairs "
                f"{NVFP4A16.name}.",
                "Quantize the checkpoint again, with the tool that made it.",
            )
        ]
    )


def _unlike_parent(view: ModuleView, parent: Checkpoint, wrong: Iterable[str]) -> set[str]:
    """Return which of a few norms differ from the parent's. Raises Refused if all differ."""
    tensors = view.checkpoint.tensors
    pairs = (
        (tensors[info.name], info)
        for info in parent.tensors.values()
        if len(info.shape) == 1 and info.name in tensors and info.name not in wrong
    )
    alike = (p for p in pairs if (p[0].dtype, p[0].shape) == (p[1].dtype, p[1].shape))
    compared = list(islice(alike, _TRIED))
    unlike = {
        norm.name
        for norm, original in compared
        if view.checkpoint.source.read(norm.shard, norm.start, norm.end)
        != parent.source.read(original.shard, original.start, original.end)
    }
    if compared and len(unlike) == len(compared):
        name, reference = view.checkpoint.source.name, parent.source.name
        raise Refused(
            [
                PARENT_DIFFERS.finding(
                    reference,
                    f"{name} was not made from {reference}: {names(sorted(unlike))} differ.",
                    f"Give the checkpoint that {name} was quantized from with --from.",
                )
            ]
        )
    return unlike


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
    return set(recipe.roles.values())


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


def _nothing_known(bad: Source) -> Finding:
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
