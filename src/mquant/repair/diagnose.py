"""Diagnose a broken checkpoint, given its parent.

The findings are those of `verify`, and what `verify --against` finds in tensors. If the tensors
are right, only config.json is mended: the model of the loader says with which config the loader
takes the tensors. Otherwise tensors of the parent replace the wrong tensors, and the same model
judges the plan. `diagnose` reads the parent as `verify --against` does at the same depth, all of a
local parent if a sample has a wrong weight, and up to three fused sets. At depth `structure`, and
from a hub repo if no depth is given, it reads the parent's headers, and a few norms.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from mquant.checkpoint import Assembly, Checkpoint, Source, is_shard, open_checkpoint
from mquant.checkpoint.checkpoint import TENSOR_STORED_TWICE
from mquant.checkpoint.hub import HubRepo
from mquant.engines.importance import Importance, read_importance
from mquant.errors import NotJudged, Refused
from mquant.events import Emit, silent
from mquant.family import Family
from mquant.family_rows import Role
from mquant.findings import Finding, rule
from mquant.loader_model.declared import declared_config
from mquant.loader_model.modules import FP8_DTYPES, MODELOPT_NAME, ModuleView, read_modules
from mquant.loader_model.storage import SUFFIXES, StorageFormat, activations, format_of
from mquant.output import RECIPE_NAME, config_json, side_files
from mquant.plan import (
    BAD,
    KV_SCALES,
    PARENT,
    Plan,
    RepairPlan,
    make_config_plan,
    make_copy_plan,
    make_plan,
    make_repair_plan,
)
from mquant.recipe import Recipe
from mquant.repair.config import Judged, choose_config, judge_plan
from mquant.repair.known_recipe import (
    as_found,
    nothing_known,
    recipe_of,
    scales_known,
    stated_recipe,
)
from mquant.repair.likeness import is_copy, roles_as_in_parent, with_differences
from mquant.schemes import NVFP4A16
from mquant.text import names
from mquant.verify.judge import Depth, Report, verify

_NORM_BYTES: Final = 1 << 20  # a vector of more is no norm, and is not read whole
_TRIED: Final = 3
"""The number of norms to compare as evidence."""

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
REPAIR_CANNOT_MEND: Final = rule(
    "repair-cannot-mend",
    "vLLM loads the checkpoint, once repair has done all it can.",
    "A repair that no loader takes would only look like a checkpoint.",
    "Quantize the parent again: mquant quantize PARENT --recipe RECIPE.",
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
        faulty = any(finding.severity == "error" for finding in self.report.findings)
        whole = len(repair_plan.kept) == len(repair_plan.plan.shards)
        return faulty or not whole or self.config_differs or bool(self.missing)

    @property
    def config_changes(self) -> list[str]:
        """The keys of config.json that the repair adds, changes or removes."""
        before, after = self.bad.config, config_json(self.repair_plan.right)
        return [key for key in {**before, **after} if before.get(key) != after.get(key)]

    @property
    def own_files(self) -> tuple[str, ...]:
        """The files beside the shards that stay as they are."""
        right, files = self.repair_plan.right, self.bad.source.files
        again = [] if right.schemes else [RECIPE_NAME]
        if (declared_config(self.bad) or {}) == right.quantization_config:
            again.append(MODELOPT_NAME)  # another config would contradict this file
        return (*side_files(self.bad, cards=True), *(path for path in again if path in files))

    @property
    def obsolete(self) -> list[str]:
        """The files of the broken checkpoint that the repaired checkpoint does not have."""
        shards = {shard.name for shard in self.repair_plan.plan.shards}
        lost = {MODELOPT_NAME} - {*self.own_files}
        files = self.bad.source.files
        return [path for path in files if path in lost or (is_shard(path) and path not in shards)]


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
    `bad` cannot be repaired: if `parent` is incomplete or is another model, if no config.json mends
    a layout other than NVFP4A16, or if tensors must be quantized again and the recipe is unknown or
    needs data. Raises NotJudged if it is not known whether vLLM would load the result.
    """
    report = verify(bad, families, depth, emit=emit)
    checkpoint, original = open_checkpoint(bad, tolerant=True), open_checkpoint(parent)
    # config.json of `bad` may be broken; config.json of the parent describes the same model.
    config = {**original.config, **_quantization(checkpoint.config)}
    view = read_modules(replace(checkpoint, config=config), families)
    theirs = read_modules(original, families)
    twice = {f.where for f in report.findings if f.rule == TENSOR_STORED_TWICE.id}
    unlike = _unlike_parent(view, original, report.wrong | twice)
    if "numbers" in report.checked and (depth or not isinstance(parent, HubRepo)):
        report = with_differences(report, view, theirs, depth, emit)
    stated, copied = stated_recipe(checkpoint), is_copy(view, theirs)
    as_source = roles_as_in_parent(view, theirs)
    layout = _other_layout(view, as_source)
    recipe = stated or (as_found({}, []) if layout else recipe_of(view, original, as_source))
    wrong = report.wrong | twice | unlike
    weights, made_by = None, ""
    chosen = None
    if not wrong and view.family and _as_in_parent(view, original):
        chosen = choose_config(checkpoint, original, families)
    if chosen and (layout or not chosen.faults):
        mended = replace(original, config=chosen.config)
        repair_plan = make_config_plan(mended, checkpoint, recipe, families)
        weights = read_importance(importance, repair_plan.right)
    else:
        right = _right(report, view, theirs, recipe, layout, families, copied=copied)
        if copied and theirs.outcome.unknown:  # all tensors will be those of the parent
            repair_plan = make_repair_plan(right, checkpoint, wrong)
        else:
            repair_plan = _with_tensors(right, checkpoint, wrong, families)
        weights = read_importance(importance, right)
        if any(action.scheme for action in repair_plan.replaced):
            made_by = "mquant.json" if stated else "reproduced"
            repair_plan = scales_known(repair_plan, assemble(bad, parent), stated, weights)
    return Diagnosis(
        bad=checkpoint,
        parent=original,
        report=report,
        repair_plan=repair_plan,
        made_by=made_by,
        config_differs=config_json(repair_plan.right) != checkpoint.config,
        importance=weights,
        missing=tuple(path for path in side_files(original) if path not in bad.files),
    )


def _right(
    report: Report,
    view: ModuleView,
    parent: ModuleView,
    recipe: Recipe,
    layout: str,
    families: Mapping[str, Family],
    *,
    copied: bool,
) -> Plan:
    """Return the plan that makes the checkpoint of `view` as it should be from its parent.

    `copied`: the checkpoint is a copy of a quantized parent. Raises Refused and NotJudged as
    `diagnose`.
    """
    if not copied and view.family and layout:
        raise _beyond_repair(report, layout)
    if not copied and view.family and not recipe.roles:
        raise Refused([nothing_known(view.checkpoint.source)])
    if copied:
        return make_copy_plan(parent, recipe, families)
    right = make_plan(parent.checkpoint, recipe, families)
    if right.refusals:
        raise Refused(right.refusals)
    return right


def _with_tensors(
    right: Plan, bad: Checkpoint, wrong: Collection[str], families: Mapping[str, Family]
) -> RepairPlan:
    """Return the plan with tensors of the parent, and with all that vLLM takes of `bad` besides.

    Raises Refused if vLLM would not load the result, and NotJudged if that is not known.
    """
    first = make_repair_plan(right, bad, wrong)
    besides = [name for name in first.dropped if name not in wrong]
    cache = [name for name in besides if name.rpartition(".")[2] in KV_SCALES]
    judged: list[Judged] = []
    for extras in dict.fromkeys(map(tuple, (besides, cache, ()))):
        repair_plan = make_repair_plan(right, bad, wrong, extras) if extras else first
        judged.append(judge_plan(repair_plan.right, repair_plan.plan, families))
        if judged[-1].loads:
            return repair_plan
    if judged[-1].unknown:
        raise NotJudged(judged[-1].unknown)
    raise Refused([_cannot_mend(bad.source.name, judged[-1].faults)])


def _beyond_repair(report: Report, layout: str) -> Refused | NotJudged:
    """Return why a checkpoint in a layout that cannot be made again is not repaired."""
    errors = [finding for finding in report.findings if finding.severity == "error"]
    if report.undecided and not errors:
        return NotJudged(report.undecided)
    more = [_cannot_mend(report.source, errors)] if errors else []
    return Refused(
        [
            LAYOUT_NOT_REPAIRABLE.finding(
                report.source,
                f"{report.source} is quantized as {layout}; mquant repairs {NVFP4A16.name}.",
                "Quantize the checkpoint again, with the tool that made it.",
            ),
            *more,
        ]
    )


def _cannot_mend(name: str, faults: Iterable[Finding]) -> Finding:
    first = next(iter(faults))
    return REPAIR_CANNOT_MEND.finding(first.where, f"Repair cannot mend {name}: {first.message}")


def _quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key == "quantization_config"}


def _other_layout(view: ModuleView, as_source: Collection[Role]) -> str:
    """Return the layout of most quantized modules of a role; empty if that is NVFP4A16.

    The roles `as_source` do not count: their weights are stored as the parent stores them.
    """
    kinds: dict[Role | None, Counter[StorageFormat]] = defaultdict(Counter)
    for module in view.quantized:
        role = module.tensor_role.row.role if module.tensor_role else None
        if role and (role.refused_by_loaders or role in as_source):
            continue
        if kind := format_of(view, module):
            kinds[role][kind] += 1
    most = [counter.most_common(1)[0][0] for counter in kinds.values()]
    common = next((kind for kind in most if kind is not StorageFormat.NVFP4), StorageFormat.NVFP4)
    inputs = sum(SUFFIXES[StorageFormat.NVFP4].input in module.tensors for module in view.quantized)
    static = activations(common, view) and inputs * 2 > len(view.quantized)
    if common is StorageFormat.NVFP4 and not static:
        return ""
    layouts = {
        StorageFormat.NVFP4: "NVFP4 with quantized activations",
        StorageFormat.OTHER: "something that mquant does not know",
    }
    return layouts.get(common, common.short)


def _as_in_parent(view: ModuleView, parent: Checkpoint) -> bool:
    """Return whether the plain tensors have the dtypes and shapes of the parent's tensors."""
    for module in (module for module in view.modules.values() if not module.quantized):
        for info in module.tensors.values():
            original = parent.tensors.get(info.name)
            if original and (original.dtype, original.shape) != (info.dtype, info.shape):
                return original.dtype in FP8_DTYPES
    return True


def _unlike_parent(view: ModuleView, parent: Checkpoint, wrong: Iterable[str]) -> set[str]:
    """Return which of a few norms differ from the parent's. Raises Refused if all differ."""
    tensors = view.checkpoint.tensors
    pairs = (
        (tensors[info.name], info)
        for info in parent.tensors.values()
        if len(info.shape) == 1 and info.nbytes <= _NORM_BYTES
        if info.name in tensors and info.name not in wrong
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
