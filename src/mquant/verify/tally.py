"""One finding for each broken rule, even if many tensors break the rule."""

from collections.abc import Iterable

from mquant.findings import Finding, Rule


class Tally:
    """A collector of findings: a rule that 20,000 tensors break gives one finding."""

    def __init__(self) -> None:
        self._places: dict[Rule, set[str]] = {}
        self._first: dict[Rule, tuple[str, str, str]] = {}
        self._more: dict[Rule, int] = {}

    def add(self, rule: Rule, where: str, message: str, fix: str = "") -> None:
        """Record that a rule is broken; `message` is a sentence without its full stop."""
        self._places.setdefault(rule, set()).add(where)
        if rule in self._first:
            self._more[rule] = self._more.get(rule, 0) + 1
        else:
            self._first[rule] = (where, message, fix)

    def mark(self, rule: Rule, names: Iterable[str]) -> None:
        """Record tensors that break a rule, for which one message of the rule stands."""
        self._places.setdefault(rule, set()).update(names)

    @property
    def places(self) -> set[str]:
        """The names of all tensors, or modules, that break a rule."""
        return set().union(*self._places.values())

    def of(self, rule: Rule) -> set[str]:
        """Return the names of all tensors, or modules, that break one rule."""
        return self._places.get(rule, set())

    def findings(self) -> tuple[Finding, ...]:
        """Return a finding for each broken rule, with the first place and the number of others."""
        findings = []
        for rule, (where, message, fix) in self._first.items():
            more = self._more.get(rule, 0)
            tail = f" (and {more:,} more like it)" if more else ""
            findings.append(rule.finding(where, f"{message}{tail}.", fix))
        return tuple(findings)
