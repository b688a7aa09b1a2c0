"""mquant.json, read back: what a finished checkpoint says of how it was made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mquant.checkpoint import Source, read_json
from mquant.errors import SourceError
from mquant.output.folder import RECORD, is_plain

_INPUTS: Final = ("data", "importance")
_CARD: Final = "README.md"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Record:
    """What mquant.json says. Strings are empty, and tables too, where it does not say.

    `source` is the identity of the parent, `files` have bytes and sha256 by path, but for the card,
    which is written anew when there is more to say; `inputs` are what else it was made with
    (`data`, `importance`): the sha256 of each file, or a dataset's id; `repairs` are as `mquant
    repair` wrote them, oldest first.
    """

    mquant: str
    source: Mapping[str, str]
    recipe: str
    engine: str
    versions: Mapping[str, str]
    inputs: Mapping[str, str]
    files: Mapping[str, tuple[int, str]]
    repairs: tuple[Mapping[str, Any], ...]


def read_record(source: Source) -> Record | None:
    """The record of a checkpoint; None where it has none. Raises SourceError for a useless one."""
    if RECORD not in source.files:
        return None
    value = read_json(source, RECORD)
    recipe, engine = _table(value.get("recipe")), _table(value.get("engine"))
    repairs = value.get("repairs")
    fingerprint = _strings(value.get("fingerprint"))
    return Record(
        mquant=_string(value.get("mquant")),
        source=_strings(value.get("source")),
        recipe=_string(recipe.get("name")),
        engine=_string(engine.get("name")),
        versions=_strings(engine.get("versions")),
        inputs={key: said for key in _INPUTS if (said := fingerprint.get(key, "none")) != "none"},
        files=_files(value.get("files")),
        repairs=tuple(map(_table, repairs)) if isinstance(repairs, list) else (),
    )


def _files(value: object) -> dict[str, tuple[int, str]]:
    files: dict[str, tuple[int, str]] = {}
    for name, entry in _table(value).items():
        if name == _CARD:
            continue
        size, digest = _table(entry).get("bytes"), _table(entry).get("sha256")
        known = isinstance(digest, str) and _SHA256.fullmatch(digest) and is_plain(name)
        if type(size) is not int or not known:
            raise SourceError(
                f"{RECORD} does not say the size and sha256 of {name!r}.",
                "Make the checkpoint again with mquant, or get the file again.",
            )
        files[name] = (size, str(digest))
    return dict(sorted(files.items()))


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _strings(value: object) -> dict[str, str]:
    return {key: text for key, text in _table(value).items() if isinstance(text, str)}


__all__ = ["Record", "read_record"]
