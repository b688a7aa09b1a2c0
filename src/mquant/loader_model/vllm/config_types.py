"""The types of config keys, as transformers' strict config classes and pydantic check them."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeGuard

from mquant.loader_model.vllm.tensors import LoadRefused, Unknown

_NUMERAL: Final = re.compile(r"\s{0,9}[+-]?[0-9]{1,4000}(\.0{0,99})?\s{0,9}")

_EMPTY: Final = ("architectures", "problem_type", "dtype", "torch_dtype", "pad_token_id")
"""Keys of every config class that may be null."""
_OF_METHODS: Final = ("quantization_config", "compression_config")


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number; `true` is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether Python computes with a value; `true` counts as 1."""
    return isinstance(value, int | float)


def _is_fraction(value: object) -> bool:
    return isinstance(value, float) and 0.0 <= value <= 1.0


def _list_of(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


def _is_indices(value: object) -> bool:
    """Return whether a value is a text of numbers with commas."""
    return isinstance(value, str) and all(part.strip().isdecimal() for part in value.split(","))


TYPES: Final[Mapping[str, Callable[[object], bool]]] = {
    "int": is_integer,
    "float": _is(float),
    "fraction": _is_fraction,
    "bool": _is(bool),
    "str": _is(str),
    "dict": _is(dict),
    "None": lambda value: value is None,
    "indices": _is_indices,
    "nothing": lambda _: False,
    "list[int]": _list_of(is_integer),
    "list[float]": _list_of(_is(float)),
    "list[str]": _list_of(_is(str)),
}


def check_types(config: Mapping[str, Any], types: Mapping[str, tuple[str, ...]]) -> None:
    """Raise LoadRefused if a key has a type that transformers' config class does not take."""
    for text, keys in types.items():
        checks = [TYPES[part] for part in text.split(" | ")]
        for key in keys:
            if key in config and not any(check(config[key]) for check in checks):
                raise LoadRefused("config.json", f"says {key} {said(config[key])}, not {text}")


def whole(key: str, value: object) -> int:
    """Return a value as pydantic reads a whole number. Raises LoadRefused if pydantic does not."""
    if is_number(value) and value == value // 1:
        return int(value)
    if isinstance(value, str) and _NUMERAL.fullmatch(value):
        return int(value.strip().partition(".")[0])
    raise LoadRefused("config.json", f"says {key} {said(value)}, not a whole number")


def said(value: object) -> str:
    """Return a value as a short text."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_nulls(config: Mapping[str, Any], usual: Mapping[str, Any], text: str) -> None:
    """Raise Unknown if a key in a table outside the text model's is null, and not in `usual`.

    `usual` is the config.json of a release, `text` the key of the text model's table.
    """
    tables = ((key, part) for key, part in config.items() if key.endswith("_config"))
    for key, part in tables:
        if isinstance(part, Mapping) and key not in (text, *_OF_METHODS):
            theirs = usual.get(key)
            theirs = theirs if isinstance(theirs, Mapping) else {}
            for inner, value in part.items():
                if value is None and inner not in _EMPTY and theirs.get(inner, ...) is not None:
                    raise Unknown(f"{key}.{inner} null")
            check_nulls(part, theirs, "")
