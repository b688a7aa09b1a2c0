"""One output shard: its size and places known beforehand, whole under its final name or not there.

It is written as `NAME.partial`: header first, every tensor at its planned offset, then fsync and
rename. A crash leaves the partial, which the ledger says how much of to trust, and never a shard
that only looks whole. Its digest is taken while it is written, from what the file holds.
"""

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from threading import Lock
from typing import Final

from mquant.errors import EngineError
from mquant.output.disk import PARTIAL, fsync_folder, out_of_space, preallocate, pwrite
from mquant.plan import ShardPlan

_HASH_BYTES: Final = 1024 * 1024


class ShardWriter:
    """One output shard being written. `write` may be called from any thread."""

    def __init__(self, out: Path, shard: ShardPlan, done: Collection[int] = ()) -> None:
        """Go on with the partial, where jobs (by number in the shard) are done, or begin one."""
        self.shard = shard
        self._final = out / shard.name
        self._partial = out / (shard.name + PARTIAL)
        header, places = shard.layout
        self._done = set(done)
        self._order = sorted(
            (places[output.name] + output.nbytes, number)
            for number, unit in enumerate(shard.units)
            for output in unit.outputs
        )
        self._next = 0  # the first in `_order` that is not done
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._hashing = Lock()
        self._closing = Lock()
        self._file = -1
        with out_of_space(self._partial, shard.file_bytes):
            flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW  # a link leads away
            flags |= 0 if done else os.O_TRUNC
            self._file = os.open(self._partial, flags, 0o644)
            try:
                preallocate(self._file, shard.file_bytes)
                pwrite(self._file, header, 0)
            except BaseException:
                os.close(self._file)
                raise

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes at a place in the file."""
        with out_of_space(self._partial, self.shard.file_bytes):
            pwrite(self._file, data, offset)

    def done(self, unit: int) -> None:
        """A job, by its number in the shard, is written."""
        self._done.add(unit)

    def hash(self) -> None:
        """Hash what is whole from the front on, unless another thread is at it."""
        if self._hashing.acquire(blocking=False):
            try:
                self._hash_front()
            finally:
                self._hashing.release()

    def sync(self) -> None:
        """Put on disk what was written so far."""
        with self._closing, out_of_space(self._partial, self.shard.file_bytes):
            if self._file >= 0:
                os.fdatasync(self._file)

    def close(self) -> str:
        """Put the whole shard on disk under its final name; returns its sha256."""
        with self._hashing:
            self._hash_front()
        with self._closing, out_of_space(self._partial, self.shard.file_bytes):
            os.fsync(self._file)
            self._close_file()
            self._partial.rename(self._final)
            fsync_folder(self._final.parent)
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close the file and leave the partial."""
        with self._closing:
            self._close_file()

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _hash_front(self) -> None:
        buffer = memoryview(bytearray(_HASH_BYTES))
        with out_of_space(self._partial, self.shard.file_bytes):
            while (end := self._front()) > self._hashed:
                while self._hashed < end:
                    part = buffer[: min(len(buffer), end - self._hashed)]
                    got = os.preadv(self._file, [part], self._hashed)
                    if not got:
                        raise EngineError(f"{self._partial.name} was cut short during the run.")
                    self._hash.update(part[:got])
                    self._hashed += got

    def _front(self) -> int:
        """Where the first byte that is not written yet may lie."""
        order = self._order
        while self._next < len(order) and order[self._next][1] in self._done:
            self._next += 1
        return order[self._next - 1][0] if self._next else len(self.shard.layout[0])
