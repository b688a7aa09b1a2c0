"""The writer of one output shard, whose size and tensor offsets are known from the plan.

The shard is written as `NAME.partial`: first the header, then every tensor at its planned offset,
then fsync and rename. A crash leaves the partial file, and the ledger says how much of the partial
file counts. The sha256 is computed from the file while the shard is written.
"""

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from threading import Lock
from typing import Final

from mquant.errors import EngineError
from mquant.output.disk import PARTIAL, fsync_folder, open_own, out_of_space, preallocate, pwrite
from mquant.plan import ShardPlan

_HASH_BYTES: Final = 1024 * 1024


class ShardWriter:
    """An output shard that is being written. Any thread may call `write`."""

    def __init__(self, out: Path, shard: ShardPlan, done: Collection[int] = ()) -> None:
        """Create the partial file, or resume the partial file if work units are `done`."""
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
            self._file = open_own(self._partial, 0 if done else os.O_TRUNC)
            try:
                preallocate(self._file, shard.file_bytes)
                pwrite(self._file, header, 0)
            except BaseException:
                os.close(self._file)
                raise

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write `data` at byte `offset` of the file."""
        with out_of_space(self._partial, self.shard.file_bytes):
            pwrite(self._file, data, offset)

    def done(self, unit: int) -> None:
        """Mark a work unit, by its number in the shard, as written."""
        self._done.add(unit)

    def hash(self) -> None:
        """Hash the complete bytes at the front of the file, unless another thread is hashing."""
        if self._hashing.acquire(blocking=False):
            try:
                self._hash_front()
            finally:
                self._hashing.release()

    def sync(self) -> None:
        """Sync the bytes that are written so far to disk."""
        with self._closing, out_of_space(self._partial, self.shard.file_bytes):
            if self._file >= 0:
                os.fdatasync(self._file)

    def close(self) -> str:
        """Sync the complete shard, rename it to its final name, and return its sha256."""
        with self._hashing:
            self._hash_front()
        with self._closing, out_of_space(self._partial, self.shard.file_bytes):
            os.fsync(self._file)
            self._close_file()
            self._partial.rename(self._final)
            fsync_folder(self._final.parent)
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close the file; the partial file stays."""
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
                    count = os.preadv(self._file, [part], self._hashed)
                    if not count:
                        raise EngineError(f"{self._partial.name} was truncated during the run.")
                    self._hash.update(part[:count])
                    self._hashed += count

    def _front(self) -> int:
        """Return the offset of the first byte that may not be written yet."""
        order = self._order
        while self._next < len(order) and order[self._next][1] in self._done:
            self._next += 1
        return order[self._next - 1][0] if self._next else len(self.shard.layout[0])
