"""The output folder: whose it is, whether a run goes on, starts over, or is already done.

While a run is under way OUT holds a ledger, `mquant-run.json`: what is being made and every file
name that will be. It is written before anything else and goes when config.json is there. So a
folder with a ledger is unfinished and ours, one with mquant.json and without a ledger is finished
and ours, an empty one is free, and every other one is refused.
"""

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, Final, TextIO

from mquant.errors import OutputError
from mquant.output.shards import PARTIAL, fsync_folder, out_of_space

LEDGER: Final = "mquant-run.json"
RECORD: Final = "mquant.json"


class State(Enum):
    """What was found in OUT."""

    FREE = "free"
    UNFINISHED = "unfinished"
    DONE = "done"


@dataclass(frozen=True)
class Claim:
    """What OUT holds of this very run, and the files of it that are known by name."""

    state: State
    files: tuple[str, ...]


def examine(out: Path, source: Path | None, fingerprint: dict[str, Any], *, restart: bool) -> Claim:
    """Say what OUT holds; write nothing.

    `fingerprint` is what tells one run from another: a table of strings.
    Raises OutputError for an OUT that is not ours, and unless `restart` for one that another run
    made or is making, or whose files were changed since; never lets OUT be, hold, or lie in the
    source folder.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file.", "Give a folder with -o.")
    if source is not None:
        _refuse_overlap(out.resolve(), source.resolve())
    if not out.is_dir() or not any(out.iterdir()):
        return Claim(State.FREE, ())
    ledger = _read(out / LEDGER)
    record = _read(out / RECORD)
    if ledger == {} and [path.name for path in out.iterdir()] == [LEDGER]:
        return Claim(State.FREE, ())  # a run that was stopped while it claimed OUT
    found = ledger or record
    if found is None:
        raise OutputError(
            f"{out} is not empty, and mquant did not make it.",
            "Give another folder with -o, or empty this one.",
        )
    files = tuple(dict.fromkeys((*_safe_names(found.get("files", ())), RECORD)))
    if not restart and found.get("fingerprint") != fingerprint:
        raise _other_run(out, found.get("fingerprint"), fingerprint)
    if restart or ledger is not None or not _is_whole(out, found):
        return Claim(State.UNFINISHED, files)
    return Claim(State.DONE, files)


class Ledger:
    """The claim on OUT during a run: a locked file that says what is being made."""

    def __init__(self, out: Path, claim: Claim, fingerprint: dict[str, Any]) -> None:
        """Claim OUT, dropping what an earlier, unfinished run left there.

        Raises OutputError where another process is at work in OUT.
        """
        self._out = out
        with out_of_space(out / LEDGER, 0):
            out.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = (out / LEDGER).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise OutputError(
                f"Another mquant is writing into {out}.", "Wait for it, or give another -o."
            ) from None
        discard(out, claim.files)
        self._fingerprint = fingerprint

    def record(self, files: Iterable[str]) -> None:
        """Write down every file this run will make, durably, before the first is."""
        content = {"schema": "mquant.run/1", "fingerprint": self._fingerprint}
        text = json.dumps({**content, "files": sorted(files)}, indent=2)
        with out_of_space(self._out / LEDGER, len(text)):
            self._file.truncate(0)
            self._file.write(text + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            fsync_folder(self._out)

    def complete(self) -> None:
        """The run is whole: the ledger goes."""
        with out_of_space(self._out / LEDGER, 0):
            (self._out / LEDGER).unlink()
            fsync_folder(self._out)
        self._file.close()

    def release(self) -> None:
        """Let go of OUT and leave the ledger, so that the next run knows the folder is ours."""
        self._file.close()


def discard(out: Path, files: Iterable[str]) -> None:
    """Delete recorded files, config.json first: what remains must not look like a checkpoint."""
    for name in sorted(files, key=lambda name: name != "config.json"):
        for path in (out / name, out / (name + PARTIAL)):
            if path.is_file() or path.is_symlink():
                path.unlink()
        parent = (out / name).parent
        if parent != out and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _is_whole(out: Path, record: dict[str, Any]) -> bool:
    """Whether a finished run's files are all there.

    Raises OutputError for one of another size: it may be somebody's work.
    """
    files = record.get("files")
    files = files if isinstance(files, dict) else {}
    there = [name for name in _safe_names(files) if (out / name).is_file()]
    for name in there:
        meant = files[name].get("bytes") if isinstance(files[name], dict) else None
        found = (out / name).stat().st_size
        if found != meant:
            raise OutputError(
                f"{name} in {out} was changed since mquant made it: it was {meant} bytes, "
                f"is {found}.",
                "Give another folder with -o, or --restart to make everything there again.",
            )
    return "config.json" in there and len(there) == len(files)


def _safe_names(value: object) -> tuple[str, ...]:
    """Names a record may ask to delete: plain relative paths inside OUT."""
    names = list(value) if isinstance(value, dict | list) else []
    return tuple(
        name
        for name in names
        if isinstance(name, str)
        and name
        and not PurePosixPath(name).is_absolute()
        and not {"..", "."} & set(PurePosixPath(name).parts)
    )


def _refuse_overlap(out: Path, source: Path) -> None:
    if out == source or source in out.parents or out in source.parents:
        raise OutputError(
            f"{out} and the source folder {source} overlap; the source is never written to.",
            "Give a folder outside of it with -o.",
        )


def _other_run(out: Path, theirs: object, ours: dict[str, Any]) -> OutputError:
    theirs = theirs if isinstance(theirs, dict) else {}
    keys = [key for key in ours if theirs.get(key) != ours[key]] or ["fingerprint"]
    differ = "; ".join(f"{key} was {theirs.get(key)}, is {ours.get(key)}" for key in keys)
    return OutputError(
        f"{out} was made from something else: {differ}.",
        "Give another folder with -o, or --restart to delete what mquant made there.",
    )


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON record of ours; None where there is none, an empty one where it is cut off."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


__all__ = ["LEDGER", "RECORD", "Claim", "Ledger", "State", "discard", "examine"]
