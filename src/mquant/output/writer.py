"""The writer of one output shard, whose size and tensor offsets are known from the plan.

The shard is written as `NAME.partial`: first the header, then every tensor at its planned offset,
then fsync and rename. A crash leaves the partial file, and the ledger says how much of the partial
file counts. The sha256 is computed from the file while the shard is written, from front to back; so
the ledger can say the sha256 of the bytes that were hashed so far (see `Front`), at no cost.
"""

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Final, Self

from mquant.errors import EngineError
from mquant.output.disk import PARTIAL, fsync_folder, open_own, out_of_space, preallocate, pwrite
from mquant.output.ledger import Front
from mquant.plan import ShardPlan

_HASH_BYTES: Final = 1024 * 1024


class Hashed:
    """The sha256 of the first `nbytes` bytes of a file; the bytes that follow can be added."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._sha256 = hashlib.sha256()

    @property
    def front(self) -> Front:
        """The hashed bytes, for the ledger."""
        return Front(self.nbytes, self._sha256.hexdigest())

    def copy(self) -> Self:
        """Return a hash of the same bytes, to which other bytes can be added."""
        other = type(self)()
        other.nbytes, other._sha256 = self.nbytes, self._sha256.copy()
        return other

    def add(self, file: int, end: int) -> bool:
        """Add the bytes up to `end` of an open file; return False if the file is shorter."""
        buffer = memoryview(bytearray(_HASH_BYTES))
        while self.nbytes < end:
            part = buffer[: min(len(buffer), end - self.nbytes)]
            count = os.preadv(file, [part], self.nbytes)
            if not count:
                return False
            self._sha256.update(part[:count])
            self.nbytes += count
        return True


def tensor_ends(shard: ShardPlan) -> list[tuple[int, int]]:
    """Return each tensor's end in the file, and its work unit's number in the shard, sorted."""
    _, places = shard.layout
    return sorted(
        (places[output.name] + output.nbytes, number)
        for number, unit in enumerate(shard.units)
        for output in unit.outputs
    )


def hash_resumed(
    path: Path, shard: ShardPlan, done: Collection[int], front: Front
) -> Hashed | None:
    """Return the hash of a partial file's bytes before the first work unit that is not `done`.

    Returns None if the file does not begin with the bytes of `front`. Only these bytes are hashed.
    """
    complete = 0
    for end, number in tensor_ends(shard):
        if number not in done or end > front.nbytes:
            break
        complete = end
    hashed = Hashed()
    with path.open("rb") as file:
        hashed.add(file.fileno(), complete)
        recorded = hashed.copy()
        recorded.add(file.fileno(), min(front.nbytes, shard.file_bytes))
    return hashed if recorded.front == front else None


def unit_sha256(tensors: Iterable[bytes]) -> str:
    """Return the sha256 of a work unit: that of its tensors' sha256s, in the unit's order."""
    return hashlib.sha256(b"".join(tensors)).hexdigest()


def has_units(path: Path, shard: ShardPlan, digests: Mapping[int, str]) -> bool:
    """Return whether a partial file holds work units with these sha256, by number in the shard."""
    _, places = shard.layout
    buffer = memoryview(bytearray(_HASH_BYTES))
    with path.open("rb") as file:
        for number, digest in digests.items():
            tensors = []
            for output in shard.units[number].outputs:
                tensor, place = hashlib.sha256(), places[output.name]
                end = place + output.nbytes
                while place < end:
                    part = buffer[: min(len(buffer), end - place)]
                    if not (count := os.preadv(file.fileno(), [part], place)):
                        return False
                    tensor.update(part[:count])
                    place += count
                tensors.append(tensor.digest())
            if unit_sha256(tensors) != digest:
                return False
    return True


class ShardWriter:
    """An output shard that is being written. Any thread may call `write`."""

    def __init__(
        self,
        out: Path,
        shard: ShardPlan,
        done: Collection[int] = (),
        hashed: Hashed | None = None,
    ) -> None:
        """Create the partial file, or resume the partial file if work units are `done`.

        `hashed` has the bytes of the partial file that were hashed before.
        """
        self.shard = shard
        self._final = out / shard.name
        self._partial = out / (shard.name + PARTIAL)
        header, _ = shard.layout
        self._done = set(done)
        self._order = tensor_ends(shard)
        self._next = 0  # the first in `_order` that is not done
        self._hashed = hashed or Hashed()
        self.front = self._hashed.front
        """The bytes that were hashed last. Any thread may read it while another thread hashes."""
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
        return self.front.sha256

    def abandon(self) -> None:
        """Close the file; the partial file stays."""
        with self._closing:
            self._close_file()

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _hash_front(self) -> None:
        with out_of_space(self._partial, self.shard.file_bytes):
            if not self._hashed.add(self._file, self._front()):
                raise EngineError(f"{self._partial.name} was truncated during the run.")
        self.front = self._hashed.front

    def _front(self) -> int:
        """Return the offset of the first byte that may not be written yet."""
        order = self._order
        while self._next < len(order) and order[self._next][1] in self._done:
            self._next += 1
        return order[self._next - 1][0] if self._next else len(self.shard.layout[0])
