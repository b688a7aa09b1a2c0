"""The changes of config.json that make a model small, with every kind of layer."""

from collections.abc import Collection, Mapping
from typing import Any, Final, TypeGuard

from mquant.family import Family

_MOST_EXPERTS: Final = 8
_SIZES: Final = {"hidden": 128, "vocabulary": 256, "intermediate": 192, "top_k": 2}
_HEADS, _KV_HEADS, _OTHER_COUNT, _DIMENSION = 4, 2, 2, 64
_KEYS_OF_GROUPS: Final = ("n_group", "topk_group", "num_expert_group", "num_expert_groups")


def tiny_of(
    settings: Mapping[str, Any],
    keys: Mapping[str, str],
    used: Collection[str],
    kinds: Collection[frozenset[int]],
) -> dict[str, Any]:
    """Return the changes. `keys` are the keys by meaning, `used` the keys of sizes.

    `kinds` are the sets of layers that have a block: a layer of each kind, and one without, stay.
    """
    changes: dict[str, Any] = {}
    total = settings.get(keys["layers"])
    if isinstance(total, int):
        layers = _layers(total, kinds)
        changes[keys["layers"]] = layers
        for key, value in settings.items():
            # A word of as many letters as there are layers (`silu`) is no pattern of layers.
            per_layer = isinstance(value, list) or is_pattern(value)
            if per_layer and len(value) == total > layers and total > 3:
                changes[key] = value[:layers]
    for meaning, most in _SIZES.items():
        _shrink(changes, settings, keys.get(meaning, ""), most)
    _shrink(changes, settings, keys.get("experts", ""), _MOST_EXPERTS)
    heads, kv_heads = (_number(settings, keys.get(k, "")) for k in ("heads", "kv_heads"))
    _shrink(changes, settings, keys["heads"], _HEADS)
    _shrink(changes, settings, keys.get("kv_heads", ""), _HEADS if heads == kv_heads else _KV_HEADS)
    for key in _KEYS_OF_GROUPS:
        _shrink(changes, settings, key, 1)
    for key in sorted({*used} - changes.keys() - {*keys.values()}):
        dimension = any(word in key for word in ("dim", "size", "rank", "hidden"))
        # The numbers of shared experts and of kernels' taps are small as they are.
        most = _DIMENSION if dimension else _HEADS
        _shrink(changes, settings, key, most)
    for key, value in settings.items():
        largest = max(value, default=0) if isinstance(value, list) else value
        if key.endswith("_token_id") and type(largest) is int and largest >= _SIZES["vocabulary"]:
            changes[key] = 1
    if keys.get("mtp"):
        changes[keys["mtp"]] = 0
    return {key: value for key, value in changes.items() if settings.get(key) != value}


def is_pattern(value: object) -> TypeGuard[str]:
    """Return whether a text may have a letter or sign for every layer, as `M-E*` has."""
    return isinstance(value, str) and value.upper() == value


def fits(family: Family) -> bool:
    """Return whether the tiny config gives every row of the family a shape."""
    config = family.with_settings(family.synth.config, family.synth.tiny)
    layers = family.value(family.config.layers, config) or 0
    for row in family.tensors:
        for layer in range(layers) if "{layer}" in row.name else (None,):
            shape = family.shape(row, config, layer)
            if not family.may_lack(row, config) and (shape is None or min(shape) < 1):
                return False
    return True


def _layers(total: int, kinds: Collection[frozenset[int]]) -> int:
    """Return the fewest layers that have every block once, and once lack it; two at least."""
    firsts = [1]
    for kind in kinds:
        if kind:
            firsts.append(min(kind))
        firsts.append(next((n for n in range(total) if n not in kind), 0))
    return min(total, max(firsts) + 1)


def _number(settings: Mapping[str, Any], key: str) -> int | None:
    value = settings.get(key) if key else None
    return value if type(value) is int else None


def _shrink(changes: dict[str, Any], settings: Mapping[str, Any], key: str, most: int) -> None:
    value = _number(settings, key)
    if value is not None and value > most:
        changes[key] = most
