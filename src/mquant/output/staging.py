"""A hidden folder for new files, which move to their place when all files are complete.

Beside the hidden folder lies a ledger, which is the lock and has the names of the files that move.
So a run that was killed leaves no file that the next run takes for another's. The ledger is deleted
last, after the hidden folder: what lies beside a ledger is never more than a part of a run.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from mquant.checkpoint import CONFIG_NAME, INDEX_NAME
from mquant.errors import OutputError
from mquant.output.disk import fsync_folder, out_of_space
from mquant.output.folder import discard
from mquant.output.ledger import Ledger, Recorded, read_ledger
from mquant.text import size

_STAGING: Final = ".mquant-synth"
_LEDGER: Final = ".mquant-synth.jsonl"


@contextmanager
def staging(out: Path, needed: int, names: tuple[str, ...]) -> Iterator[Path]:
    """Yield a hidden folder inside `out` to write the files `names` into.

    After the block, the files move to `out` in the order of `names`: config.json last. A failure
    leaves no file. Raises OutputError if `out` is a file, holds a file that no earlier run moved
    there, is in use, or has less than `needed` bytes free.
    """
    folder = out / _STAGING
    with out_of_space(out / CONFIG_NAME, needed):
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file.", "Give a folder that does not exist yet.")
        fresh = not out.exists()
        _moved(out)
        ledger = Ledger(out, _LEDGER)
    try:
        with out_of_space(out / CONFIG_NAME, needed):
            discard(out, _moved(out))  # again: now nobody else can change it
            folder.mkdir(exist_ok=True)
        _check_room(out, needed)
        yield folder
        ledger.begin({}, names, afresh=True)
        _move(folder, out, names)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        (out / _LEDGER).unlink(missing_ok=True)
        ledger.release()
        if fresh and not any(out.iterdir()):
            out.rmdir()


def _move(folder: Path, out: Path, names: tuple[str, ...]) -> None:
    try:
        with out_of_space(out / CONFIG_NAME, 0):
            for name in names:
                (folder / name).rename(out / name)
                if name == INDEX_NAME:
                    fsync_folder(out)
            fsync_folder(out)
    except BaseException:
        discard(out, names)
        raise


def _moved(out: Path) -> list[str]:
    """Return the files that an earlier run moved to `out`. Raises OutputError for other files."""
    earlier = read_ledger(out, _LEDGER) or Recorded()
    paths = [path for path in (out.iterdir() if out.is_dir() else ()) if path.name != _LEDGER]
    moved = [path.name for path in paths if path.name != _STAGING or path.is_symlink()]
    if not set(moved) <= set(earlier.files):
        raise OutputError(f"{out} is not empty.", "Give another folder, or empty this one.")
    return moved


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OutputError(
            f"{out} needs {size(needed)}, {size(free)} are free there.",
            "Free space, ask for smaller sizes, or give a folder on another disk.",
        )
