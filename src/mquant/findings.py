"""Rules, and what is found by them: the one type of a plan's refusals and a verifier's report.

A rule is declared once, as a constant beside the check that uses it:

    SCALE_ZERO = rule("scale-zero", what, why, fix, needs="numbers")
    ...
    yield SCALE_ZERO.finding(name, f"{name} holds scales that are zero.")

No finding can be made without one. docs/verify-rules.md, JUnit and JSON derive from `RULES`.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

Severity = Literal["error", "warning", "info"]
Context = Literal["judged", "source", "fact", "tolerated"]
"""Why a checkpoint is looked at.

`judged`: to say whether it is right. `source`: to make another one from it. `fact`: to describe it.
`tolerated`: as `source`, but the user allowed it, or the recipe is another tool's.
"""
Needs = Literal["structure", "numbers", "against", "loader", "plan", "inspect", "run", "smoke"]
Knowledge = Literal["family", "list", "layout"]
VERIFIED: Final[tuple[Needs, ...]] = ("structure", "numbers", "against", "loader")
"""`needs` of the rules of `mquant verify`; all other rules belong to other verbs."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, odd or worth knowing, made by `Rule.finding`.

    `rule` is the rule's id; `where` names the tensor, file or key (the first of them, if there are
    many); `message` is one sentence; `fix` says what to do. Raises ValueError for a rule that is
    not registered, and for a severity that the rule does not declare.
    """

    rule: str
    severity: Severity
    where: str
    message: str
    fix: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError for a rule that is not registered, or a severity it does not declare."""
        if self.rule not in RULES or self.severity not in RULES[self.rule].severities:
            raise ValueError(f"no rule declares {self.rule} with severity {self.severity}")

    def to_json(self) -> dict[str, str]:
        """The finding as a JSON envelope holds it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that is checked.

    `needs` says what is read: headers and JSON (`structure`), all data (`numbers`), the parent
    (`against`), a real loader (`loader`); or which verb checks it. `what` must hold, `why` a loader
    or a person cares, `fix` is the fix of findings that have no better one. `as_source`, `as_fact`
    and `if_tolerated` are the severities in those contexts, if they differ. `knowing` is what must
    be known of a checkpoint, or the rule is not judged: its model family, how its method matches
    the ignore `list`, the `layout` of its quantized modules.
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
    knowing: tuple[Knowledge, ...] = ()

    def severity_in(self, context: Context) -> Severity:
        """The severity of a finding in a context."""
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
        return {self.severity_in(context) for context in contexts}

    def finding(
        self, where: str, message: str, fix: str = "", context: Context = "judged"
    ) -> Finding:
        """A finding of this rule. `message` is one sentence."""
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
    """The same finding, with the severity that its rule declares for a context."""
    return replace(finding, severity=RULES[finding.rule].severity_in(context))
