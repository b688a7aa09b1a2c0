"""A file that the user names for a report, a card or the like."""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mquant.errors import OutputError
from mquant.output.disk import write_whole

_HEAD_BYTES: Final = 1_000_000
"""A document has its mark within these bytes: a card's mark follows the metadata."""
_OPEN_FILE: Final = re.compile(r"/dev/std(in|out|err)|(/dev|/proc/[^/]+)/fd/\d+")


@dataclass(frozen=True)
class Document:
    """The path, the option that named the path, and the text that marks a file as mquant's.

    An existing file is replaced only if the file is empty or has the mark; an empty mark marks no
    file. A device, a pipe and `/dev/stdout` are written to, and never replaced.
    """

    path: Path
    option: str
    mark: bytes

    def check(self) -> None:
        """Raise OutputError if the path is a folder, or a file that mquant did not write."""
        with self._sentence():
            if self.is_stream or not self.path.exists():
                return
            with self.path.open("rb") as file:
                head = file.read(_HEAD_BYTES)
        if head and not (self.mark and self.mark in head):
            raise self._error("exists, and mquant did not write it")

    def remove(self) -> None:
        """Remove the file of an earlier run. Raises OutputError, also as `check` does."""
        self.check()
        with self._sentence():
            if not self.is_stream:
                self.path.unlink(missing_ok=True)

    def write(self, pieces: Iterable[bytes]) -> None:
        """Write the file, whole or not at all. Raises OutputError, also as `check` does."""
        self.check()
        with self._sentence():
            if self.is_stream:
                # Not `write_whole`: somebody has the file open. A shell may send stdout to a file.
                # O_NONBLOCK: opening a pipe that nobody reads fails, and does not wait for ever.
                flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                handle = os.open(self.path, flags)
                with os.fdopen(handle, "wb") as stream:
                    os.set_blocking(handle, True)
                    stream.writelines(pieces)
            else:
                write_whole(self.path, pieces)

    @property
    def is_stream(self) -> bool:
        """Whether the path is a device, a pipe, or a name of an open file."""
        opened = _OPEN_FILE.fullmatch(str(self.path.absolute())) is not None
        return opened or (self.path.exists() and not (self.path.is_file() or self.path.is_dir()))

    @contextmanager
    def _sentence(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            unread = error.errno == errno.ENXIO and self.path.is_fifo()
            reason = "nobody reads the pipe" if unread else error.strerror
            raise self._error(f"cannot be written: {reason}") from error

    def _error(self, what: str) -> OutputError:
        return OutputError(f"{self.path} {what}.", f"Give another file with {self.option}.")
