"""Rules and findings: a plan's refusals and a verifier's report consist of findings only.

A rule is declared once, as a constant beside the check that uses it:

    SCALE_ZERO = rule("scale-zero", what, why, fix, needs="numbers")
    ...
    yield SCALE_ZERO.finding(name, f"{name} holds scales that are zero.")

No finding exists without a rule. docs/verify-rules.md, JUnit and JSON derive from `RULES`.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

Severity = Literal["error", "warning", "info"]
Context = Literal["judged", "source", "fact", "tolerated"]
"""The reason to inspect a checkpoint.

`judged`: to say whether the checkpoint is right. `source`: to write another checkpoint from this
checkpoint. `fact`: to describe the checkpoint. `tolerated`: as `source`, but the user allowed the
finding, or the recipe is another tool's.
"""
Needs = Literal["structure", "numbers", "against", "loader", "plan", "inspect", "run", "smoke"]
Knowledge = Literal["family", "loader", "layout", "digests", "shard digests"]
VERIFIED: Final[tuple[Needs, ...]] = ("structure", "numbers", "against", "loader")
"""`needs` of the rules of `mquant verify`; all other rules belong to other verbs."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact that is wrong, unusual or worth knowing; `Rule.finding` creates findings.

    `rule` is the rule's id; `where` names the tensor, file or key (the first, if there are
    many); `message` is one sentence; `fix` says what to do. Raises ValueError for a rule that is
    not registered, and for a severity that the rule does not declare.
    """

    rule: str
    severity: Severity
    where: str
    message: str
    fix: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError for an unregistered rule, or a severity that the rule lacks."""
        if self.rule not in RULES or self.severity not in RULES[self.rule].severities:
            raise ValueError(f"no rule declares {self.rule} with severity {self.severity}")

    def to_json(self) -> dict[str, str]:
        """Return the finding as the JSON object of an envelope."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Rule:
    """One condition that mquant checks.

    `needs` says what the check reads: headers and JSON (`structure`), all data (`numbers`), the
    parent (`against`), a real loader (`loader`); or which verb checks the rule. `what` says what
    must hold, `why` says why a loader or a person cares, `fix` is the fix of a finding without a
    fix of its own. `as_source`, `as_fact` and `if_tolerated` are the severities in those contexts,
    if they differ from `severity`. `if_loads` belongs to a rule that says why vLLM does not load a
    checkpoint: the severity if vLLM loads the checkpoint all the same. `knowing` lists what must be
    known of a checkpoint to judge the rule: its model `family`, what vLLM's `loader` does, the
    `layout` of its quantized modules, the `digests` of its files or of its shards.
    """

    id: str
    what: str
    why: str
    fix: str
    severity: Severity = "error"
    needs: Needs = "structure"
    as_source: Severity | None = None
    as_fact: Severity | None = None
    if_tolerated: Severity | None = None
    if_loads: Severity | Literal["nothing"] | None = None
    knowing: tuple[Knowledge, ...] = ()

    def severity_in(self, context: Context) -> Severity:
        """Return the severity of a finding in a context."""
        source = self.as_source or self.severity
        return {
            "judged": self.severity,
            "source": source,
            "fact": self.as_fact or source,
            "tolerated": self.if_tolerated or source,
        }[context]

    @property
    def severities(self) -> set[Severity]:
        """All severities that a finding of the rule may have."""
        contexts: tuple[Context, ...] = ("judged", "source", "fact", "tolerated")
        severities = {self.severity_in(context) for context in contexts}
        if self.if_loads is not None and self.if_loads != "nothing":
            severities.add(self.if_loads)
        return severities

    def finding(
        self, where: str, message: str, fix: str = "", context: Context = "judged"
    ) -> Finding:
        """Return a finding of this rule. `message` is one sentence."""
        return Finding(self.id, self.severity_in(context), where, message, fix or self.fix)


RULES: Final[dict[str, Rule]] = {}
"""Every rule by its id; complete once the modules of all checks are imported."""


def rule(name: str, what: str, why: str, fix: str, **more: Any) -> Rule:
    """Declare and register a rule. Raises ValueError for an id that is taken."""
    if name in RULES:
        raise ValueError(f"rule {name} is declared twice")
    RULES[name] = Rule(name, what, why, fix, **more)
    return RULES[name]


def in_context(finding: Finding, context: Context) -> Finding:
    """Return the same finding with the severity that its rule declares for a context."""
    return replace(finding, severity=RULES[finding.rule].severity_in(context))


def if_loaded(finding: Finding) -> Finding | None:
    """Return what a finding says of a checkpoint that vLLM loads; None if it says nothing then."""
    severity = RULES[finding.rule].if_loads
    if severity is None or finding.severity != "error":
        return finding
    return None if severity == "nothing" else replace(finding, severity=severity)
