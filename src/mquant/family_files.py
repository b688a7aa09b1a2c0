"""The files of model families: reading, `like`, and the family of a checkpoint."""

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from mquant.data_files import folder, read_yaml
from mquant.errors import DataFileError
from mquant.family import Family
from mquant.formulas import find

_REPLACED_WHOLE: Final = ("synth", "config")
_MOST_LIKES: Final = 5


def load_families(own: Path | None = None) -> dict[str, Family]:
    """Return the shipped families by name, sorted; first the family of the file `own`, by path."""
    first = {} if own is None else {str(own): load_family(own).model_copy(update={"own": True})}
    return {**first, **_shipped()}


@cache
def _shipped() -> dict[str, Family]:
    return {path.stem: load_family(path) for path in sorted(folder("configs").glob("*.yaml"))}


def load_family(path: Path) -> Family:
    """Read a family file. Raises DataFileError, which names the key, if the file is wrong."""
    content = read_family(path)
    try:
        return Family.model_validate(content).model_copy(update={"own": False})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) + _row_at(content, first["loc"])
        where = f"{where}: " if where else ""
        text = f"{path.name}: {where}{first['msg'].removeprefix('Value error, ')}."
        raise DataFileError(text, "Correct the family file.") from None


def _row_at(content: Mapping[str, Any], where: tuple[int | str, ...]) -> str:
    """Return the name, in brackets, of the wrong row of `tensors`; empty without such a row."""
    if where[:1] != ("tensors",) or len(where) == 1 or not isinstance(where[1], int):
        return ""
    row = content["tensors"][where[1]]
    return f" ({str(row.get('name'))[:120]})" if isinstance(row, dict) else ""


def read_family(path: Path, depth: int = 0) -> dict[str, Any]:
    """Return the content of a family file, with what it takes over from the family it is `like`.

    `replacing` renames words of the other file, `without` removes rows by their names' patterns.
    Keys of tables, and rows by their names, replace those of the other file; null removes a key.
    Raises DataFileError if there is no such family.
    """
    content = read_yaml(path)
    like = content.pop("like", None)
    replacing, without = content.pop("replacing", {}), content.pop("without", [])
    if like is None:
        if replacing or without:
            raise _wrong(path, "`replacing` and `without` need `like`")
        return content
    base = folder("configs") / f"{like}.yaml"
    known = sorted(each.stem for each in folder("configs").glob("*.yaml"))
    if like not in known or depth > _MOST_LIKES:
        raise _wrong(path, f"like: {str(like)[:60]!r} is none of {', '.join(known)}")
    if not _is_texts(replacing, dict) or not _is_texts(without, list):
        raise _wrong(path, "`replacing` is a table of texts, `without` is a list of names")
    taken = _renamed(read_family(base, depth + 1), replacing)
    taken = _merged(_remaining(taken, without), content, ())
    if not isinstance(taken, dict):
        raise _wrong(path, "the file is no table")
    return taken


def _wrong(path: Path, why: str) -> DataFileError:
    return DataFileError(f"{path.name}: {why}.", "Correct the family file.")


def _is_texts(value: Any, kind: type) -> bool:
    texts = [*value, *value.values()] if isinstance(value, dict) else value
    return isinstance(value, kind) and all(isinstance(text, str) and text for text in texts)


def _renamed(value: Any, replacing: Mapping[str, str]) -> Any:
    """Return the value with words replaced in every text. A word ends where its characters do."""
    if isinstance(value, dict):
        return {_renamed(key, replacing): _renamed(part, replacing) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, replacing) for part in value]
    if isinstance(value, str) and replacing:
        words = "|".join(
            (r"(?<!\w)" if old[0].isalnum() else "")
            + re.escape(old)
            + (r"(?!\w)" if old[-1].isalnum() else "")
            for old in sorted(replacing, key=len, reverse=True)
        )
        return re.sub(words, lambda match: replacing[match[0]], value)
    return value


def _remaining(value: Any, without: Collection[str]) -> Any:
    if isinstance(value, dict):
        return {key: _remaining(part, without) for key, part in value.items()}
    if isinstance(value, list):
        return [part for part in value if not _named(part, without)]
    return value


def _named(row: Any, patterns: Collection[str]) -> bool:
    name = row.get("name") if isinstance(row, dict) else None
    return isinstance(name, str) and any(fnmatchcase(name, each) for each in patterns)


def _merged(base: Any, own: Any, where: tuple[str, ...]) -> Any:
    if isinstance(base, dict) and isinstance(own, dict) and where != _REPLACED_WHOLE:
        parts = {
            key: _merged(base[key], part, (*where, key)) if key in base else part
            for key, part in own.items()
        }
        merged = {**base, **parts}
        gone = [key for key, part in own.items() if part is None and where[:1] != ("synth",)]
        return {key: part for key, part in merged.items() if key not in gone}
    if _is_rows(base) and _is_rows(own):
        named = {row["name"] for row in own}
        changed = {row["name"] for row in base} & named
        first = {name: [row for row in own if row["name"] == name] for name in changed}
        kept = [
            part
            for row in base
            for part in (first.pop(row["name"], []) if row["name"] in changed else [row])
        ]
        return [*kept, *(row for row in own if row["name"] not in changed)]
    return own


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) and "name" in row for row in value)


def family_of(
    config: Mapping[str, Any], families: Mapping[str, Family], names: Collection[str] = ()
) -> Family | None:
    """Return the family whose `model_types` holds the config's model_type, or None.

    If none does, the model_type of a larger model's text model counts. `names` are the names of the
    checkpoint's tensors, which say how the rows are named on disk.
    """
    kinds = ((f, config.get("model_type")) for f in families.values())
    inner = ((f, find(config, f"{f.nested}.model_type")) for f in families.values() if f.nested)
    family = next((f for f, kind in (*kinds, *inner) if kind in f.model_types), None)
    return family and family.named_as(names)
