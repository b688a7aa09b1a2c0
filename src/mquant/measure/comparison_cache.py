"""The results of a comparison so far, kept in the user's cache, so that a rerun resumes.

There is one file for each pair of checkpoints, `~/.cache/mquant/compare/<key>.jsonl` (or under
XDG_CACHE_HOME), with a line for each tensor. The key is made of both identities, the stamps of all
files, mquant's version and the user's family file: if the key changes, all tensors are
compared again. An incomplete last line is ignored. A complete comparison deletes its file.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from typing import Final, Self

from mquant import __version__
from mquant.checkpoint import Source
from mquant.data_files import cache
from mquant.errors import OutputError
from mquant.family import Family
from mquant.measure.difference import Difference
from mquant.untrusted import parse_json

_LINES_AT_ONCE: Final = 64


class ComparisonCache:
    """The compared tensors by name. As a context: leaving without an error deletes the file."""

    def __init__(self, source: Source, parent: Source, family: Family | None = None) -> None:
        """Read the results of an earlier run. Raises OutputError if the cache cannot be written."""
        self.path = cache() / "compare" / f"{_key(family, source, parent)}.jsonl"
        self.known: dict[str, Difference] = {}
        self._waiting: list[str] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            complete = self._read()
            self._file = self.path.open("a", encoding="utf-8")
            self._file.truncate(complete)
        except OSError as error:
            raise _cannot(error) from error

    def add(self, difference: Difference) -> None:
        """Count one more tensor."""
        self.known[difference.name] = difference
        self._waiting.append(json.dumps(asdict(difference)))
        if len(self._waiting) >= _LINES_AT_ONCE:
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._file.close()
            self.path.unlink(missing_ok=True)
        else:
            with suppress(OutputError):  # the error that stopped the comparison says more
                self._write()
            self._file.close()

    def _read(self) -> int:
        """Read the results in the file; return the length in bytes of its complete lines."""
        complete = 0
        with suppress(FileNotFoundError):
            for line in self.path.read_bytes().splitlines(keepends=True):
                try:
                    values = parse_json(line)
                    worst = values.pop("worst")
                    difference = Difference(**values, worst=tuple(worst) if worst else None)
                except (ValueError, TypeError, KeyError, AttributeError):
                    break
                if not line.endswith(b"\n"):
                    break
                self.known[difference.name] = difference
                complete += len(line)
        return complete

    def _write(self) -> None:
        try:
            self._file.write("".join(f"{line}\n" for line in self._waiting))
            self._file.flush()
        except OSError as error:
            raise _cannot(error) from error
        self._waiting.clear()


def _key(family: Family | None, *sources: Source) -> str:
    stamps = [dict(source.stamps) for source in sources if source.folders]
    parts: list[object] = [__version__, [source.identity() for source in sources], stamps]
    if family is not None and family.own:  # the user's family file decides about roles
        parts.append(family.model_dump_json())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _cannot(error: OSError) -> OutputError:
    return OutputError(
        f"The comparison cannot be kept in the cache folder: {error.strerror}.",
        "Free space in the folder, or set XDG_CACHE_HOME to another folder.",
    )
