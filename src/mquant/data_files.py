"""Folders: those that ship with mquant (`configs/`, `recipes/`), home, cache and temporary."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import yaml

from mquant.errors import DataFileError, OutputError
from mquant.untrusted import open_named

MAX_YAML_BYTES = 200_000
_MOST_JSON = 4_000_000


class _Loader(yaml.SafeLoader):
    """A YAML loader without `<<`: nested merges of a table can fill any memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge nothing: `<<` stays a key, and a key that no constructor knows is an error."""


def folder(kind: Literal["configs", "recipes"]) -> Path:
    """Return a shipped folder's path: inside the package in a wheel, at the root of a checkout."""
    package = Path(__file__).parent
    shipped = package / kind
    return shipped if shipped.is_dir() else package.parent.parent / kind


def home() -> Path:
    """Return the user's home folder; `/`, where few users can write, if the user has no home."""
    try:
        found = Path.home()
    except RuntimeError:  # neither HOME nor an entry in the system's list of users
        return Path("/")
    return found if found.is_absolute() else Path("/")


def cache() -> Path:
    """Return the folder in the user's cache for files that mquant can write again.

    The folder may be one that cannot be written.
    """
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (stated if stated.is_absolute() else home() / ".cache") / "mquant"


def settle_folders() -> None:
    """Give the libraries the same home and cache folder, for this process and its children.

    By themselves, libraries write into a folder named `~` if the user has no home, and into the
    current folder if XDG_CACHE_HOME is relative.
    """
    folders = {"HOME": home(), "XDG_CACHE_HOME": cache().parent}
    os.environ.update({name: str(folder) for name, folder in folders.items()})
    os.environ.setdefault("USER", str(os.getuid()))  # torch asks for a name


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder of this process, which a `with` block deletes. Raises OutputError."""
    try:
        return tempfile.TemporaryDirectory(prefix="mquant-")
    except OSError as error:
        raise OutputError(
            f"There is no temporary folder: {error.strerror}.",
            "Set TMPDIR to a folder that can be written.",
        ) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one table. Raises DataFileError for anything else."""
    try:
        with open_named(path, "Give a YAML file.", MAX_YAML_BYTES) as file:
            value = parse_yaml(file.read().decode("utf-8"))
    except UnicodeDecodeError:
        raise DataFileError(f"{path} is not a text file.", "Give a YAML file.") from None
    except ValueError as error:
        raise DataFileError(f"{path} is not valid YAML{error}.", "Correct the file.") from None
    if not isinstance(value, dict):
        raise DataFileError(f"{path} does not hold a table of keys.", "Correct the file.")
    _check_json(path, value)
    return value


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises ValueError, which says where, for any other text."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 -- it is a SafeLoader
    # PyYAML's constructors raise these: 2001-99-99, `!!bool maybe`, `!!timestamp x`, `!!int ""`.
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f" at line {mark.line + 1}" if mark else "") from None


def _check_json(path: Path, value: object) -> None:
    """Raise DataFileError for a value that JSON cannot hold, or holds only in very many bytes."""
    size = 0
    try:
        for piece in json.JSONEncoder(ensure_ascii=False, allow_nan=False).iterencode(value):
            size += len(piece.encode())
            if size > _MOST_JSON:
                break
    except (TypeError, ValueError) as error:
        message = f"{path} holds a value that JSON cannot hold: {error}."
        raise DataFileError(message, "Correct the file.") from None
    if size > _MOST_JSON:
        raise DataFileError(f"{path} makes very much of a few aliases.", "Correct the file.")
