"""Two small languages in which a family file refers to keys of config.json.

A size is a sum of products and quotients: `num_attention_heads * head_dim`, `kv_lora_rank +
qk_rope_head_dim`, `len(layer_types)`, `heads_per_layer[layer] * head_dim`. A condition selects
layers, in clauses joined by `and`, and such groups of clauses joined by `or`: `KEY`, `not KEY`,
`layer < SIZE`, `layer >= SIZE`, `layer in KEY`, `layer not in KEY`, `layer + 1 in KEY`, `KEY is
VALUE`, `KEY divides layer`, `KEY divides layer + SIZE`, `KEY divides layer - SIZE`, `not` before
these four, `KEY[layer]`, `not KEY[layer]`, `KEY[layer] is VALUE`, `not KEY[layer] is VALUE`, where
SIZE is one key or number. `KEY[layer]` is the item of a list, or the character of a string, at the
layer's number. A KEY with dots is in nested tables. `KEY divides layer + 1 - SIZE` counts from 1.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

MOST_LAYERS: Final = 1_000
"""No model has more layers, or more entries in a list of some of them."""

Lookup = Callable[[str], int | None]

_KEY: Final = r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*"
_WORD: Final = rf"(?:[0-9]+|{_KEY})"
_FACTOR: Final = rf"(?:len\({_KEY}\)|{_KEY}\[layer\]|{_WORD})"
_SIZE: Final = re.compile(rf"{_FACTOR}(?: [*/+] {_FACTOR})*")
_PARTS: Final = re.compile(rf"(?P<length>len\()?(?P<key>{_KEY})(?P<item>\[layer\])?")
_CLAUSE: Final = re.compile(
    rf"layer (?P<operator><|>=) (?P<limit>{_WORD})"
    rf"|layer(?P<after> \+ 1)? (?P<within>in|not in) (?P<list>{_KEY})"
    rf"|(?P<undivided>not )?(?P<divisor>(?!not\b){_WORD}) divides"
    rf" layer(?P<counted> \+ 1(?= [+-] ))?(?: (?P<sign>[+-]) (?P<offset>{_WORD}))?"
    rf"|(?P<other>not )?(?P<named>(?!(?:layer|not)\b){_KEY})(?P<named_item>\[layer\])?"
    r" is (?P<value>\S+)"
    rf"|(?P<not>not )?(?P<key>(?!(?:layer|not)\b){_KEY})(?P<item>\[layer\])?"
)


def check_size(text: str) -> str:
    """Return the text if the text is a size. Raises ValueError otherwise."""
    if not _SIZE.fullmatch(text):
        raise ValueError(f"{text!r} is no sum of products of config keys and numbers")
    return text


def check_condition(text: str) -> str:
    """Return the text if the text is a condition. Raises ValueError otherwise."""
    if not all(_CLAUSE.fullmatch(clause) for clause in _clauses(text)):
        raise ValueError(f"{text!r} is no condition on layers and config keys")
    return text


def size_keys(text: str) -> set[str]:
    """Return the config keys whose numbers a size refers to."""
    parts = _PARTS.finditer(text)
    return {part["key"] for part in parts if not (part["length"] or part["item"])}


def depends_on_layer(text: str) -> bool:
    """Return whether a size differs from layer to layer."""
    return "[layer]" in text


def condition_keys(text: str) -> set[str]:
    """Return the config keys that must hold numbers before a condition can be evaluated."""
    limits = (clause["limit"] for clause in map(_CLAUSE.fullmatch, _clauses(text)) if clause)
    return {key for key in limits if key and not key.isdigit()}


def find(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key, through nested tables if the key has dots; None without one."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def item(config: Mapping[str, Any], key: str, layer: int | None) -> Any:
    """Return what a list, or a string, of config.json has for a layer; None without an item."""
    value = find(config, key)
    if layer is None or not isinstance(value, list | str):
        return None
    return value[layer] if 0 <= layer < len(value) <= MOST_LAYERS else None


def evaluate(text: str, lookup: Lookup) -> int | None:
    """Return the value of a size; None if a key has no value, or a quotient is not whole.

    `lookup` is given keys, and `KEY[layer]` and `len(KEY)` as they are written.
    """
    total = 0
    for term in text.split(" + "):
        value: int | None = 1
        operator = "*"
        for word in term.split(" "):
            if word in ("*", "/"):
                operator = word
                continue
            factor = int(word) if word.isdigit() else lookup(word)
            value = _apply(value, operator, factor)
        if value is None:
            return None
        total += value
    return total


def number(config: Mapping[str, Any], word: str, layer: int | None = None) -> int | None:
    """Return the number of KEY, `KEY[layer]` or `len(KEY)` in config.json; None without one."""
    if word.startswith("len("):
        value = find(config, word[4:-1])
        return len(value) if isinstance(value, list | str) else None
    key = word.removesuffix("[layer]")
    value = find(config, key) if key == word else item(config, key, layer)
    return value if type(value) is int else None


def _apply(left: int | None, operator: str, right: int | None) -> int | None:
    if left is None or right is None:
        return None
    if operator == "*":
        return left * right
    return left // right if right and left % right == 0 else None


def holds(text: str, layer: int | None, config: Mapping[str, Any], lookup: Lookup) -> bool:
    """Return whether a condition is true of a layer.

    If `layer` is None, every clause on layers counts as true.
    """
    return any(
        all(_clause(clause, layer, config, lookup) for clause in group.split(" and "))
        for group in text.split(" or ")
    )


def _clauses(text: str) -> list[str]:
    return [clause for group in text.split(" or ") for clause in group.split(" and ")]


def _clause(text: str, layer: int | None, config: Mapping[str, Any], lookup: Lookup) -> bool:
    match = _CLAUSE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no condition")
    if key := match["key"] or match["named"]:
        if not (match["item"] or match["named_item"]):
            value = find(config, key)
        elif layer is None:
            return True
        else:
            value = item(config, key, layer)
        if match["named"]:
            return (str(value) == match["value"]) is not bool(match["other"])
        return bool(value) is not bool(match["not"])
    return layer is None or _of_layer(match, layer, config, lookup)


def _of_layer(match: re.Match[str], layer: int, config: Mapping[str, Any], lookup: Lookup) -> bool:
    """Return whether a clause on the layer's number is true."""

    def size(word: str | None) -> int | None:
        return int(word or 0) if not word or word.isdigit() else lookup(word)

    if match["divisor"]:
        divisor, offset = size(match["divisor"]), size(match["offset"] or "0")
        if divisor is None or divisor <= 0 or offset is None:
            return False
        layer += bool(match["counted"])
        rest = (layer + (offset if match["sign"] == "+" else -offset)) % divisor
        return bool(rest) is bool(match["undivided"])
    if match["within"]:
        listed = find(config, match["list"])
        if isinstance(listed, str):
            listed = [int(part) for part in listed.split(",") if part.strip().isdecimal()]
        listed = listed if isinstance(listed, list) and len(listed) <= MOST_LAYERS else []
        return (layer + bool(match["after"]) in listed) is (match["within"] == "in")
    limit = size(match["limit"])
    return limit is not None and (layer < limit if match["operator"] == "<" else layer >= limit)
