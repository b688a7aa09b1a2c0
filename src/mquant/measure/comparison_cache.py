"""The results of a comparison so far, kept in the user's cache, so that a rerun resumes.

There is one file for each pair of checkpoints, `~/.cache/mquant/compare/<key>.jsonl` (or under
XDG_CACHE_HOME), with a line for each tensor. The key is made of both identities, the stamps of all
files, mquant's version and the user's family file: if the key changes, all tensors are
compared again. An incomplete last line is ignored. A complete comparison deletes its file. If the
file cannot be written, the comparison goes on without the file.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from typing import Final, Self, TextIO

from mquant import __version__
from mquant.checkpoint import Source
from mquant.data_files import cache
from mquant.events import Emit, Note, silent
from mquant.family import Family
from mquant.measure.difference import Difference
from mquant.output.disk import open_own, read_own
from mquant.untrusted import MAX_TENSORS, parse_json

_LINES_AT_ONCE: Final = 64
_MOST_BYTES: Final = 1000 * MAX_TENSORS


class ComparisonCache:
    """The compared tensors by name. As a context: leaving without an error deletes the file."""

    def __init__(
        self, source: Source, parent: Source, family: Family | None = None, emit: Emit = silent
    ) -> None:
        """Read the results of an earlier run."""
        self.path = cache() / "compare" / f"{_key(family, source, parent)}.jsonl"
        self.known: dict[str, Difference] = {}
        self._waiting: list[str] = []
        self._emit = emit
        self._file: TextIO | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            complete = self._read()
            self._file = os.fdopen(open_own(self.path, os.O_APPEND), "a", encoding="utf-8")
            self._file.truncate(complete)
        except OSError as error:
            self._go_on_without(error)

    def add(self, difference: Difference) -> None:
        """Count one more tensor."""
        self.known[difference.name] = difference
        self._waiting.append(json.dumps(asdict(difference)))
        if len(self._waiting) >= _LINES_AT_ONCE:
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._write()
        if self._file is not None:
            self._file.close()
            if kind is None:
                self.path.unlink(missing_ok=True)

    def _read(self) -> int:
        """Read the results in the file; return the length in bytes of its complete lines."""
        complete = 0
        for line in (read_own(self.path, _MOST_BYTES) or b"").splitlines(keepends=True):
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
            if self._file is not None:
                self._file.write("".join(f"{line}\n" for line in self._waiting))
                self._file.flush()
        except OSError as error:
            self._go_on_without(error)
        self._waiting.clear()

    def _go_on_without(self, error: OSError) -> None:
        if self._file is not None:
            with suppress(OSError):  # what it still holds does not fit either
                self._file.close()
        self._file = None
        text = f"{self.path.parent} cannot keep the results ({error.strerror})"
        self._emit(Note("warning", f"{text}: after an interruption, the comparison starts over."))


def _key(family: Family | None, *sources: Source) -> str:
    stamps = [dict(source.stamps) for source in sources if source.folders]
    parts: list[object] = [__version__, [source.identity() for source in sources], stamps]
    if family is not None and family.own:  # the user's family file decides about roles
        parts.append(family.model_dump_json())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
