"""A hidden folder for new files, which move to their place when all files are complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from mquant.checkpoint import CONFIG_NAME, INDEX_NAME
from mquant.errors import OutputError
from mquant.output.disk import fsync_folder, out_of_space
from mquant.text import size

_STAGING: Final = ".mquant-synth"


@contextmanager
def staging(out: Path, needed: int) -> Iterator[Path]:
    """Yield a hidden folder inside `out` to write into, and delete the folder in the end.

    Raises OutputError if `out` is a file, is not empty, or has less than `needed` bytes free.
    """
    with out_of_space(out / CONFIG_NAME, needed):
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file.", "Give a folder that does not exist yet.")
        if out.is_dir() and any(out.iterdir()):
            raise OutputError(f"{out} is not empty.", "Give another folder, or empty this one.")
        fresh = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        folder = out / _STAGING
        folder.mkdir()
    try:
        free = shutil.disk_usage(out).free
        if free < needed:
            raise OutputError(
                f"{out} needs {size(needed)}, {size(free)} are free there.",
                "Free space, ask for smaller sizes, or give a folder on another disk.",
            )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if fresh and not any(out.iterdir()):
            out.rmdir()


def publish(folder: Path, out: Path, names: tuple[str, ...]) -> None:
    """Move complete files from `folder` to `out` in the order of `names`: config.json last."""
    with out_of_space(out / CONFIG_NAME, 0):
        for name in names:
            (folder / name).rename(out / name)
            if name == INDEX_NAME:
                fsync_folder(out)
        fsync_folder(out)
