"""The checks of `verify-ignore`: one finding for each rule, even if many modules break the rule."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Final

from mquant.family_rows import Role
from mquant.findings import Finding, Rule, rule
from mquant.loader_model.declared import declared_config
from mquant.loader_model.modules import ModuleView
from mquant.loader_model.vllm_view import Group, Judged, VllmView
from mquant.plan.never_quantized import QUANTIZED
from mquant.text import names

_LISTS: Final = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers")

EXPERT_NAMES: Final = rule(
    "expert-names",
    "Experts have the hub's names, not transformers' names of a loaded model.",
    "Saving a loaded MiniMax-M2 writes gate_proj, up_proj and down_proj for w1, w3 and w2. vLLM "
    "skips such names without an error, and every expert is left uninitialised.",
    "Rename the tensors, which `mquant repair SRC --from PARENT` does.",
    knowing=("family",),
    if_loads="nothing",
)
KEPT_BUT_NOT_IGNORED: Final = rule(
    "kept-but-not-ignored",
    "A linear layer that is plain on disk is in `ignore`, under the name vLLM has for it.",
    "vLLM builds a quantized layer for every target that is not ignored. vLLM then refuses the "
    "plain weight, or leaves the layer uninitialised.",
    "Add the layers' names to `ignore` in config.json; for experts, add vLLM's names.",
    knowing=("family", "loader"),
    if_loads="nothing",
)
IGNORED_BUT_QUANTIZED: Final = rule(
    "ignored-but-quantized",
    "A layer that is quantized on disk is not in `ignore`.",
    "vLLM builds ignored layers plain, and refuses scales and packed weights for them.",
    "Remove the layers' names from `ignore` in config.json.",
    knowing=("family", "loader"),
    if_loads="nothing",
)
QUANTIZED_NOT_TARGETED: Final = rule(
    "quantized-not-targeted",
    "A layer that is quantized on disk is a target of some `config_groups` entry.",
    "vLLM builds layers that no target matches plain, and refuses their scales. vLLM matches "
    'experts by its own names; `targets: ["Linear"]` matches all.',
    'Set `targets` in config.json to ["Linear"].',
    knowing=("family", "loader"),
    if_loads="nothing",
)
FUSED_SET_SPLIT: Final = rule(
    "fused-set-split",
    "Layers that vLLM fuses are all in `ignore`, or all outside of `ignore`.",
    "vLLM fuses q, k and v into one layer, and all experts into one: vLLM refuses a fused layer"
    " that `ignore` or `targets` cut in two.",
    "Name all layers of the fused set, or no layer of the set.",
    knowing=("family", "loader"),
    if_loads="nothing",
)
QUANTIZATION_UNDECLARED: Final = rule(
    "quantization-undeclared",
    "If tensors are quantized, config.json declares the quantization.",
    "Without `quantization_config` a loader builds every layer plain, and refuses the scales.",
    "Write the `quantization_config` that the tensors were made with.",
    if_loads="nothing",
)
IGNORE_BAD_ENTRY: Final = rule(
    "ignore-bad-entry",
    "Every entry of `ignore` and `targets` is a string; `re:` precedes a regular expression.",
    "vLLM compiles every expression, and stops at the first invalid one.",
    "Correct the list in config.json, with exact names; `mquant plan` shows them.",
    knowing=("loader",),
    if_loads="warning",
)
IGNORE_UNCOVERED: Final = rule(
    "ignore-uncovered",
    "Routers, lm_head and embeddings that are kept are named in `ignore`.",
    "vLLM still loads the checkpoint. Other loaders, and tools that quantize again with "
    "the same list, may quantize these layers.",
    "Add the layers' exact names to `ignore` in config.json.",
    severity="warning",
    knowing=("loader",),
)
IGNORE_UNMATCHED: Final = rule(
    "ignore-unmatched",
    "Every entry of `ignore` matches a name of the hub or of vLLM.",
    "An entry that matches nothing protects nothing: often the name is another model's, or the "
    "expression is anchored at the start by mistake.",
    "Correct the list in config.json, with exact names; `mquant plan` shows them.",
    severity="warning",
    knowing=("family", "loader"),
)
IGNORE_HUB_ONLY: Final = rule(
    "ignore-hub-only",
    "Entries for experts match vLLM's names too.",
    "vLLM looks experts up as `mlp.experts.0.w1`, whatever the tensors' names: an entry for "
    "another name or another expert has no effect.",
    "Write the entry for vLLM's name, too.",
    severity="warning",
    knowing=("family", "loader"),
)
IGNORE_RULES: Final = (
    *QUANTIZED.values(),
    *(value for value in tuple(globals().values()) if isinstance(value, Rule)),
)
"""The rules of this module's checks."""


def findings_of(
    vllm_view: VllmView, quantized: list[Judged], uncovered: list[str]
) -> list[Finding]:
    """Return all findings about a quantized checkpoint; an empty list for a plain checkpoint.

    `quantized` are quantized modules that loaders refuse. `uncovered` are names of plain modules
    that the ignore list does not name.
    """
    view = vllm_view.view
    if not view.method and not view.quantized:
        return []
    return [
        *_refused(quantized),
        *_misnamed(vllm_view),
        *_undeclared(view),
        *_bad_entries(vllm_view),
        *_disagreements(vllm_view),
        *_uncovered(uncovered),
        *_unmatched(vllm_view),
        *_hub_only(vllm_view),
    ]


def _refused(quantized: list[Judged]) -> Iterator[Finding]:
    for role, refused in QUANTIZED.items():
        group = [judged for judged in quantized if judged.role is role]
        if group:
            modules = [judged.module.name for judged in group]
            suffixes = sorted({s for judged in group for s in judged.module.quantized})
            yield refused.finding(
                modules[0],
                f"{_are(modules, f'{role.value} module')} quantized ({names(modules)}), with "
                f"{names(suffixes, 6)} on disk.",
            )


def _misnamed(vllm_view: VllmView) -> Iterator[Finding]:
    group = [j.module.name for j in vllm_view.judged if j.misnamed and j.role is Role.EXPERT]
    if group:
        yield EXPERT_NAMES.finding(
            group[0],
            f"{_are(group, 'expert module')} named as in a loaded model ({names(group)}); vLLM "
            "loads the checkpoint without an error and leaves these experts uninitialised.",
        )


def _undeclared(view: ModuleView) -> Iterator[Finding]:
    modules = [module.name for module in view.quantized]
    if modules and not view.method and declared_config(view.checkpoint) is None:
        yield QUANTIZATION_UNDECLARED.finding(
            "config.json",
            f"{_are(modules, 'module')} quantized ({names(modules)}), but config.json has no "
            "quantization_config.",
        )


def _bad_entries(vllm_view: VllmView) -> Iterator[Finding]:
    if vllm_view.style is None:
        return
    for key, bad in (("ignore", vllm_view.ignore.bad), ("targets", vllm_view.targets.bad)):
        for entry, reason in [*bad.items()][:1]:
            more = f" (and {len(bad) - 1:,} more like it)" if len(bad) > 1 else ""
            yield IGNORE_BAD_ENTRY.finding(
                entry,
                f"{entry!r} in {key} is no regular expression ({reason}){more}; vLLM stops.",
            )
    for key in _LISTS:
        value = vllm_view.view.config.get(key)
        strings = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        if value is not None and not strings:
            yield IGNORE_BAD_ENTRY.finding(key, f"{key} of config.json is no list of strings.")


def _disagreements(vllm_view: VllmView) -> Iterator[Finding]:
    """Yield findings about layers that vLLM builds otherwise than the layers are stored."""
    split = [group.members[0].module.name for group in vllm_view.groups if group.quantized is None]
    if split:
        yield FUSED_SET_SPLIT.finding(
            split[0],
            f"ignore or targets match some, but not all, modules of a layer that vLLM fuses, "
            f"{_many(split, 'time')} (first: the layer of {split[0]}).",
        )
    wrong: dict[Rule, list[Judged]] = defaultdict(list)
    for group in vllm_view.groups:
        for judged in group.members:
            on_disk = bool(judged.module.quantized)
            # A quantized head has its own finding.
            known = on_disk and judged.role.refused_by_loaders
            if group.quantized is not None and on_disk is not group.quantized and not known:
                wrong[_disagreement(group)].append(judged)
    for broken, group_ in wrong.items():
        yield _disagreement_finding(broken, group_)


def _disagreement(group: Group) -> Rule:
    if group.quantized:
        return KEPT_BUT_NOT_IGNORED
    return IGNORED_BUT_QUANTIZED if group.ignored else QUANTIZED_NOT_TARGETED


def _disagreement_finding(broken: Rule, group: list[Judged]) -> Finding:
    sentence = {
        KEPT_BUT_NOT_IGNORED: "plain on disk, but vLLM takes {0} for quantized: targets match "
        "{0}, ignore does not",
        IGNORED_BUT_QUANTIZED: "quantized on disk, but vLLM takes {0} for plain: ignore matches "
        "{0}",
        QUANTIZED_NOT_TARGETED: "quantized on disk, but vLLM takes {0} for plain: no target "
        "matches {0}",
    }[broken]
    modules = [judged.module.name for judged in group]
    first = group[0]
    known_as = "" if first.vllm[0] == first.module.name else f" (vLLM's name is {first.vllm[0]})"
    predicate = sentence.format("it" if len(group) == 1 else "them")
    return broken.finding(
        modules[0], f"{_are(modules, 'module')} {predicate}. First: {first.module.name}{known_as}."
    )


def _uncovered(modules: list[str]) -> Iterator[Finding]:
    if modules:
        yield IGNORE_UNCOVERED.finding(
            modules[0],
            f"{_are(modules, 'module')} kept, but ignore does not name "
            f"{'it' if len(modules) == 1 else 'them'} ({names(modules)}).",
        )


def _unmatched(vllm_view: VllmView) -> Iterator[Finding]:
    if vllm_view.style is None or vllm_view.view.family is None or not vllm_view.ignore.by_entry:
        return
    known = vllm_view.hub | vllm_view.vllm
    idle = [entry for entry, matches in vllm_view.ignore.by_entry.items() if not matches & known]
    if idle:
        in_memory = any(vllm_view.ignore.by_entry[entry] for entry in idle)
        yield IGNORE_UNMATCHED.finding(
            idle[0],
            f"{_entries_match(idle)} nothing, neither on the hub nor in vLLM ({names(idle)})"
            + ("; only transformers has such names." if in_memory else "."),
        )


def _hub_only(vllm_view: VllmView) -> Iterator[Finding]:
    if vllm_view.method != "compressed-tensors":
        return
    experts = {j.module.name: set(j.vllm) for j in vllm_view.judged if j.role is Role.EXPERT}
    in_vllm: set[str] = set().union(*experts.values())
    idle = []
    for entry, matches in vllm_view.ignore.by_entry.items():
        meant = matches & experts.keys()
        # A list of exact names has every expert's name: vLLM looks up only the first expert's.
        if meant and any(experts[name].isdisjoint(vllm_view.ignored_by_vllm) for name in meant):
            idle.append(entry)
    if idle:
        yield IGNORE_HUB_ONLY.finding(
            idle[0],
            f"{_entries_match(idle)} experts by the hub's names alone, and vLLM's are like "
            f"{min(in_vllm)} ({names(idle)}).",
        )


def _many(items: Collection[str], noun: str) -> str:
    return f"{len(items):,} {noun}{'' if len(items) == 1 else 's'}"


def _are(items: Collection[str], noun: str) -> str:
    return f"{_many(items, noun)} {'is' if len(items) == 1 else 'are'}"


def _entries_match(entries: Collection[str]) -> str:
    if len(entries) == 1:
        return "1 entry of ignore matches"
    return f"{len(entries):,} entries of ignore match"
