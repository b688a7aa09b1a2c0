"""A hidden folder for new files, which move to their place when all files are complete.

The hidden folder holds the lock, and a ledger with the names of the files that move. So a run that
was killed leaves no file that the next run takes for another's.
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
        earlier = read_ledger(folder) or Recorded()
        moved = [] if fresh else [path.name for path in out.iterdir() if path != folder]
        if not set(moved) <= set(earlier.files) or folder.is_symlink():
            raise OutputError(f"{out} is not empty.", "Give another folder, or empty this one.")
        ledger = Ledger(folder)
    try:
        discard(out, moved)
        _check_room(out, needed)
        yield folder
        ledger.begin({}, names, afresh=True)
        with out_of_space(out / CONFIG_NAME, 0):
            for name in names:
                (folder / name).rename(out / name)
                if name == INDEX_NAME:
                    fsync_folder(out)
            fsync_folder(out)
    except BaseException:
        discard(out, names)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        ledger.release()
        if fresh and not any(out.iterdir()):
            out.rmdir()


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OutputError(
            f"{out} needs {size(needed)}, {size(free)} are free there.",
            "Free space, ask for smaller sizes, or give a folder on another disk.",
        )
