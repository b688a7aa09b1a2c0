"""Judge the ignore list: quantized modules that loaders may refuse, and entries without effect."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mquant.errors import NotJudged
from mquant.family_rows import Role
from mquant.findings import Finding
from mquant.loader_model.modules import ModuleView
from mquant.loader_model.vllm.load import Outcome
from mquant.loader_model.vllm.words import in_words
from mquant.loader_model.vllm_view import Judged, VllmView, vllm_view_of
from mquant.plan.never_quantized import QUANTIZED
from mquant.verify.ignore_checks import EXPERT_NAMES, IGNORE_RULES, findings_of
from mquant.verify.loading import with_outcome
from mquant.verify.not_judged import ASK_VLLM, not_judged, to_json, undecided, unknown
from mquant.verify.stands_for import NOT_MODELLED, VLLM, StandsFor, stands_for

_PLURAL: Final = {Role.ROUTER: "routers", Role.EMBEDDING: "embeddings", Role.HEAD: "heads"}


@dataclass(frozen=True, slots=True)
class RoleCount:
    """The numbers of one role's modules: all, plain, quantized, and covered by `ignore`."""

    role: Role
    found: int
    kept: int
    quantized: int
    covered: int


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the ignore list, and how many names of each kind the entry matches."""

    entry: str
    hub: int
    vllm: int
    in_memory: int


@dataclass(frozen=True)
class IgnoreReport:
    """The result of `verify-ignore`.

    `verdict` is one sentence. `quantized` are quantized modules that loaders may refuse, with their
    suffixes on disk. `uncovered` are plain modules that the list does not name.
    """

    verdict: str
    source: str
    family: str | None
    method: str
    kinds: tuple[RoleCount, ...]
    quantized: tuple[tuple[str, Role, tuple[str, ...]], ...]
    entries: tuple[Entry, ...]
    uncovered: tuple[str, ...]
    findings: tuple[Finding, ...]
    not_judged: Mapping[str, str]
    undecided: str
    stands_for: StandsFor | None = None

    def raise_if_undecided(self) -> None:
        """Raise NotJudged if what was not judged decides whether a loader takes the checkpoint."""
        if self.undecided and not any(each.severity == "error" for each in self.findings):
            raise NotJudged(self.undecided, ASK_VLLM)

    def to_json(self) -> dict[str, Any]:
        """Return `mquant.verify-ignore/1` without the envelope's keys and `findings`."""
        return {
            "verdict": self.verdict,
            "source": self.source,
            "family": self.family,
            "method": self.method or None,
            "kinds": {
                kind.role.value: {
                    "found": kind.found,
                    "kept": kind.kept,
                    "quantized": kind.quantized,
                    "covered": kind.covered,
                }
                for kind in self.kinds
            },
            "quantized": [
                {"module": module, "role": role.value, "suffixes": list(suffixes)}
                for module, role, suffixes in self.quantized
            ],
            "ignore": [
                {
                    "entry": entry.entry,
                    "matches": {
                        "hub": entry.hub,
                        "vllm": entry.vllm,
                        "transformers": entry.in_memory,
                    },
                }
                for entry in self.entries
            ],
            "uncovered": list(self.uncovered),
            "stands_for": self.stands_for.to_json() if self.stands_for else None,
            "not_modelled": list(NOT_MODELLED),
            "not_judged": to_json(self.not_judged),
        }


def check_ignore(view: ModuleView) -> IgnoreReport:
    """Judge what is quantized, and the ignore list, as vLLM does when it loads the checkpoint.

    Raises SourceError if the ignore list takes too long to match.
    """
    vllm_view = vllm_view_of(view)
    quantized, uncovered = _refused(vllm_view), _uncovered(vllm_view)
    explained = findings_of(vllm_view, quantized, uncovered)
    findings = with_outcome(explained, view.outcome, refusal_only=True)
    kinds, clauses = _kinds(vllm_view), unknown(view)
    return IgnoreReport(
        verdict=_verdict(vllm_view, kinds, findings),
        source=view.checkpoint.source.name,
        family=view.family.name if view.family else None,
        method=view.method,
        kinds=kinds,
        quantized=tuple((j.module.name, j.role, j.module.quantized) for j in quantized),
        entries=_entries(vllm_view),
        uncovered=tuple(uncovered),
        findings=tuple(findings),
        not_judged=not_judged(clauses, IGNORE_RULES, ("structure",), findings),
        undecided=undecided(view, clauses),
        stands_for=stands_for(view.outcome),
    )


def ignore_findings(view: ModuleView) -> list[Finding]:
    """Return the findings of `check_ignore`, whatever vLLM does with the checkpoint."""
    vllm_view = vllm_view_of(view)
    return findings_of(vllm_view, _refused(vllm_view), _uncovered(vllm_view))


def _refused(vllm_view: VllmView) -> list[Judged]:
    return [j for j in vllm_view.judged if j.role.refused_by_loaders and j.module.quantized]


def _kinds(vllm_view: VllmView) -> tuple[RoleCount, ...]:
    by_role: dict[Role, list[Judged]] = defaultdict(list)
    for judged in vllm_view.judged:
        by_role[judged.role].append(judged)
    order = [*QUANTIZED, *(role for role in Role if role not in QUANTIZED)]
    kinds = []
    for role in (role for role in order if role in by_role):
        group = by_role[role]
        quantized = sum(bool(judged.module.quantized) for judged in group)
        covered = sum(map(vllm_view.covered, group))
        kinds.append(RoleCount(role, len(group), len(group) - quantized, quantized, covered))
    return tuple(kinds)


def _entries(vllm_view: VllmView) -> tuple[Entry, ...]:
    if not vllm_view.ignore.by_entry:
        return ()
    in_memory = frozenset(vllm_view.in_memory.values())
    return tuple(
        Entry(
            entry, len(names & vllm_view.hub), len(names & vllm_view.vllm), len(names & in_memory)
        )
        for entry, names in vllm_view.ignore.by_entry.items()
    )


def _uncovered(vllm_view: VllmView) -> list[str]:
    # Only tools that select modules by tensor names quantize embeddings as linear layers, and
    # these tools write compressed-tensors.
    roles = set(QUANTIZED) - (
        {Role.EMBEDDING} if vllm_view.method != "compressed-tensors" else set()
    )
    return [
        judged.module.name
        for judged in vllm_view.judged
        if vllm_view.style and judged.role in roles
        if not judged.module.quantized and not vllm_view.covered(judged)
    ]


def _verdict(vllm_view: VllmView, kinds: tuple[RoleCount, ...], findings: list[Finding]) -> str:
    rules = {finding.rule for finding in findings if finding.severity == "error"}
    refused = [kind for kind in kinds if kind.role in QUANTIZED and kind.quantized]
    if refused:
        are = _are([_part(kind, kind.quantized) for kind in refused])
        return f"{are} quantized: {_consequence(vllm_view.view.outcome)}."
    if EXPERT_NAMES.id in rules:
        return (
            f"The experts have names that {VLLM} does not know: vLLM will load this checkpoint "
            "without an error and leave the experts uninitialised."
        )
    if rules and vllm_view.view.outcome.refused:
        return f"{VLLM} {in_words(vllm_view.view.outcome, 'this checkpoint')[1]}."
    if rules:
        return f"{VLLM} will not load this checkpoint: its config.json and its tensors disagree."
    parts = [_part(kind, kind.found) for kind in kinds if kind.role in QUANTIZED]
    kept = f"{_are(parts)} kept" if parts else "No router, lm_head or embeddings were found"
    if not vllm_view.view.method:
        return f"Nothing is quantized, so there is no ignore list to judge. {kept}."
    if vllm_view.view.family is None:
        found = any(kind.role is Role.ROUTER for kind in kinds)
        known = "are known by usual names and shapes alone" if found else "cannot be judged"
        return f"{kept}; routers of an unknown family {known}."
    if vllm_view.style is None:
        return f"{kept}; what the ignore list means was not judged."
    if vllm_view.view.outcome.unknown:
        return f"{kept}; whether {VLLM} loads this checkpoint is not known."
    return f"{kept}: nothing in ignore stops {VLLM} from loading this checkpoint."


def _consequence(outcome: Outcome) -> str:
    """Return what loaders do with quantized routers, heads or embeddings, as a clause."""
    if outcome.unknown:
        return f"loaders may refuse this checkpoint; what {VLLM} does with it is not known"
    if outcome.loads:
        return f"{VLLM} will load this checkpoint, and other loaders may not"
    if outcome.refused:
        return f"{VLLM} will refuse to load this checkpoint"
    return f"{VLLM} will load this checkpoint wrongly"


def _part(kind: RoleCount, count: int) -> tuple[str, bool]:
    """Return the modules of one role in words, and whether the words are plural."""
    if kind.found == 1:
        singular = {Role.HEAD: "lm_head", Role.EMBEDDING: "the embeddings"}
        return singular.get(kind.role, "the only router"), kind.role is Role.EMBEDDING
    if kind.quantized:
        return f"{count:,} of {kind.found:,} {_PLURAL[kind.role]}", True
    return f"all {count:,} {_PLURAL[kind.role]}", True


def _are(parts: list[tuple[str, bool]]) -> str:
    *first, last = [text for text, _ in parts]
    text = f"{', '.join(first)} and {last}" if first else last
    if not text.startswith("lm_head"):  # a name keeps its spelling
        text = text[0].upper() + text[1:]
    return f"{text} {'are' if first or parts[0][1] else 'is'}"
