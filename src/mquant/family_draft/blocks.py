"""Conditions of config.json that hold for exactly some layers."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, Final

from mquant.family_draft.tiny import is_pattern
from mquant.formulas import check_condition, holds, number

Layers = frozenset[int]
_MOST_PAIRS: Final = 60
_MOST_KINDS: Final = 12


def condition_of(layers: Layers, total: int, settings: Mapping[str, Any]) -> str:
    """Return a condition that holds for exactly these layers of `total`; empty if none is found.

    Keys of config.json come before numbers, and one clause before two.
    """
    conditions: dict[str, Layers] = {}
    for text in _clauses(settings, total):
        conditions.setdefault(text, _selected(text, total, settings))
    for text, selected in conditions.items():
        if selected == layers:
            return text
    wider = [text for text, selected in conditions.items() if layers < selected][:_MOST_PAIRS]
    for one, two in combinations(wider, 2):
        if conditions[one] & conditions[two] == layers:
            return f"{one} and {two}"
    inner = [t for t, selected in conditions.items() if selected and selected < layers]
    for one, two in combinations(inner[:_MOST_PAIRS], 2):
        if conditions[one] | conditions[two] == layers:
            return f"{one} or {two}"
    return ""


def without_keys(layers: Layers, total: int) -> str:
    """Return a condition of numbers alone for the first or the last layers; empty for others."""
    if layers == frozenset(range(len(layers))):
        return f"layer < {len(layers)}"
    if layers == frozenset(range(total - len(layers), total)):
        return f"layer >= {total - len(layers)}"
    for step in range(2, total):
        for offset in range(step):
            every = frozenset(n for n in range(total) if (n + offset) % step == 0)
            plus = f" + {offset}" if offset else ""
            if layers == every:
                return f"{step} divides layer{plus}"
            if layers == frozenset(range(total)) - every:
                return f"not {step} divides layer{plus}"
    return ""


def _selected(text: str, total: int, settings: Mapping[str, Any]) -> Layers:
    def lookup(word: str) -> int | None:
        return number(settings, word)

    return frozenset(n for n in range(total) if holds(text, n, settings, lookup))


def _clauses(settings: Mapping[str, Any], total: int) -> Iterator[str]:
    flat = {key: value for key, value in settings.items() if not isinstance(value, Mapping)}
    for table in (key for key, value in settings.items() if isinstance(value, Mapping)):
        flat |= {f"{table}.{key}": value for key, value in settings[table].items()}
    for text in _unchecked(flat, total):
        try:
            yield check_condition(text)
        except ValueError:  # a key with other characters than a condition may have
            continue


def _unchecked(settings: Mapping[str, Any], total: int) -> Iterator[str]:
    # A number of layers that is the number of all layers tells no layers apart.
    integers = {
        k: v
        for k, v in settings.items()
        if type(v) is int and 0 < v <= total and not (v == total and k.startswith("n"))
    }
    for key, value in settings.items():
        # A string with small letters is a word, such as `silu`, and no pattern.
        if (isinstance(value, list) or is_pattern(value)) and len(value) == total:
            items = sorted({str(item) for item in value})
            if {*items} <= {"0", "1", "True", "False"}:
                yield from (f"{key}[layer]", f"not {key}[layer]")
            elif 1 < len(items) <= _MOST_KINDS:
                yield from (f"{key}[layer] is {item}" for item in items if " " not in item)
        listed = isinstance(value, list) and all(type(item) is int for item in value)
        if listed and value and "layer" in key:
            yield from (f"layer in {key}", f"layer not in {key}", f"layer + 1 in {key}")
    # Keys that name layers come first: another key may be the same number by accident.
    for key in sorted(integers, key=lambda key: not any(w in key for w in _OF_LAYERS)):
        if any(word in key for word in _OF_LAYERS):
            yield from (f"layer < {key}", f"layer >= {key}")
            for negated in ("", "not "):
                yield from (f"{negated}{key} divides layer", f"{negated}{key} divides layer + 1")
    offsets = [key for key, value in settings.items() if key.endswith("offset") and value]
    for key in (key for key in integers if any(word in key for word in _OF_LAYERS)):
        for offset in offsets:
            yield from (f"{key} divides layer - {offset}", f"not {key} divides layer - {offset}")


_OF_LAYERS: Final = ("replace", "freq", "interval", "period", "step", "dense", "layers", "every")
