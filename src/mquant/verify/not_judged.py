"""The rules that were not judged, and whether these rules decide if a loader takes a checkpoint.

A rule that was not applied has not passed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from mquant.dtypes import PLAIN_DTYPES
from mquant.family_rows import Role
from mquant.findings import Finding, Knowledge, Needs, Rule
from mquant.loader_model.modules import Module, ModuleView
from mquant.loader_model.storage import StorageFormat, format_of
from mquant.text import plural

Unknown = Mapping[Knowledge, str]
ASK_VLLM: Final = "Ask vLLM itself: mquant verify SRC --loader vllm"
_UNREAD: Final[Mapping[Needs, str]] = {
    "numbers": "the data were not read at this depth",
    "against": "no parent was given",
    "loader": "no loader was asked",
}


def unknown(view: ModuleView) -> dict[Knowledge, str]:
    """Return what mquant does not know about a checkpoint: a clause for each kind of knowledge."""
    clauses: dict[Knowledge, str] = {}
    if view.family is None:
        model_type = str(view.checkpoint.config.get("model_type"))[:60]
        clauses["family"] = f"model_type {model_type!r} is of no family that mquant knows"
    elif view.outcome.unknown:
        clauses["loader"] = f"what vLLM makes of {view.outcome.unknown} is not known"
    other = [m.name for m in view.modules.values() if _unknown_layout(view, m)]
    if other:
        modules = plural(len(other), "module")
        clauses["layout"] = f"the layout of {modules} is not known (first: {other[0]})"
    return clauses


def _unknown_layout(view: ModuleView, module: Module) -> bool:
    """Return whether a module is stored in a layout that mquant does not know.

    In an unknown family a module may be, if one of its tensors does not hold floats.
    """
    if module.quantized:
        return format_of(view, module) is StorageFormat.OTHER
    if view.family is None:
        return any(info.dtype not in PLAIN_DTYPES for info in module.tensors.values())
    named = module.role is not None and (module.role.linear or module.role is Role.EMBEDDING)
    return named and "weight" not in module.tensors


def not_judged(
    clauses: Unknown, rules: Iterable[Rule], needs: Iterable[str], findings: Iterable[Finding]
) -> dict[str, str]:
    """Return rule id -> why the rule was not applied.

    `clauses` is what `unknown` returned. `needs` are the values of `Rule.needs` that the run met. A
    rule with a finding was applied.
    """
    needs, applied = set(needs), {finding.rule for finding in findings}
    reasons: dict[str, str] = {}
    for rule in rules:
        why = "" if rule.needs in needs else _UNREAD.get(rule.needs, "")
        why = why or next((clauses[key] for key in rule.knowing if key in clauses), "")
        if why and rule.id not in applied:
            reasons[rule.id] = why
    return reasons


def undecided(view: ModuleView, clauses: Unknown) -> str:
    """Return one sentence if an unknown fact decides whether a loader takes the checkpoint.

    Empty if vLLM's loader is known to take the checkpoint, or to refuse it.
    """
    if not view.outcome.unknown:
        return ""
    why = "; ".join(clauses.values())
    return f"Whether vLLM takes {view.checkpoint.source.name} could not be judged: {why}."


def to_json(reasons: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the value of the key `not_judged` in JSON documents."""
    return [{"rule": rule, "why": why} for rule, why in sorted(reasons.items())]


def in_words(reasons: Mapping[str, str]) -> str:
    """Return one sentence: how many rules were not judged, and why; empty if all rules were."""
    counts = Counter(reasons.values())
    parts = ", ".join(f"{plural(count, 'rule')} ({why})" for why, count in counts.items())
    return f"Not judged: {parts}." if parts else ""
