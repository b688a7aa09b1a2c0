"""Replace files of a checkpoint folder: a loader sees the old checkpoint, the new one, or none.

A hidden folder inside holds the complete new files. `stage` writes a journal of the changes beside
the hidden folder. `apply` then carries out the journal: it deletes config.json, moves one file
after another into place, deletes obsolete files, and moves index and config.json last; it deletes
the journal when the hidden folder is gone. If `apply` is killed, the next call does the rest.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from mquant.checkpoint import CONFIG_NAME
from mquant.errors import OutputError
from mquant.output.disk import fsync_folder, out_of_space, read_own, write_whole
from mquant.output.finish import LAST
from mquant.output.folder import is_inside
from mquant.untrusted import MAX_TEXT_BYTES, parse_json

WORK: Final = ".mquant-repair"
JOURNAL: Final = ".mquant-repair.json"
_SCHEMA: Final = "mquant.apply/1"


def stage(root: Path, obsolete: Iterable[str]) -> None:
    """Write the journal: all files in the hidden folder of `root` replace those of `root`."""
    work = root / WORK
    files = [path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file()]
    table = {"schema": _SCHEMA, "files": sorted(files), "obsolete": sorted(obsolete)}
    with out_of_space(root / JOURNAL, 0):
        write_whole(root / JOURNAL, [json.dumps(table).encode()])


def is_staged(root: Path) -> bool:
    """Return whether only `apply` is left to do: a journal exists."""
    return (root / JOURNAL).is_file()


def apply(root: Path) -> None:
    """Carry out the journal, or the rest of it.

    Raises OutputError if the folder cannot be written, if the journal is not mquant's, or if a name
    in the journal leads out of `root`. `apply` checks all names before it moves a file.
    """
    work = root / WORK
    table = _read(root / JOURNAL)
    files = [name for name in _names(root, table, "files") if name not in LAST]
    obsolete = _names(root, table, "obsolete")
    with out_of_space(root / CONFIG_NAME, 0):
        if (work / CONFIG_NAME).exists():
            (root / CONFIG_NAME).unlink(missing_ok=True)
            fsync_folder(root)
        for name in files:
            _move(work, root, name)
        for name in obsolete:
            (root / name).unlink(missing_ok=True)
        for name in LAST:
            fsync_folder(root)
            _move(work, root, name)
        for path in sorted((work, *work.rglob("*")), reverse=True):
            if path.exists():
                path.rmdir()
        fsync_folder(root)
        (root / JOURNAL).unlink()


def _move(work: Path, root: Path, name: str) -> None:
    if (work / name).exists():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).replace(root / name)
        fsync_folder((root / name).parent)


def _names(root: Path, table: dict[str, Any], key: str) -> list[str]:
    value = table.get(key, [])
    names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
    for name in names:
        if not is_inside(root, name):
            raise OutputError(
                f"{name} would be outside of {root}: by its name, or by a link on the way.",
                "Remove the link, or repair into another folder with -o.",
            )
    return names


def _read(path: Path) -> dict[str, Any]:
    try:
        table = parse_json(read_own(path, MAX_TEXT_BYTES) or b"")
    except ValueError:
        table = None
    if not isinstance(table, dict) or table.get("schema") != _SCHEMA:
        raise OutputError(
            f"{path} is not a journal of mquant.",
            f"If mquant did not write it, delete {path}; then run the same command again.",
        )
    return table
