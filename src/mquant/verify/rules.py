"""The registry of rules: what is checked, why a loader cares, how to fix it.

docs/verify-rules.md is generated from it. A finding can only be made from a rule that is here.
"""

from dataclasses import dataclass
from typing import Final, Literal

from mquant.findings import Finding, Severity

Depth = Literal["structure", "numbers", "against", "loader"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that is checked.

    `depth` says what it needs: headers and JSON (`structure`), the data (`numbers`), the parent
    (`against`), or a loader of its own (`loader`). `fix` is the default fix of its findings.
    """

    id: str
    severity: Severity
    depth: Depth
    what: str
    why: str
    fix: str


RULES: Final[dict[str, Rule]] = {}


def register(*rules: Rule) -> None:
    """Add rules; every module of checks declares its own at import. An id is taken once."""
    for rule in rules:
        if rule.id in RULES:
            raise ValueError(f"rule {rule.id} is declared twice")
        RULES[rule.id] = rule


def finding(rule_id: str, where: str, message: str, fix: str = "") -> Finding:
    """A finding of a registered rule."""
    rule = RULES[rule_id]
    return Finding(rule.id, rule.severity, where, message, fix or rule.fix)


__all__ = ["RULES", "Depth", "Rule", "finding", "register"]
