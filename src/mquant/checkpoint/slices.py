"""Read tensors whose bytes are not one after another: experts that lie in one tensor on disk.

An expert's part of the tensor on disk is read piece by piece, and its rows, or its columns, are put
in the order of the expert's own tensor. So memory holds one tensor of an expert, and a piece.
"""

from collections.abc import Iterator
from threading import local
from typing import Any, Final, Protocol

import numpy as np

from mquant.checkpoint.headers import Held, TensorInfo
from mquant.checkpoint.reader import RangeReader
from mquant.checkpoint.source import Source
from mquant.dtypes import BITS

_PIECE: Final = 1 << 19  # a cache holds the rows whose columns become rows
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_NONE: Final = np.empty(0, np.uint8)


class ReadInto(Protocol):
    """A source of bytes."""

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on."""


class _Last(local):
    """The last scattered tensor that a thread read in parts: its reader, the tensor, its bytes."""

    key: tuple[object, TensorInfo] | None = None
    data: _Bytes = _NONE


_last: Final = _Last()


def read_whole(reader: ReadInto, info: TensorInfo, buffer: memoryview) -> None:
    """Fill `buffer` with all bytes of a tensor. Raises SourceError as the reader does."""
    if not info.held or not info.held.scattered:
        reader.read_into(info.shard, info.start, buffer)
        return
    held, word = info.held, np.dtype(f"u{BITS[info.dtype] // 8}")
    part = np.frombuffer(buffer, word).reshape(-1, held.rows if held.transposed else held.columns)
    # Whole rows of each piece: pieces then end where the turn of interleaved rows ends.
    at_once = max(1, _PIECE // (held.columns * word.itemsize * held.step)) * held.step
    piece = np.empty((min(at_once, held.rows), held.columns), word)
    for first in range(0, held.rows, at_once):
        rows = piece[: min(at_once, held.rows - first)]
        start = info.start + first * held.columns * word.itemsize
        reader.read_into(info.shard, start, rows.reshape(-1).view(np.uint8).data)
        if held.transposed:
            last = held.first + len(part) * held.step
            part[:, first : first + len(rows)] = rows[:, held.first : last : held.step].T
        else:
            place = first // held.step
            part[place : place + len(rows) // held.step] = rows[held.first :: held.step]


def read_part(
    reader: ReadInto, info: TensorInfo, start: int, buffer: memoryview, *, owner: object = None
) -> None:
    """Fill `buffer` with a tensor's bytes from `start` on. Raises SourceError as the reader does.

    A transposed tensor is read whole, and kept until the thread reads another one in parts. `owner`
    is what the bytes belong to, if not the reader.
    """
    held = info.held
    if held is None or not held.scattered:
        reader.read_into(info.shard, info.start + start, buffer)
        return
    if not held.transposed:
        _read_rows(reader, info, held, start, buffer)
        return
    key = (owner or reader, info)
    if _last.key is None or _last.key[0] is not key[0] or _last.key[1] != info:
        _last.key, _last.data = None, np.empty(info.nbytes, np.uint8)
        read_whole(reader, info, _last.data.data)
        _last.key = key
    buffer[:] = _last.data[start : start + len(buffer)].data


def _read_rows(
    reader: ReadInto, info: TensorInfo, held: Held, start: int, buffer: memoryview
) -> None:
    """Fill `buffer` with the bytes from `start` on of a tensor whose rows lie between others."""
    width = held.columns * BITS[info.dtype] // 8
    at_once = max(1, _PIECE // (width * held.step)) * width
    target = np.frombuffer(buffer, np.uint8)
    end = start + len(buffer)
    while start < end:
        row, skipped = divmod(start, width)
        stop = min(end, row * width + at_once)
        rows = np.empty((-(-stop // width) - row, held.step, width), np.uint8)
        first = info.start + row * held.step * width
        reader.read_into(info.shard, first, rows.reshape(-1).data)
        own = rows[:, held.first].reshape(-1)[skipped : skipped + stop - start]
        target[: len(own)] = own
        target, start = target[len(own) :], stop


def forget() -> None:
    """Free the tensor that this thread read in parts."""
    _last.key, _last.data = None, _NONE


def read_pieces(reader: ReadInto, info: TensorInfo, buffer: _Bytes, size: int) -> Iterator[_Bytes]:
    """Read a tensor into `buffer`; yield each piece of the buffer as soon as it is read."""
    if info.scattered:
        read_whole(reader, info, buffer.data)
    for start in range(0, len(buffer), size):
        piece = buffer[start : start + size]
        if not info.scattered:
            reader.read_into(info.shard, info.start + start, piece.data)
        yield piece


def read_bytes(source: Source, info: TensorInfo, start: int = 0, end: int | None = None) -> bytes:
    """Return bytes [start, end) of a tensor's data."""
    end = info.nbytes if end is None else end
    if not info.scattered:
        return source.read(info.shard, info.start + start, info.start + end)
    data = bytearray(end - start)
    read_part(RangeReader(source), info, start, memoryview(data), owner=source)
    return bytes(data)
