"""The output folder: whose it is, and whether a run goes on, starts over, or is already done.

While a run is under way, OUT holds the run's ledger, which names every file that the run will make.
The run writes the ledger first and deletes it when config.json is there. So a folder with a ledger
is ours and unfinished; a folder with mquant.json and no ledger is ours and finished; an empty
folder is free; every other folder is refused. `shared_run` decides about a run in shares.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, Final

from mquant.errors import OutputError
from mquant.output.disk import PARTIAL, is_plain, is_there
from mquant.output.ledger import SHARES, Recorded, is_ledger, read_ledger
from mquant.output.record import RECORD, own_table

_ANOTHER_OUT: Final = "Give another folder with -o, or --restart to delete what mquant made there."


class State(Enum):
    """What was found in OUT."""

    FREE = "free"
    UNFINISHED = "unfinished"
    DONE = "done"


@dataclass(frozen=True)
class Claim:
    """What OUT holds of this very run, and the names of the files that are known.

    `recorded` is what the ledger of an unfinished run says, if the run may go on from there.
    """

    state: State
    files: tuple[str, ...] = ()
    recorded: Recorded | None = None


def examine(
    out: Path,
    sources: Iterable[Path],
    fingerprint: dict[str, Any],
    *,
    restart: bool,
    elsewhere: Iterable[str] = (),
) -> Claim:
    """Say what OUT holds; write nothing.

    `fingerprint` is a table of strings that tells one run from another. `elsewhere` are files of
    the finished checkpoint that OUT does not hold. Raises OutputError if OUT is not ours, or if OUT
    is, is in, or holds one of the source folders; and, unless `restart`, if another run made or
    makes OUT, or if a file was changed since.
    """
    if is_there(out) and not out.is_dir():
        raise OutputError(f"{out} is a file.", "Give a folder with -o.")
    for source in sources:
        _refuse_overlap(out.resolve(), source.resolve())
    if not out.is_dir() or not any(out.iterdir()):
        return Claim(State.FREE)
    if os.path.lexists(out / SHARES):
        raise OutputError(
            f"{out} is being made in shares.",
            f"When all are done, run: mquant finish {out}; or give another folder with -o.",
        )
    ledger, record = read_ledger(out), own_table(out)
    if ledger is not None and not ledger.files:
        ledger = None  # of a run that was stopped while it claimed OUT, or that claims it now
    if ledger is None and all(_is_claim(path) for path in out.iterdir()):
        return Claim(State.FREE)
    if ledger is None and record is None:
        raise OutputError(
            f"{out} is not empty, and mquant did not make it.",
            "Give another folder with -o, or empty this one.",
        )
    made = (record or {}) if ledger is None else {}
    other_fingerprint = made.get("fingerprint") if ledger is None else ledger.fingerprint
    names = made.get("files", ()) if ledger is None else ledger.files
    if not restart and other_fingerprint != fingerprint:
        raise other_run(out, other_fingerprint, fingerprint)
    files = tuple(dict.fromkeys((*_safe_names(out, names), RECORD)))
    if restart:
        return Claim(State.UNFINISHED, files)
    if ledger is not None:
        return Claim(State.UNFINISHED, files, ledger)
    done = _is_whole(out, made, frozenset(elsewhere))
    return Claim(State.DONE if done else State.UNFINISHED, files)


def discard(out: Path, files: Iterable[str]) -> None:
    """Delete recorded files, config.json first: what remains must not look like a checkpoint."""
    for name in sorted(files, key=lambda name: name != "config.json"):
        for path in (out / name, out / (name + PARTIAL)):
            if path.is_file() or path.is_symlink():
                path.unlink()
        parent = (out / name).parent
        if parent != out and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def is_finished(out: Path, fingerprint: dict[str, Any] | None = None) -> bool:
    """Whether OUT holds all files of a finished run; with a `fingerprint`, of that run.

    Raises OutputError if a file was changed since.
    """
    record = own_table(out) or {}
    this = fingerprint is None or record.get("fingerprint") == fingerprint
    return this and _is_whole(out, record, frozenset())


def _is_whole(out: Path, record: dict[str, Any], elsewhere: frozenset[str]) -> bool:
    """Whether all files of a finished run are in OUT, but for the files that are elsewhere.

    Raises OutputError for a file of another size: the file may be somebody's work.
    """
    files = record.get("files")
    files = files if isinstance(files, dict) else {}
    files = {name: value for name, value in files.items() if name not in elsewhere}
    there = [name for name in _safe_names(out, files) if (out / name).is_file()]
    for name in there:
        meant = files[name].get("bytes") if isinstance(files[name], dict) else None
        found = (out / name).stat().st_size
        if found != meant:
            raise OutputError(
                f"{name} in {out} was changed since mquant made it: it was {str(meant)[:20]} "
                f"bytes, is {found}.",
                "Give another folder with -o, or --restart to make everything there again.",
            )
    return "config.json" in there and len(there) == len(files)


def _safe_names(out: Path, value: object) -> tuple[str, ...]:
    """Names that a record may ask to delete: plain relative paths inside OUT, through no link."""
    names = list(value) if isinstance(value, dict | list | tuple) else []
    return tuple(name for name in names if isinstance(name, str) and is_inside(out, name))


def is_inside(out: Path, name: str) -> bool:
    """Whether a name stands for a file in OUT, and no link on the way leads elsewhere."""
    if not is_plain(name):
        return False
    path = PurePosixPath(name)
    real = Path(os.path.realpath(out))  # `resolve` raises for a link to itself
    return Path(os.path.realpath(real / path.parent)) == real / path.parent


def _refuse_overlap(out: Path, source: Path) -> None:
    if out == source or source in out.parents or out in source.parents:
        raise OutputError(
            f"{out} and the source folder {source} overlap; the source is never written to.",
            "Give a folder outside of it with -o.",
        )


def _is_claim(path: Path) -> bool:
    """Whether a file is there only because a process claims OUT, or was stopped while it did."""
    if not os.path.lexists(path):
        return True  # they have let go of it by now
    if path.name == SHARES + PARTIAL:
        return path.is_file() and not path.is_symlink()
    found = read_ledger(path.parent, path.name) if is_ledger(path.name) else None
    return found is not None and not found.files


def other_run(
    out: Path, other_fingerprint: object, ours: dict[str, Any], fix: str = _ANOTHER_OUT
) -> OutputError:
    """The error if OUT is of another run: it names the values that differ."""
    return OutputError(
        f"{out} was made from something else: {differences(other_fingerprint, ours)}.", fix
    )


def differences(other_fingerprint: object, ours: Mapping[str, Any]) -> str:
    """The values in which the fingerprint of another run differs from ours."""
    other_fingerprint = other_fingerprint if isinstance(other_fingerprint, dict) else {}
    keys = [key for key in ours if other_fingerprint.get(key) != ours[key]] or ["fingerprint"]
    was = {key: str(other_fingerprint.get(key))[:80] for key in keys}
    return "; ".join(f"{key} was {was[key]}, is {ours.get(key)}" for key in keys)
