"""Survey x Recipe -> Plan. Pure: no weight is read, nothing is written."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

from mquant.checkpoint import Checkpoint, TensorInfo
from mquant.dtypes import FLOAT_WEIGHTS
from mquant.errors import Refused
from mquant.family import Family, FusedSet
from mquant.family_rows import Role
from mquant.findings import Finding, rule
from mquant.loader_model.declared import declared_config
from mquant.plan.action import Action, WorkUnit
from mquant.plan.as_source import Layouts, copies
from mquant.plan.as_source import refusals as not_as_stored
from mquant.plan.awq import scaled, unscalable
from mquant.plan.cast import with_casts
from mquant.plan.loadable import checked
from mquant.plan.members import Member, apart, as_stored
from mquant.plan.model import Plan, ShardPlan
from mquant.plan.never_quantized import KEPT_BECAUSE, biased_experts, in_yaml, natural, unsafe
from mquant.plan.starts_from import starts_from
from mquant.plan.stored import READABLE
from mquant.plan.survey import Survey, survey
from mquant.recipe import Choice, Recipe
from mquant.schemes import Scheme
from mquant.text import names
from mquant.untrusted import MAX_TENSORS

T = TypeVar("T")

DEFAULT_SHARD_BYTES: Final = 5_000_000_000

NOT_QUANTIZABLE: Final = rule(
    "not-quantizable",
    "A weight that the recipe quantizes has a dtype and a shape that its scheme can store.",
    "Groups and blocks do not divide a matrix of another shape evenly.",
    "Leave its role out of the recipe's roles, or list all such modules in ignore.",
    needs="plan",
)
FUSED_SET_MIXED: Final = rule(
    "fused-set-mixed",
    "The members of a fused set are quantized alike, or all plain.",
    "Loaders build one matrix of the members, quantized in one way, or refuse the set.",
    "Quantize all members, or put all of them in ignore.",
    knowing=("family",),
    if_loads="nothing",
)
EXPERTS_MIXED: Final = rule(
    "experts-mixed",
    "The experts of a layer are quantized alike, or all plain.",
    "Engines run a layer's experts in one kernel: one BF16 expert among quantized ones is refused.",
    "Quantize all experts of the layer, or none.",
    knowing=("family",),
    if_loads="nothing",
)
NOTHING_TO_QUANTIZE: Final = rule(
    "nothing-to-quantize",
    "The recipe quantizes some tensor of the checkpoint.",
    "A checkpoint that declares a quantization without quantized tensors does not load.",
    "Check the recipe's roles, targets and ignore.",
    needs="plan",
)
OUTPUT_TOO_MANY: Final = rule(
    "output-too-many",
    "The output has no more tensors than mquant opens.",
    "A run could not judge its own output, and no other command could read it.",
    "Take a recipe that stores fewer tensors for a weight, such as fp8-dynamic.",
    needs="plan",
)
ENTRY_UNMATCHED: Final = rule(
    "entry-unmatched",
    "Every entry of the recipe's ignore and targets matches a module.",
    "An entry that matches nothing protects nothing: the entry is a typo, or another model's name.",
    "Correct the entry, or remove it. Names are those of the hub or of transformers; `re:` "
    "entries match from the start of a name.",
    needs="plan",
    if_tolerated="warning",
)


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    families: Mapping[str, Family],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    allow_unsafe: bool = False,
) -> Plan:
    """Decide what happens to every tensor.

    Problems are `findings` of the plan. A plan with an error must not be carried out.
    `allow_unsafe` turns the refusals of quantized routers, embeddings and head, and of an output
    that vLLM does not load, into warnings.
    Raises Refused if the family is unknown: then there is no plan to show.
    """
    surveyed = survey(checkpoint, families, READABLE)
    family = surveyed.family
    if family is None:
        raise Refused(surveyed.findings)
    choice = recipe.on(name for m in surveyed.members for name in _module_names(m, family))
    actions = _actions(surveyed, choice, family)
    units = _work_units(*_as_stored(surveyed.members, actions))
    findings = [
        *surveyed.findings,
        *starts_from(surveyed, actions),
        *unsafe(actions, family, recipe, allow_unsafe=allow_unsafe),
        *_unmatched(surveyed, family, choice),
    ]
    # If the source's weights cannot be read, no further check applies.
    if surveyed.readable:
        findings += [
            *_unquantizable(surveyed.members, actions, family),
            *not_as_stored(actions),
            *(_split_sets(units) or _unlike_experts(actions)),
            *biased_experts(actions, recipe, allow_unsafe=allow_unsafe),
            *_nothing(actions, recipe),
            *_too_many(actions, recipe),
            *unscalable(family, recipe),
        ]
    plan = Plan(
        survey=surveyed,
        family=family,
        recipe=recipe,
        shards=tuple(
            ShardPlan(name, tuple(group))
            for name, group in cut_shards(
                units, lambda unit: unit.output_bytes, max_shard_bytes
            ).items()
        ),
        ignore=kept_modules(
            ((a.module, a.expert, a.source) for a in actions if not a.stored_in),
            family,
            checkpoint.config,
        ),
        findings=tuple(findings),
    )
    return checked(plan, "tolerated" if allow_unsafe else "source")


def _module_names(member: Member, family: Family) -> tuple[str, str]:
    """Return the names of a tensor's module on the hub and in transformers."""
    return (member.module, family.in_memory_name(member.module))


def _actions(surveyed: Survey, choice: Choice, family: Family) -> list[Action]:
    """Return the action of each member."""
    config, members = surveyed.checkpoint.config, surveyed.members
    layers = family.value(family.config.layers, config) or surveyed.layers
    layouts = Layouts(declared_config(surveyed.checkpoint) or {})
    actions = [_action(member, choice, family, layers, layouts) for member in members]
    if choice.recipe.smoothing == "awq":
        actions = scaled(members, actions, family)
    return with_casts(members, actions)


def _action(
    member: Member, choice: Choice, family: Family, layers: int, layouts: Layouts
) -> Action:
    layer, recipe = member.tensor_role.layer, choice.recipe
    module_names = _module_names(member, family)
    scheme = choice.scheme(member.role, module_names)
    as_stored = choice.as_stored(member.role, module_names)
    reason = KEPT_BECAUSE.get(member.role, f"{recipe.name} keeps it")
    if (scheme or as_stored) and recipe.keeps_layer(layer, layers):
        scheme, as_stored, reason = None, False, f"{recipe.name} keeps the layers at the ends"
    if member.stored and (scheme or as_stored):
        already = layouts.scheme(member.stored, scheme)
        if already or as_stored:
            reason = f"as the source stores it: {already.name}" if already else ""
            return replace(Action.kept(member, reason), as_stored=True, already=already)
    if scheme is None:
        return Action.kept(member, reason)
    made = () if _obstacle(member, scheme, family) else None
    return replace(Action.kept(member, ""), scheme=scheme, made=made)


def _obstacle(member: Member, scheme: Scheme, family: Family) -> str:
    """Return why a scheme cannot store a tensor, as the end of a sentence; empty if it can."""
    info, row = member.info, member.tensor_role.row
    if info.dtype not in FLOAT_WEIGHTS:
        return f"is {info.dtype}; {scheme.name} is made from BF16, F16 or F32"
    if len(info.shape) != 2 or 0 in info.shape or not info.name.endswith(".weight"):
        return f"is {list(info.shape)}; {scheme.name} needs the weight matrix of a layer"
    rows, columns = info.shape
    if columns % scheme.columns:
        return (
            f"is {list(info.shape)}: {columns} columns do not divide into "
            f"groups of {scheme.columns}"
        )
    if rows % scheme.rows and row.fused and row != family.fused_sets[row.fused][-1]:
        return (
            f"is {list(info.shape)}: {rows} rows do not divide into blocks of {scheme.rows}, and "
            "loaders put another matrix below them"
        )
    return ""


def _unquantizable(
    members: tuple[Member, ...], actions: list[Action], family: Family
) -> list[Finding]:
    unfit = [
        (member.tensor_role.row, action, obstacle)
        for member, action in zip(members, actions, strict=True)
        if action.stored_in and (obstacle := _obstacle(member, action.stored_in, family))
    ]
    if not unfit:
        return []
    _, action, obstacle = unfit[0]
    roles, fix = str(action.role), "or list all such modules in ignore"
    if action.already:  # each module that is ignored becomes BF16, and so must its fused set
        rows = [each for row, *_ in unfit for each in family.fused_sets.get(row.fused, (row,))]
        entries = [entry for row in dict.fromkeys(rows) for entry in row.patterns(str)]
        roles = " and ".join(dict.fromkeys(str(each.role) for _, each, _ in unfit))
        fix = f"or use ignore: {in_yaml(entries)}. They then become BF16"
    more = f" (and {len(unfit) - 1:,} more like it)" if len(unfit) > 1 else ""
    return [
        NOT_QUANTIZABLE.finding(
            action.source.name,
            f"{action.source.name} {obstacle}{more}.",
            f"Leave {roles} out of the recipe's roles, {fix}.",
        )
    ]


def _as_stored(
    members: tuple[Member, ...], actions: list[Action]
) -> tuple[list[Member], list[Action]]:
    """Return members and actions, with one copy of a tensor on disk that holds many kept tensors.

    If an expert's weight is quantized, its bias, which is kept, is written as a tensor of its own.
    """
    split = apart(members, {a.module for a in actions if a.stored_in})
    known = {action.source.name: action for action in actions}
    reasons = {a.source.held.by.name: a.reason for a in actions if a.source.held}
    stored = as_stored(members, split)
    return stored, [known.get(m.info.name) or Action.kept(m, reasons[m.info.name]) for m in stored]


def _work_units(members: list[Member], actions: list[Action]) -> list[WorkUnit]:
    """Group the actions by fused set; a set takes the place of its first member in the source."""
    groups: dict[FusedSet | str, list[Action]] = {}
    for member, action in zip(members, actions, strict=True):
        groups.setdefault(member.tensor_role.fused_set or member.info.name, []).append(action)
    ordered = (sorted(group, key=lambda a: a.source.name) for group in groups.values())
    return [WorkUnit(tuple(each for a in actions for each in copies(a))) for actions in ordered]


def _split_sets(units: list[WorkUnit]) -> list[Finding]:
    split = [unit for unit in units if len({a.stored_in for a in unit.actions}) > 1]
    if not split:
        return []
    kept = [a.module for a in split[0].actions if a.stored_in is None]
    return [
        FUSED_SET_MIXED.finding(
            split[0].actions[0].source.name,
            f"{names([a.module for a in split[0].actions])} are one matrix to loaders, but the "
            f"recipe keeps only {names(kept)}.",
            "Quantize all members of the set, or list all of them in ignore.",
        )
    ]


def _unlike_experts(actions: list[Action]) -> list[Finding]:
    """Return an error if a layer has both quantized and plain experts, which loaders refuse."""
    kept: dict[int | None, list[Action]] = {}
    for action in actions:
        if action.role is Role.EXPERT and action.stored_in is None:
            kept.setdefault(action.layer, []).append(action)
    quantized = {a.layer for a in actions if a.role is Role.EXPERT and a.stored_in}
    mixed = [layer for layer in kept if layer in quantized]
    if not mixed:
        return []
    modules = [action.module for action in kept[mixed[0]]]
    return [
        EXPERTS_MIXED.finding(
            modules[0],
            f"The recipe keeps {names(modules)} of layer {mixed[0]} and quantizes its other "
            "experts; vLLM refuses such a checkpoint.",
            "Quantize all experts of a layer, or list all of them in ignore.",
        )
    ]


def _nothing(actions: list[Action], recipe: Recipe) -> list[Finding]:
    if any(action.stored_in or (action.stored and action.as_stored) for action in actions):
        return []
    return [
        NOTHING_TO_QUANTIZE.finding(
            recipe.name,
            f"Recipe {recipe.name} quantizes no tensor of this checkpoint.",
            "Check the recipe's roles, targets and ignore.",
        )
    ]


def _too_many(actions: list[Action], recipe: Recipe) -> list[Finding]:
    count = sum(len(action.scheme.parts) if action.scheme else 1 for action in actions)
    if count <= MAX_TENSORS:
        return []
    return [
        OUTPUT_TOO_MANY.finding(
            recipe.name,
            f"The output of recipe {recipe.name} would have {count:,} tensors, and mquant opens "
            f"checkpoints of at most {MAX_TENSORS:,}.",
            "Take a recipe that stores fewer tensors for a weight, such as fp8-dynamic.",
        )
    ]


def cut_shards(items: Iterable[T], nbytes: Callable[[T], int], limit: int) -> dict[str, list[T]]:
    """Cut items into shards as full as `limit` bytes allow: final shard name -> items, in order.

    An item larger than the limit gets a shard of its own.
    """
    groups: list[list[T]] = []
    size = 0
    for item in items:
        if not groups or size + nbytes(item) > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += nbytes(item)
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def kept_modules(
    kept: Iterable[tuple[str, int | None, TensorInfo]], family: Family, config: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return the modules with a matrix among the `kept` (module, expert, tensor), in natural order.

    The result also has a head that is tied to the embeddings. Without these names,
    `targets: ["Linear"]` would claim the modules. The names are exact, because every loader reads
    exact names alike: the hub's name, and vLLM's own name if the two differ. A name that vLLM would
    rename to that of a tensor is an `re:` entry, which vLLM leaves as it is.
    """
    matrices = [entry for entry in kept if _is_matrix(entry[2])]
    tied = family.tied_heads(config)
    matrices += [(family.draft_in_vllm(m, config), expert, i) for m, expert, i in matrices]
    hub = {*tied, *(module for module, _, _ in matrices)}
    # vLLM looks up only the first expert of a layer.
    vllm = {
        name(module)
        for module, expert, _ in matrices
        for name in (family.in_vllm_name, family.third_in_vllm)
        if not expert
    }
    renames = family.vllm.outer_renames if family.vllm else ()
    ends = tuple(old.removesuffix("$") for old, _ in renames if old.endswith("$"))
    vllm = {f"re:{re.escape(each)}$" if each.endswith(ends) else each for each in vllm}
    return tuple(sorted(hub | vllm | {*map(family.in_vllm_name, tied)}, key=natural))


def _is_matrix(info: TensorInfo) -> bool:
    return info.name.endswith(".weight") and len(info.shape) == 2


def _unmatched(surveyed: Survey, family: Family, choice: Choice) -> list[Finding]:
    """Return findings for entries that match no module: typos, or usual in foreign recipes."""
    recipe = choice.recipe
    if not (choice.ignore.by_entry or choice.targets.by_entry):
        return []
    weights = (m for m in surveyed.members if m.info.name.endswith(".weight"))
    known = {name for member in weights for name in _module_names(member, family)}
    return [
        ENTRY_UNMATCHED.finding(
            entry,
            f"{entry!r} in {key} of recipe {recipe.name} matches no module of "
            f"{surveyed.checkpoint.source.name}.",
            "Correct the entry, or remove it. Names are those of the hub or of transformers; "
            "`re:` entries match from the start of a name.",
            "tolerated" if recipe.foreign else "source",
        )
        for key, entry_matches in (("ignore", choice.ignore), ("targets", choice.targets))
        for entry, matched in entry_matches.by_entry.items()
        if matched.isdisjoint(known)
    ]
