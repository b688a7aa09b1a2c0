"""The checks of `verify-ignore`: one finding a rule, however many modules it is about."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Final

from mquant.family import Role
from mquant.findings import Finding
from mquant.loader_model.in_vllm import Group, Judged, VllmView
from mquant.loader_model.modules import ModuleView
from mquant.text import names
from mquant.verify.ignore_rules import QUANTIZED
from mquant.verify.rules import finding

_LISTS: Final = ("ignore", "exclude_modules", "modules_to_not_convert")


def findings_of(
    vllm_view: VllmView, quantized: list[Judged], uncovered: list[str]
) -> list[Finding]:
    """Everything to be said of a checkpoint; nothing, where nothing is quantized.

    `quantized` are the modules that loaders refuse quantized; `uncovered` the names of those
    that are kept, but that the ignore list does not mean.
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
        *_not_judged(vllm_view),
    ]


def _refused(quantized: list[Judged]) -> Iterator[Finding]:
    for role, rule in QUANTIZED.items():
        group = [judged for judged in quantized if judged.role is role]
        if group:
            modules = [judged.module.name for judged in group]
            suffixes = sorted({s for judged in group for s in judged.module.quantized})
            yield finding(
                rule,
                modules[0],
                f"{_are(modules, f'{role.value} module')} quantized ({names(modules)}), with "
                f"{names(suffixes, 6)} on disk; vLLM refuses to load that.",
            )


def _misnamed(vllm_view: VllmView) -> Iterator[Finding]:
    group = [j.module.name for j in vllm_view.judged if j.misnamed and j.role is Role.EXPERT]
    if group:
        yield finding(
            "expert-names",
            group[0],
            f"{_are(group, 'expert module')} named as in a loaded model ({names(group)}); vLLM "
            "loads this without an error and leaves these experts uninitialised.",
        )


def _undeclared(view: ModuleView) -> Iterator[Finding]:
    modules = [module.name for module in view.quantized]
    if modules and not view.method:
        yield finding(
            "quantization-undeclared",
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
            yield finding(
                "ignore-bad-entry",
                entry,
                f"{entry!r} in {key} is no regular expression ({reason}){more}; vLLM stops there.",
            )
    for key in _LISTS:
        value = vllm_view.view.config.get(key)
        strings = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        if value is not None and not strings:
            yield finding("ignore-bad-entry", key, f"{key} of config.json is no list of strings.")


def _disagreements(vllm_view: VllmView) -> Iterator[Finding]:
    """Where vLLM builds a layer in one way and the tensors on disk are of the other."""
    split = [group.members[0].module.name for group in vllm_view.groups if group.quantized is None]
    if split:
        yield finding(
            "fused-set-split",
            split[0],
            f"ignore or targets match some of the modules that vLLM makes one layer of, but not "
            f"all, {_many(split, 'time')} (first: the layer of {split[0]}).",
        )
    wrong: dict[str, list[Judged]] = defaultdict(list)
    for group in vllm_view.groups:
        for judged in group.members:
            on_disk = bool(judged.module.quantized)
            # A quantized head has its own finding.
            known = on_disk and judged.role.refused_by_loaders
            if group.quantized is not None and on_disk is not group.quantized and not known:
                wrong[_disagreement(group)].append(judged)
    for rule, group_ in wrong.items():
        yield _disagreement_finding(rule, group_)


def _disagreement(group: Group) -> str:
    if group.quantized:
        return "kept-but-not-ignored"
    return "ignored-but-quantized" if group.ignored else "quantized-not-targeted"


def _disagreement_finding(rule: str, group: list[Judged]) -> Finding:
    sentence = {
        "kept-but-not-ignored": "plain on disk, but vLLM takes {0} for quantized: targets match "
        "{0}, ignore does not",
        "ignored-but-quantized": "quantized on disk, but vLLM takes {0} for plain: ignore matches "
        "{0}",
        "quantized-not-targeted": "quantized on disk, but vLLM takes {0} for plain: no target "
        "matches {0}",
    }[rule]
    modules = [judged.module.name for judged in group]
    first = group[0]
    known_as = "" if first.vllm[0] == first.module.name else f" (to vLLM it is {first.vllm[0]})"
    said = sentence.format("it" if len(group) == 1 else "them")
    return finding(
        rule,
        modules[0],
        f"{_are(modules, 'module')} {said}. First: {first.module.name}{known_as}.",
    )


def _uncovered(modules: list[str]) -> Iterator[Finding]:
    if modules:
        yield finding(
            "ignore-uncovered",
            modules[0],
            f"{_are(modules, 'module')} kept, but ignore does not name "
            f"{'it' if len(modules) == 1 else 'them'} ({names(modules)}).",
        )


def _unmatched(vllm_view: VllmView) -> Iterator[Finding]:
    if vllm_view.style is None or vllm_view.view.family is None:
        return
    known = vllm_view.hub | vllm_view.vllm
    idle = [entry for entry, found in vllm_view.ignore.by_entry.items() if not found & known]
    if idle:
        in_memory = any(vllm_view.ignore.by_entry[entry] for entry in idle)
        yield finding(
            "ignore-unmatched",
            idle[0],
            f"{_entries_match(idle)} nothing, neither on the hub nor in vLLM ({names(idle)})"
            + ("; only transformers has such names." if in_memory else "."),
        )


def _hub_only(vllm_view: VllmView) -> Iterator[Finding]:
    if vllm_view.method != "compressed-tensors":
        return
    experts = {j.module.name: set(j.vllm) for j in vllm_view.judged if j.role is Role.EXPERT}
    in_vllm: set[str] = set().union(*experts.values())
    vain = []
    for entry, found in vllm_view.ignore.by_entry.items():
        means = found & experts.keys()
        # Lists of exact names have one for every expert: vLLM looks only the first one up.
        if means and any(experts[name].isdisjoint(vllm_view.ignored_by_vllm) for name in means):
            vain.append(entry)
    if vain:
        yield finding(
            "ignore-hub-only",
            vain[0],
            f"{_entries_match(vain)} experts by the hub's names alone, and vLLM's are like "
            f"{min(in_vllm)} ({names(vain)}).",
        )


def _not_judged(vllm_view: VllmView) -> Iterator[Finding]:
    view = vllm_view.view
    if view.family is None:
        kind = str(view.checkpoint.config.get("model_type"))[:60]
        yield finding(
            "ignore-not-judged",
            "config.json",
            f"The family of model_type {kind} is not known: only lm_head and embeddings under "
            "their usual names were judged.",
        )
    if view.method and vllm_view.style is None:
        yield finding(
            "ignore-not-judged",
            "config.json",
            f"How {view.method[:60]} matches its list is not known: only the tensors were judged.",
        )


def _many(items: Collection[str], noun: str) -> str:
    return f"{len(items):,} {noun}{'' if len(items) == 1 else 's'}"


def _are(items: Collection[str], noun: str) -> str:
    return f"{_many(items, noun)} {'is' if len(items) == 1 else 'are'}"


def _entries_match(entries: Collection[str]) -> str:
    if len(entries) == 1:
        return "1 entry of ignore matches"
    return f"{len(entries):,} entries of ignore match"


__all__ = ["findings_of"]
