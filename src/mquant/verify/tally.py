"""One finding for each rule, however many tensors break it."""

from mquant.findings import Finding, Rule


class Tally:
    """Collects what is wrong. A checkpoint broken in one way 20,000 times is one sentence.

    `places` are all the names that were found wrong.
    """

    def __init__(self) -> None:
        self.places: set[str] = set()
        self._first: dict[Rule, tuple[str, str, str]] = {}
        self._more: dict[Rule, int] = {}

    def add(self, rule: Rule, where: str, message: str, fix: str = "") -> None:
        """Note a break of a rule; `message` is a sentence without its full stop."""
        self.places.add(where)
        if rule in self._first:
            self._more[rule] = self._more.get(rule, 0) + 1
        else:
            self._first[rule] = (where, message, fix)

    def findings(self) -> tuple[Finding, ...]:
        """What was noted, the first of each rule told."""
        found = []
        for rule, (where, message, fix) in self._first.items():
            more = self._more.get(rule, 0)
            tail = f" (and {more:,} more like it)" if more else ""
            found.append(rule.finding(where, f"{message}{tail}.", fix))
        return tuple(found)
