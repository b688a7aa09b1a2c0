"""SRC and OUT: turn a command line argument into a source and a folder."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mquant.errors import SourceError, UsageError

if TYPE_CHECKING:
    from mquant.checkpoint import Source

# The hub's form: `org/name`, 96 characters at most.
_REPO_ID: Final = re.compile(r"(?=.{3,96}$)\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_repo_id(text: str) -> bool:
    """Return whether a string has the form of a hub repo id: `org/name`."""
    return bool(_REPO_ID.fullmatch(text))


def example(verb: Callable[..., None]) -> str:
    """Return the last line of a verb's help: `Example: mquant ...`."""
    return (verb.__doc__ or "").rstrip().rpartition("\n")[2].strip()


def open_source(
    src: str | None, revision: str | None, fix: str = "Give a folder or a hub repo id."
) -> "Source":
    """Return the checkpoint that SRC names: a folder or a hub repo; None: the current folder.

    An existing folder is preferred. A name that starts with `.`, `/` or `~` is always a folder.
    Raises UsageError if SRC is left out and the current folder holds no checkpoint (`fix` says what
    to give: the verb's example); SourceError if there is no such folder.
    """
    from mquant.checkpoint import Folder

    try:
        if src is None:
            if not Path("config.json").is_file():
                raise UsageError(
                    "SRC is missing, and the current folder is no checkpoint (no config.json).",
                    fix,
                )
            src = "."
        path = Path(src).expanduser()
        exists = path.exists()
        if not exists and not src.startswith((".", "/", "~")) and is_repo_id(src):
            from mquant.checkpoint.hub import HubRepo  # slow to import

            return HubRepo(src, revision)
        folder = Folder(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: `~nobody`
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SourceError(f"{src} cannot be read: {reason}.", "Check the path.") from error
    if revision is not None:
        raise UsageError(
            f"--revision is for hub repos; {src} is a folder.", "Leave --revision out."
        )
    return folder


def default_out(source: "Source", suffix: str) -> Path:
    """Return the output folder if `-o` is left out: `<name of SRC>-<suffix>` in the current folder.

    `suffix` says what OUT holds, e.g. `NVFP4`, `ModelOpt` or `repaired`. If SRC is the
    current folder, OUT is beside SRC.
    """
    from mquant.checkpoint import Folder

    name = f"{source.name.rpartition('/')[2]}-{suffix}"
    if isinstance(source, Folder) and source.root.resolve() == Path.cwd():
        return Path("..") / name
    return Path(name)
