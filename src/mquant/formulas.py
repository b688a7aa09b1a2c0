"""Two small languages in which a family file refers to keys of config.json.

A size is a sum of products and quotients: `num_attention_heads * head_dim`, `kv_lora_rank +
qk_rope_head_dim`. A condition selects layers, in clauses joined by `and`: `KEY`, `not KEY`, `layer
< SIZE`, `layer >= SIZE`, `layer in KEY`, `layer not in KEY`, `KEY divides layer`, `KEY divides
layer + 1`, `KEY is VALUE`, where SIZE is one key or number.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

MOST_LAYERS: Final = 1_000
"""No model has more layers, or more entries in a list of some of them."""

Lookup = Callable[[str], int | None]

_FACTOR: Final = r"[a-z0-9_]+"
_SIZE: Final = re.compile(rf"{_FACTOR}(?: [*/+] {_FACTOR})*")
_CLAUSE: Final = re.compile(
    rf"layer (?P<operator><|>=|in|not in) (?P<right>{_FACTOR})"
    rf"|(?P<divisor>{_FACTOR}) divides layer(?P<next> \+ 1)?"
    rf"|(?P<named>{_FACTOR}) is (?P<value>\w+)"
    rf"|(?P<not>not )?(?P<key>(?!(?:layer|not)\b){_FACTOR})"
)


def check_size(text: str) -> str:
    """Return the text if the text is a size. Raises ValueError otherwise."""
    if not _SIZE.fullmatch(text):
        raise ValueError(f"{text!r} is no sum of products of config keys and numbers")
    return text


def check_condition(text: str) -> str:
    """Return the text if the text is a condition. Raises ValueError otherwise."""
    if not all(_CLAUSE.fullmatch(clause) for clause in text.split(" and ")):
        raise ValueError(f"{text!r} is no condition on layers and config keys")
    return text


def size_keys(text: str) -> set[str]:
    """Return the config keys that a size refers to."""
    return {word for word in re.findall(_FACTOR, text) if not word.isdigit()}


def condition_keys(text: str) -> set[str]:
    """Return the config keys that must hold numbers before a condition can be evaluated."""
    clauses = [clause for clause in map(_CLAUSE.fullmatch, text.split(" and ")) if clause]
    compared = [clause["right"] for clause in clauses if clause["operator"] in ("<", ">=")]
    return {key for key in compared if not key.isdigit()}


def evaluate(text: str, lookup: Lookup) -> int | None:
    """Return the value of a size; None if a key has no value, or a quotient is not whole."""
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
    return all(_clause(clause, layer, config, lookup) for clause in text.split(" and "))


def _clause(text: str, layer: int | None, config: Mapping[str, Any], lookup: Lookup) -> bool:
    match = _CLAUSE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no condition")
    if match["key"]:
        return bool(config.get(match["key"])) is not bool(match["not"])
    if match["named"]:
        return str(config.get(match["named"])) == match["value"]
    operator, right = match["operator"], match["right"]
    if layer is None:
        return True
    if match["divisor"]:
        divisor = lookup(match["divisor"])
        return divisor is not None and divisor > 0 and (layer + bool(match["next"])) % divisor == 0
    if operator in ("in", "not in"):
        listed = config.get(right)
        listed = listed if isinstance(listed, list) and len(listed) <= MOST_LAYERS else []
        return (layer in listed) is (operator == "in")
    limit = int(right) if right.isdigit() else lookup(right)
    return limit is not None and (layer < limit if operator == "<" else layer >= limit)
