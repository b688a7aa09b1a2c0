"""How vLLM matches names of layers and classes with entries of `ignore` and of targets.

An entry is a name, or `re:` and an expression that is anchored at the start. vLLM compiles
expressions with the package `regex`, which takes more than Python does: what Python does not take,
or takes in another meaning, is not judged. Expressions are untrusted; see `mquant.name_patterns`.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final

from mquant.errors import SourceError
from mquant.loader_model.vllm.tensors import LoadRefused, Unknown
from mquant.name_patterns import Style, match

_PREFIX: Final = "re:"
_ONLY_REGEX: Final = re.compile(r"\[\[:|(?<!\\)\{(?!\d*,?\d*\})")
"""Character classes and fuzzy counts of `regex`, which Python takes for plain characters."""
_BAD_EVERYWHERE: Final = (
    "nothing to repeat",
    "multiple repeat",
    "min repeat",
    "unterminated",
    "unbalanced",
    "bad character range",
    "end of pattern",
    "unknown group",
    "invalid group reference",
)
"""Faults of an expression that both packages find, in Python's words."""


class Patterns:
    """A list of entries in order. `names` are the names and classes that vLLM will match."""

    def __init__(self, entries: Sequence[str], names: Iterable[str]) -> None:
        self._entries = entries
        self._names = frozenset(names)
        self._exact: dict[str, int] = {}
        for number, entry in enumerate(entries):
            if not entry.startswith(_PREFIX):
                self._exact.setdefault(entry, number)
        self._first: dict[str, int] = {}
        self._classes: dict[str, int | None] = {}
        self._bad: tuple[int, str] | None = None
        self._match()

    def any(self, name: str) -> bool:
        """Return whether an entry matches a name; vLLM looks at every entry."""
        if self._bad:
            self._stop(self._bad[1])
        return self._place(name) is not None

    def first(self, name: str) -> str | None:
        """Return the first entry that matches a name."""
        return self._at(self._place(name))

    def first_in_class(self, name: str) -> str | None:
        """Return the first entry that matches a class, or that is in the class's name."""
        if name not in self._classes:
            lower = name.lower()
            places = [number for entry, number in self._exact.items() if entry.lower() in lower]
            if (place := self._by_expression(name)) is not None:
                places.append(place)
            self._classes[name] = min(places, default=None)
        return self._at(self._classes[name])

    def _at(self, place: int | None) -> str | None:
        if self._bad and (place is None or self._bad[0] < place):
            self._stop(self._bad[1])
        return None if place is None else self._entries[place]

    def _place(self, name: str) -> int | None:
        places = (self._exact.get(name), self._by_expression(name))
        return min((place for place in places if place is not None), default=None)

    def _by_expression(self, name: str) -> int | None:
        if name not in self._names:
            raise Unknown(f"a name that vLLM was not expected to match ({name})")
        return self._first.get(name)

    def _match(self) -> None:
        """Match every expression with every name at once, in a process of its own."""
        places = {entry: n for n, entry in enumerate(self._entries) if entry.startswith(_PREFIX)}
        if not places:
            return
        try:
            matches = match(list(places), self._names, Style.NAMES)
        except SourceError as error:
            raise Unknown(f"what an expression matches ({error})") from None
        for entry, names in matches.by_entry.items():
            for name in names:
                self._first[name] = min(places[entry], self._first.get(name, places[entry]))
            if _ONLY_REGEX.search(entry):
                self._note(places[entry], "")
        for entry, why in matches.bad.items():
            self._note(places[entry], why)

    def _note(self, place: int, why: str) -> None:
        if self._bad is None or place < self._bad[0]:
            self._bad = place, why

    @staticmethod
    def _stop(why: str) -> None:
        if any(word in why for word in _BAD_EVERYWHERE):
            raise LoadRefused("config.json", f"has an expression that vLLM cannot read ({why})")
        raise Unknown("an expression that is special to the package regex")
