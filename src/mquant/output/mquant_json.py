"""Read mquant.json, in which a finished checkpoint says how it was made.

The file is untrusted, so its size and depth are limited. A checkpoint that mquant did not make has
no such file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mquant.checkpoint import Source
from mquant.errors import SourceError
from mquant.output.disk import is_plain, read_own
from mquant.untrusted import TooMuch, parse_json

RECORD: Final = "mquant.json"
CALIBRATION: Final = "calibration"
_MOST_BYTES: Final = 64_000_000
_INPUTS: Final = ("data", "importance")
_CARD: Final = "README.md"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Record:
    """The content of mquant.json. A string or a table that mquant.json lacks is empty.

    `source` is the identity of the parent. `files` maps each path to its bytes and sha256, but for
    the card, which may be written again later. `inputs` maps the other inputs (`data`,
    `importance`) to the sha256 of the file, or to a dataset's id. `repairs` are the entries that
    `mquant repair` wrote, oldest first. `cast` counts the blocks that were cast from MXFP4.
    """

    mquant: str
    source: Mapping[str, str]
    recipe: str
    engine: str
    versions: Mapping[str, str]
    inputs: Mapping[str, str]
    files: Mapping[str, tuple[int, str]]
    repairs: tuple[Mapping[str, Any], ...]
    cast: Mapping[str, Any]


def read_table(source: Source) -> dict[str, Any]:
    """Return mquant.json of a checkpoint; {} if absent. Raises SourceError for an invalid file."""
    if RECORD not in source.files:
        return {}
    if source.files[RECORD] > _MOST_BYTES:
        raise _invalid("is too large to be what it says")
    return _parse(source.read(RECORD))


def known_table(source: Source) -> dict[str, Any]:
    """Return mquant.json of a checkpoint; {} if the file is absent or invalid."""
    try:
        return read_table(source)
    except SourceError:
        return {}


def own_table(out: Path) -> dict[str, Any] | None:
    """Return mquant.json in OUT; None if there is no readable file, {} if the file is invalid."""
    raw = read_own(out / RECORD, _MOST_BYTES)
    try:
        return None if raw is None else _parse(raw)
    except SourceError:
        return {}


def calibration_of(source: Source) -> dict[str, Any]:
    """Return the entry of mquant.json on the calibration data; {} if there is none.

    What is made of a calibrated checkpoint says so too.
    """
    stated = as_table(known_table(source).get(CALIBRATION))
    return {CALIBRATION: stated} if stated else {}


def read_record(source: Source) -> Record | None:
    """Return the record of a checkpoint, or None. Raises SourceError for an invalid mquant.json."""
    value = read_table(source)
    if not value and RECORD not in source.files:
        return None
    recipe, engine = as_table(value.get("recipe")), as_table(value.get("engine"))
    repairs = value.get("repairs")
    fingerprint = _strings(value.get("fingerprint"))
    return Record(
        mquant=_string(value.get("mquant")),
        source=_strings(value.get("source")),
        recipe=_string(recipe.get("name")),
        engine=_string(engine.get("name")),
        versions=_strings(engine.get("versions")),
        inputs={key: text for key in _INPUTS if (text := fingerprint.get(key, "none")) != "none"},
        files=_files(value.get("files")),
        repairs=tuple(map(as_table, repairs)) if isinstance(repairs, list) else (),
        cast=as_table(value.get("cast")),
    )


def as_table(value: object) -> dict[str, Any]:
    """Return `value` if it is a table, else an empty table."""
    return value if isinstance(value, dict) else {}


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        value = parse_json(raw)
    except TooMuch:
        raise _invalid("is too large to be what it says") from None
    except ValueError:
        raise _invalid("is not valid JSON") from None
    if not isinstance(value, dict):
        raise _invalid("is not a JSON object")
    return value


def _invalid(what: str) -> SourceError:
    return SourceError(f"{RECORD} {what}.", "Get the file again.")


def _files(value: object) -> dict[str, tuple[int, str]]:
    files: dict[str, tuple[int, str]] = {}
    for name, entry in as_table(value).items():
        if name == _CARD:
            continue
        size, digest = as_table(entry).get("bytes"), as_table(entry).get("sha256")
        known = isinstance(digest, str) and _SHA256.fullmatch(digest) and is_plain(name)
        if type(size) is not int or not known:
            raise SourceError(
                f"{RECORD} does not say the size and sha256 of {name!r}.",
                "Make the checkpoint again with mquant, or get the file again.",
            )
        files[name] = (size, str(digest))
    return dict(sorted(files.items()))


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _strings(value: object) -> dict[str, str]:
    return {key: text for key, text in as_table(value).items() if isinstance(text, str)}
