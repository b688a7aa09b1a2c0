"""What was not judged, and whether that decides if a loader takes the checkpoint.

A rule that was not applied has not passed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from mquant.findings import Finding, Knowledge, Needs, Rule
from mquant.loader_model.formats import StorageFormat, format_of
from mquant.loader_model.in_vllm import COVER_STYLES
from mquant.loader_model.modules import ModuleView
from mquant.text import plural

ASK_VLLM: Final = "Ask vLLM itself: mquant verify SRC --loader vllm"
_UNREAD: Final[Mapping[Needs, str]] = {
    "numbers": "the data were not read at this depth",
    "against": "no parent was given",
    "loader": "no loader was asked",
}


def unknown(view: ModuleView) -> dict[Knowledge, str]:
    """What mquant does not know of a checkpoint, each as a clause."""
    clauses: dict[Knowledge, str] = {}
    if view.family is None:
        model_type = str(view.checkpoint.config.get("model_type"))[:60]
        clauses["family"] = f"model_type {model_type!r} is of no family that mquant knows"
    method = "modelopt" if view.method.startswith("modelopt") else view.method
    if method and method not in COVER_STYLES:
        clauses["list"] = f"how {method[:60]!r} matches its ignore list is not known"
    other = [each.name for each in view.quantized if format_of(view, each) is StorageFormat.OTHER]
    if other:
        are = plural(len(other), "quantized module")
        clauses["layout"] = f"the layout of {are} is not known (first: {other[0]})"
    return clauses


def not_judged(
    view: ModuleView, rules: Iterable[Rule], looked: Iterable[str], findings: Iterable[Finding]
) -> dict[str, str]:
    """Why rules were not applied, by id.

    `looked` is what was read, as `Rule.needs` names it. A rule with a finding was applied.
    """
    clauses, looked = unknown(view), set(looked)
    applied = {finding.rule for finding in findings}
    whys: dict[str, str] = {}
    for each in rules:
        why = "" if each.needs in looked else _UNREAD.get(each.needs, "")
        why = why or next((clauses[key] for key in each.knowing if key in clauses), "")
        if why and each.id not in applied:
            whys[each.id] = why
    return whys


def undecided(view: ModuleView) -> str:
    """One sentence if what is not known decides whether a loader takes the checkpoint.

    Empty if the checkpoint is not quantized and config.json does not say that it is.
    """
    clauses = unknown(view)
    if not clauses or not (view.method or view.quantized):
        return ""
    why = "; ".join(clauses.values())
    return f"Whether vLLM takes {view.checkpoint.source.name} could not be judged: {why}."


def to_json(whys: Mapping[str, str]) -> list[dict[str, Any]]:
    """The key `not_judged` of JSON documents."""
    return [{"rule": rule, "why": why} for rule, why in sorted(whys.items())]


def in_words(whys: Mapping[str, str]) -> str:
    """How many rules were not judged, and why, in one sentence; empty if all were."""
    counts = Counter(whys.values())
    parts = ", ".join(f"{plural(count, 'rule')} ({why})" for why, count in counts.items())
    return f"Not judged: {parts}." if parts else ""
