"""Read the rows of calibration files: JSON lines, also in gzip, and Parquet.

A file of a billion bytes takes little memory: the places of its rows are noted, and only the rows
that are drawn are kept.
"""

import gzip
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Final, Protocol

from mquant.errors import DataFileError, MissingExtra
from mquant.untrusted import open_named, parse_json

FIX: Final = (
    "Give a .jsonl or .parquet file whose rows have `text` or `messages`, a .txt file, or the id "
    "of a dataset on the hub."
)
_MOST_TEXT: Final = 50_000_000
"""The most bytes of a .txt file: all of it is tokenized, in 30 times its size of memory."""
_MOST_ROWS: Final = 1_000_000_000
_PIECE: Final = 1_000_000
_COLUMNS: Final = ("text", "messages", "tools")


class Rows(Protocol):
    """The rows of a file."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def read(self, numbers: Sequence[int]) -> list[Any]:
        """Return the rows with these numbers, in this order."""


def read_text(path: Path, shown: str) -> str:
    """Return a text; `shown` is the file's name in messages.

    Raises DataFileError for a file that cannot be read, or is not UTF-8.
    """
    with open_named(path, FIX, _MOST_TEXT) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataFileError(f"{shown} is damaged: {error}.", FIX) from error


@contextmanager
def open_rows(paths: Sequence[Path], shown: str) -> Iterator[Rows]:
    """Open files of rows as one; `shown` is the name of the data in messages.

    Raises DataFileError for a file that cannot be read or is damaged, MissingExtra for Parquet
    without pyarrow.
    """
    with ExitStack() as stack:
        yield _Joined([_open(path, shown, stack) for path in paths])


def _open(path: Path, shown: str, stack: ExitStack) -> Rows:
    file: IO[bytes] = stack.enter_context(open_named(path, FIX, _MOST_ROWS))
    if path.suffix == ".parquet":
        return _Table(file, shown)
    if path.suffix == ".gz":
        file = stack.enter_context(_unpacked(file, shown))
    return _Lines(file, shown)


class _Joined:
    """The rows of several files, one file after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, numbers: Sequence[int]) -> list[Any]:
        """Return the rows with these numbers, in this order."""
        rows: dict[int, Any] = {}
        for part, start in zip(self._parts, self._starts, strict=False):
            inside = [n for n in numbers if start <= n < start + len(part)]
            rows |= zip(inside, part.read([n - start for n in inside]), strict=True)
        return [rows[number] for number in numbers]


class _Lines:
    """The rows of a file of JSON lines. Every line is parsed once, so that damage is noticed."""

    def __init__(self, file: IO[bytes], shown: str) -> None:
        self._file, self._places = file, array("q")
        place = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    parse_json(line)
                except ValueError:
                    raise DataFileError(f"Line {number:,} of {shown} is no JSON.", FIX) from None
                self._places.append(place)
            place += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, numbers: Sequence[int]) -> list[Any]:
        """Return the rows with these numbers, in this order."""
        rows = []
        for number in numbers:
            self._file.seek(self._places[number])
            rows.append(parse_json(self._file.readline()))
        return rows


class _Table:
    """The rows of a Parquet file: their text, messages and tools."""

    def __init__(self, file: IO[bytes], shown: str) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError:
            raise MissingExtra("Reading .parquet files", "parquet") from None
        self._shown, self._errors = shown, (pa.ArrowException, OSError, ValueError)
        try:
            self._file = pq.ParquetFile(file)
            groups = range(self._file.num_row_groups)
            sizes = [self._file.metadata.row_group(group).num_rows for group in groups]
            self._columns = [name for name in _COLUMNS if name in self._file.schema_arrow.names]
        except self._errors as error:
            raise self._damaged(error) from error
        self._starts = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        count: int = self._starts[-1]
        return count

    def read(self, numbers: Sequence[int]) -> list[Any]:
        """Return the rows with these numbers, in this order. A row group is read once."""
        groups: dict[int, list[int]] = {}
        for number in numbers:
            groups.setdefault(bisect_right(self._starts, number) - 1, []).append(number)
        rows: dict[int, Any] = {}
        for group, wanted in sorted(groups.items()):
            places = [number - self._starts[group] for number in wanted]
            try:
                table = self._file.read_row_group(group, columns=self._columns)
                values = table.take(places).to_pylist() if self._columns else [{}] * len(places)
            except self._errors as error:
                raise self._damaged(error) from error
            rows |= zip(wanted, map(_without_nulls, values), strict=True)
        return [rows[number] for number in numbers]

    def _damaged(self, error: Exception) -> DataFileError:
        reason = str(error).partition("\n")[0][:200].rstrip(".")
        return DataFileError(f"{self._shown} is damaged: {reason}.", FIX)


def _without_nulls(value: Any) -> Any:
    """Return a row without the keys that only other rows have: Parquet fills them with null.

    A `content` of null stays: a message that calls tools has it.
    """
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if v is not None or k == "content"}
        return {key: _without_nulls(item) for key, item in kept.items()}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _unpacked(file: IO[bytes], shown: str) -> Iterator[IO[bytes]]:
    """Yield a temporary file with the content of a file in gzip."""
    with tempfile.TemporaryFile() as unpacked, gzip.GzipFile(fileobj=file) as packed:
        try:
            while piece := packed.read(_PIECE):
                unpacked.write(piece)
                if unpacked.tell() > _MOST_ROWS:
                    raise DataFileError(
                        f"{shown} is too large: mquant reads {_MOST_ROWS:,} bytes of rows.", FIX
                    )
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataFileError(f"{shown} is damaged: {error}.", FIX) from error
        unpacked.seek(0)
        yield unpacked
