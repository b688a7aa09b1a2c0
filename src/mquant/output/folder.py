"""The state of the output folder: free, unfinished, finished, or not made by mquant.

While a run is under way, OUT holds the run's ledger, which names every file that the run will
write. The run writes the ledger first and deletes it after config.json is written. So a folder with
a ledger is mquant's and unfinished; a folder with mquant.json and no ledger is mquant's and
finished; an empty folder is free; every other folder is refused. `shared_run` decides about a run
in shares.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, Final

from mquant.checkpoint import CONFIG_NAME, Folder
from mquant.checkpoint.hashing import differing
from mquant.errors import OutputError
from mquant.events import Emit, silent
from mquant.output.disk import PARTIAL, is_plain, is_there
from mquant.output.ledger import SHARES, Recorded, is_ledger, read_ledger
from mquant.output.mquant_json import RECORD, own_table

_ANOTHER_OUT: Final = "Give another folder with -o, or --restart to delete what mquant made there."


class State(Enum):
    """The state of OUT for a run."""

    FREE = "free"
    UNFINISHED = "unfinished"
    DONE = "done"


@dataclass(frozen=True)
class Claim:
    """The state of OUT for a run, and the names of the files that mquant may have written there.

    `recorded` is the content of the ledger of an unfinished run, if this run can resume that run.
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
    emit: Emit = silent,
) -> Claim:
    """Return the state of OUT; write nothing.

    `fingerprint` is a table of strings that tells one run from another. `elsewhere` are files of
    the finished checkpoint that OUT does not hold. Raises OutputError if OUT is a file, if mquant
    did not make OUT, if a run in shares fills OUT, or if OUT is, is in, or holds one of the source
    folders. Unless `restart`, also raises OutputError if OUT belongs to another run, or if a file
    has changed since a run finished OUT.
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
            f"When all shares are done, run: mquant finish {out}; or give another folder with -o.",
        )
    ledger, record = read_ledger(out), own_table(out)
    if ledger is not None and not ledger.files:
        ledger = None  # a run is claiming OUT, or was stopped while it claimed OUT
    if ledger is None and all(_is_claim(path) for path in out.iterdir()):
        return Claim(State.FREE)
    if ledger is None and record is None:
        raise OutputError(
            f"{out} is not empty, and mquant did not make it.",
            "Give another folder with -o, or empty this one.",
        )
    table = (record or {}) if ledger is None else {}
    other_fingerprint = table.get("fingerprint") if ledger is None else ledger.fingerprint
    names = table.get("files", ()) if ledger is None else ledger.files
    if not restart and other_fingerprint != fingerprint:
        raise other_run(out, other_fingerprint, fingerprint)
    files = tuple(dict.fromkeys((*_safe_names(out, names), RECORD)))
    if restart:
        return Claim(State.UNFINISHED, files)
    if ledger is not None:
        return Claim(State.UNFINISHED, files, ledger)
    done = _is_whole(out, table, frozenset(elsewhere), emit)
    return Claim(State.DONE if done else State.UNFINISHED, files)


def discard(out: Path, files: Iterable[str]) -> None:
    """Delete `files`: config.json first, for the rest must not look like a checkpoint.

    mquant.json goes last: it says that the rest is mquant's.
    """
    for name in sorted(files, key=lambda name: (name == RECORD, name != CONFIG_NAME, name)):
        for path in (out / name, out / (name + PARTIAL)):
            if path.is_file() or path.is_symlink():
                path.unlink()
        parent = (out / name).parent
        if parent != out and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def is_finished(out: Path, fingerprint: dict[str, Any] | None = None, emit: Emit = silent) -> bool:
    """Return whether OUT holds all files of a finished run; with a `fingerprint`, of that run.

    Raises OutputError if a file has changed since.
    """
    record = own_table(out) or {}
    matches = fingerprint is None or record.get("fingerprint") == fingerprint
    return matches and _is_whole(out, record, frozenset(), emit)


def _is_whole(out: Path, record: dict[str, Any], elsewhere: frozenset[str], emit: Emit) -> bool:
    """Return whether all files of a finished run are in OUT, except the files in `elsewhere`.

    Raises OutputError for a file that has changed: the user may have edited the file.
    """
    files = record.get("files")
    files = files if isinstance(files, dict) else {}
    files = {name: value for name, value in files.items() if name not in elsewhere}
    present = [name for name in _safe_names(out, files) if (out / name).is_file()]
    for name in present:
        recorded = files[name].get("bytes") if isinstance(files[name], dict) else None
        actual = (out / name).stat().st_size
        if actual != recorded:
            raise _edited(out, name, f"size was {str(recorded)[:20]} bytes and is {actual}")
    whole = CONFIG_NAME in present and len(present) == len(files)
    if whole:
        _refuse_edited(out, {name: str(files[name].get("sha256")) for name in present}, emit)
    return whole


def _refuse_edited(out: Path, digests: Mapping[str, str], emit: Emit) -> None:
    """Raise OutputError if a file has another digest. All files are read: times prove nothing."""
    folder = Folder(out)
    known = {name: digest for name, digest in digests.items() if name in folder.files}
    for name, digest in differing(folder, known, emit):
        raise _edited(out, name, f"sha256 was {known[name][:64]} and is {digest}")


def _edited(out: Path, name: str, what: str) -> OutputError:
    return OutputError(
        f"{name} in {out} has changed since mquant wrote it: its {what}.",
        "Give another folder with -o, or --restart to write all files of the folder again.",
    )


def _safe_names(out: Path, value: object) -> tuple[str, ...]:
    """Return the names that are safe to delete: plain relative paths inside OUT, not via links."""
    names = list(value) if isinstance(value, dict | list | tuple) else []
    return tuple(name for name in names if isinstance(name, str) and is_inside(out, name))


def is_inside(out: Path, name: str) -> bool:
    """Return whether `name` is a plain path inside OUT, and no folder on the way is a link."""
    if not is_plain(name):
        return False
    path = PurePosixPath(name)
    real = Path(os.path.realpath(out))  # `resolve` raises for a link to itself
    return Path(os.path.realpath(real / path.parent)) == real / path.parent


def _refuse_overlap(out: Path, source: Path) -> None:
    if out == source or source in out.parents or out in source.parents:
        raise OutputError(
            f"{out} and the source folder {source} overlap; mquant never writes into the source.",
            "Give a folder outside of the source with -o.",
        )


def _is_claim(path: Path) -> bool:
    """Return whether a file is only the trace of a process that is, or was, claiming OUT."""
    if not os.path.lexists(path):
        return True  # the process has released OUT by now
    if path.name == SHARES + PARTIAL:
        return path.is_file() and not path.is_symlink()
    recorded = read_ledger(path.parent, path.name) if is_ledger(path.name) else None
    return recorded is not None and not recorded.files


def other_run(
    out: Path, other_fingerprint: object, fingerprint: dict[str, Any], fix: str = _ANOTHER_OUT
) -> OutputError:
    """Return the error for an OUT of another run; the message names the values that differ."""
    return OutputError(
        f"{out} was made from something else: {differences(other_fingerprint, fingerprint)}.", fix
    )


def differences(other_fingerprint: object, fingerprint: Mapping[str, Any]) -> str:
    """Return the values in which the fingerprint of another run differs from this run's."""
    other = other_fingerprint if isinstance(other_fingerprint, dict) else {}
    keys = [k for k in fingerprint if other.get(k) != fingerprint[k]] or ["fingerprint"]
    values = {key: str(other.get(key))[:80] for key in keys}
    return "; ".join(f"{key} was {values[key]}, is {fingerprint.get(key)}" for key in keys)
