"""Judge a checkpoint: read what its depth needs, apply every rule, and say what was not judged."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from mquant.checkpoint import Source, open_checkpoint
from mquant.checkpoint.hub import HubRepo
from mquant.errors import NotJudged
from mquant.events import Emit, silent
from mquant.family import Family
from mquant.findings import RULES, VERIFIED, Finding, Severity
from mquant.loader_model.modules import ModuleView, read_modules
from mquant.loader_model.vllm.load import Outcome
from mquant.text import plural
from mquant.verify.after_loading import check_after_loading
from mquant.verify.against_parent import check_against
from mquant.verify.digests import check_digests, refuse_changed
from mquant.verify.ignore_report import ignore_findings
from mquant.verify.loaders.ask_vllm import Verdict, ask
from mquant.verify.loading import with_outcome
from mquant.verify.not_judged import ASK_VLLM, not_judged, to_json, undecided, unknown
from mquant.verify.numbers import (
    GLOBAL_SCALE_INVERTED,
    GLOBAL_SCALES_RECIPROCAL,
    check_numbers,
)
from mquant.verify.stands_for import NOT_MODELLED, StandsFor, outcome_of, stands_for
from mquant.verify.structure import check_structure
from mquant.verify.tensor_parallel import check_parallel

_ORDER: Final[tuple[Severity, ...]] = ("error", "warning", "info")


class Depth(StrEnum):
    """The amount of data to read: headers and JSON; also all data; also every row of the parent."""

    STRUCTURE = "structure"
    NUMBERS = "numbers"
    FULL = "full"


@dataclass(frozen=True)
class Report:
    """The result of a verification.

    `findings` are sorted, errors first; `wrong` are all tensors with wrong numbers, and all tensors
    of a shard that is not the shard in mquant.json; `as_recorded` are the files whose size and
    sha256 are those in mquant.json. `checked` names what was judged: `structure`, `numbers`,
    `against` (the parent, `sampled` or not) and `vllm`. `bytes_read` and `requests` count the
    downloads of both checkpoints; None if no checkpoint is a hub repo. `loader` is a real loader's
    verdict. `stands_for` is the loader that the whole verdict stands for; None if it is not known
    what a loader does. `not_judged` says why rules were not applied. `undecided` is a sentence if
    an unknown fact decides whether a loader takes the checkpoint, and no loader judged it.
    """

    source: str
    family: str | None
    method: str
    tensors: int
    quantized: int
    parent: str | None
    checked: tuple[str, ...]
    sampled: bool
    findings: tuple[Finding, ...]
    wrong: frozenset[str] = frozenset()
    as_recorded: frozenset[str] = frozenset()
    bytes_read: int | None = None
    requests: int | None = None
    loader: Verdict | None = None
    stands_for: StandsFor | None = None
    not_judged: Mapping[str, str] = field(default_factory=dict)
    undecided: str = ""

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return Counter(finding.severity for finding in self.findings)[severity]

    @property
    def verdict(self) -> str:
        """The report in one sentence."""
        depths = ["structure"]
        depths += ["numbers"] if "numbers" in self.checked else []
        extent = " and ".join(depths)
        if self.parent is not None:
            how = "a sample of its weights" if self.sampled else "all of its weights"
            extent += f", compared with {self.parent} ({how})"
        counts = f"{plural(self.tensors, 'tensor')}, {plural(self.quantized, 'quantized module')}"
        loader = f" for {self.stands_for}" if self.stands_for else ""
        errors, warnings = self.count("error"), self.count("warning")
        wrong = [
            plural(count, noun)
            for count, noun in ((errors, "error"), (warnings, "warning"))
            if count
        ]
        if errors:
            return f"Broken{loader}: {', '.join(wrong)} in {counts}; checked {extent}."
        if self.undecided:
            warned = f", {wrong[0]}" if wrong else ""
            return f"Not judged: {counts}{warned}, checked {extent}. {self.undecided}"
        if warnings:
            return f"Sound{loader}, with {wrong[0]}: {counts}, checked {extent}."
        return f"Clean{loader}: {counts}, checked {extent}."

    def raise_if_undecided(self) -> None:
        """Raise NotJudged if what was not judged decides whether a loader takes the checkpoint."""
        if self.undecided and not self.count("error"):
            raise NotJudged(self.undecided, ASK_VLLM)

    def to_json(self) -> dict[str, Any]:
        """Return `mquant.verify/1` without the envelope's keys and `findings`."""
        return {
            "source": self.source,
            "family": self.family,
            "quantization": self.method or None,
            "tensors": self.tensors,
            "quantized_modules": self.quantized,
            "parent": self.parent,
            "checked": list(self.checked),
            "sampled": self.sampled,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "bytes_read": self.bytes_read,
            "requests": self.requests,
            "loader": self.loader.to_json() if self.loader else None,
            "stands_for": self.stands_for.to_json() if self.stands_for else None,
            "not_modelled": list(NOT_MODELLED),
            "not_judged": to_json(self.not_judged),
        }


def verify(
    source: Source,
    families: Mapping[str, Family],
    depth: Depth | None = None,
    parent: Source | None = None,
    emit: Emit = silent,
    *,
    vllm: Path | None = None,
) -> Report:
    """Judge a checkpoint; if `parent` is given, also whether it was made from the parent.

    `depth` None: `numbers` for a folder, `structure` for a hub repo. `vllm` is the Python of a
    vLLM that loads the headers too: its answer counts, not that of mquant's model. Raises
    SourceError if there is no checkpoint or it cannot be read, or if a parent that is read whole is
    not as its mquant.json says; LoaderError if the disk is full.
    """
    depth = depth or (Depth.STRUCTURE if isinstance(source, HubRepo) else Depth.NUMBERS)
    view = read_modules(open_checkpoint(source, tolerant=True), families)
    original = read_modules(open_checkpoint(parent), families) if parent else None
    loader = ask(source, view.checkpoint.shards, vllm) if vllm else None
    outcome = outcome_of(view.outcome, loader)
    compared = check_digests(source, emit, data=depth is not Depth.STRUCTURE)
    all_findings = [*check_headers(view, outcome), *compared.findings]
    checked, wrong = ["structure"], _stored_in(compared.shards, view)
    if depth is not Depth.STRUCTURE:
        numbers = check_numbers(view, emit)
        all_findings += numbers.findings()
        checked, wrong = [*checked, "numbers"], wrong | numbers.places
    if parent is not None and original is not None:
        checked += ["against"]
        if depth is Depth.FULL:  # at other depths the parent's shards are sampled
            refuse_changed(parent, emit)
        all_findings = _with_parent(all_findings, _against(view, original, depth, emit))
    all_findings += loader.findings if loader else ()
    judged_by_loader = loader is not None and loader.answered
    checked += ["vllm"] if judged_by_loader else []
    if not any(finding.severity == "error" for finding in all_findings):
        all_findings += check_parallel(view)
    needs = {"loader" if name == "vllm" else name for name in checked}
    rules, clauses = [rule for rule in RULES.values() if rule.needs in VERIFIED], unknown(view)
    bytes_read, requests = _downloaded(source, parent)
    return Report(
        source=source.name,
        family=view.family.name if view.family else None,
        method=view.method,
        tensors=len(view.checkpoint.tensors),
        quantized=len(view.quantized),
        parent=parent.name if parent else None,
        checked=tuple(checked),
        sampled=original is not None and depth is not Depth.FULL,
        findings=_sorted(all_findings),
        wrong=wrong,
        as_recorded=compared.same,
        bytes_read=bytes_read,
        requests=requests,
        loader=loader,
        stands_for=stands_for(view.outcome, loader),
        not_judged=not_judged({**clauses, **compared.unknown}, rules, needs, all_findings),
        undecided="" if judged_by_loader else undecided(view, clauses),
    )


def check_headers(view: ModuleView, outcome: Outcome | None = None) -> list[Finding]:
    """Judge a checkpoint by its headers and JSON files, and by what vLLM does with them.

    `outcome` is what vLLM does; None: what mquant's model of vLLM says.
    """
    findings = with_outcome([*check_structure(view), *_ignore(view)], outcome or view.outcome)
    return [*findings, *check_after_loading(view)]


def _downloaded(*sides: Source | None) -> tuple[int, int] | tuple[None, None]:
    """Return the bytes and requests of both checkpoints' downloads."""
    hubs = [side for side in sides if isinstance(side, HubRepo)]
    if not hubs:
        return None, None
    return sum(hub.bytes_read for hub in hubs), sum(hub.requests for hub in hubs)


def _stored_in(shards: Collection[str], view: ModuleView) -> frozenset[str]:
    """Return the names of the tensors in some shards."""
    tensors = view.checkpoint.tensors.values()
    return frozenset(info.name for info in tensors if info.shard in shards)


def _against(view: ModuleView, parent: ModuleView, depth: Depth, emit: Emit) -> tuple[Finding, ...]:
    return check_against(view, parent, everything=depth is Depth.FULL, emit=emit)


def _with_parent(findings: list[Finding], against: tuple[Finding, ...]) -> list[Finding]:
    """Join findings; if the weights are the parent's, no scale is a reciprocal."""
    if not any(finding.severity == "error" for finding in against):
        guesses = {GLOBAL_SCALE_INVERTED.id, GLOBAL_SCALES_RECIPROCAL.id}
        findings = [finding for finding in findings if finding.rule not in guesses]
    return [*findings, *against]


def _ignore(view: ModuleView) -> list[Finding]:
    # Entries that match nothing may concern tensors of a lost shard.
    findings = ignore_findings(view)
    return [f for f in findings if f.severity == "error" or not view.checkpoint.lost_shards]


def _sorted(findings: list[Finding]) -> tuple[Finding, ...]:
    # Several checks may find the same fault; it is reported once.
    return tuple(
        sorted(dict.fromkeys(findings), key=lambda finding: _ORDER.index(finding.severity))
    )
