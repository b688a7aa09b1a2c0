"""One finding for each broken rule, even if many tensors break the rule."""

from mquant.findings import Finding, Rule


class Tally:
    """A collector of findings: a rule that 20,000 tensors break gives one finding.

    `places` are the names of all tensors that break a rule.
    """

    def __init__(self) -> None:
        self.places: set[str] = set()
        self._first: dict[Rule, tuple[str, str, str]] = {}
        self._more: dict[Rule, int] = {}

    def add(self, rule: Rule, where: str, message: str, fix: str = "") -> None:
        """Record that a rule is broken; `message` is a sentence without its full stop."""
        self.places.add(where)
        if rule in self._first:
            self._more[rule] = self._more.get(rule, 0) + 1
        else:
            self._first[rule] = (where, message, fix)

    def findings(self) -> tuple[Finding, ...]:
        """Return a finding for each broken rule, with the first place and the number of others."""
        findings = []
        for rule, (where, message, fix) in self._first.items():
            more = self._more.get(rule, 0)
            tail = f" (and {more:,} more like it)" if more else ""
            findings.append(rule.finding(where, f"{message}{tail}.", fix))
        return tuple(findings)
