"""What was not judged, and whether that decides if a loader takes the checkpoint.

A rule that was not applied has not passed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from mquant.dtypes import PLAIN_DTYPES
from mquant.family import Role
from mquant.findings import Finding, Knowledge, Needs, Rule
from mquant.loader_model.formats import StorageFormat, format_of
from mquant.loader_model.in_vllm import COVER_STYLES
from mquant.loader_model.modules import Module, ModuleView
from mquant.loader_model.vllm_methods import unknown_config
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
    config = view.checkpoint.config
    declared = config.get("architectures", "none")  # `config-key-missing`, if there are none
    if view.family is None:
        model_type = str(config.get("model_type"))[:60]
        clauses["family"] = f"model_type {model_type!r} is of no family that mquant knows"
    elif declared not in ("none", view.family.synth.config.get("architectures", declared)):
        clauses["family"] = f"architectures {str(declared)[:60]} is not {view.family.title}'s"
    method = "modelopt" if view.method.startswith("modelopt") else view.method
    if method and method not in COVER_STYLES:
        clauses["list"] = f"how {method[:60]!r} matches its ignore list is not known"
    other = [each.name for each in view.modules.values() if _unknown_layout(view, each)]
    if other:
        are = plural(len(other), "module")
        clauses["layout"] = f"the layout of {are} is not known (first: {other[0]})"
    elif why := unknown_config(view):
        clauses["layout"] = why
    return clauses


def _unknown_layout(view: ModuleView, module: Module) -> bool:
    """Whether a module is stored as no layout that is known stores a module.

    In an unknown family that is every module with a tensor that is not of floats.
    """
    if module.quantized:
        return format_of(view, module) is StorageFormat.OTHER
    if view.family is None:
        return any(info.dtype not in PLAIN_DTYPES for info in module.tensors.values())
    named = module.role is not None and (module.role.linear or module.role is Role.EMBEDDING)
    return named and "weight" not in module.tensors


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

    Empty if every module is plain and config.json does not say that one is quantized.
    """
    clauses = unknown(view)
    if not clauses or not (view.method or view.quantized or "layout" in clauses):
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
