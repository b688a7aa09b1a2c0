"""The output shards of a plan: which bytes are still to write, and which are durably on disk."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Final

from mquant.checkpoint import Stamp
from mquant.errors import EngineError
from mquant.events import Emit, Note, Progress, silent
from mquant.output.disk import PARTIAL, out_of_space, unlink_foreign
from mquant.output.ledger import Front, Ledger, Recorded
from mquant.output.writer import (
    Hashed,
    ShardWriter,
    has_units,
    hash_resumed,
    tensor_ends,
    unit_sha256,
)
from mquant.plan import Plan, ShardPlan, WorkUnit


class ShardObserver:
    """A listener to the shards of a run while they are written. Any thread calls the methods.

    An error that a method raises stops the run.
    """

    def opening(self, shard: ShardPlan) -> None:
        """Hear that a shard is about to take its room on the disk. May wait for room."""

    def settled(self, units: Iterable[int]) -> None:
        """Hear that the work units with these numbers are on disk; no run makes them again."""

    def completed(self, shard: ShardPlan, sha256: str) -> None:
        """Hear that a shard is on disk under its final name, now or since an earlier run."""

    def poll(self) -> None:
        """Raise the observer's error, if any. The engine calls `poll` a few times a second."""

    def stop(self) -> None:
        """Wake all threads that wait for the observer: the run ends early."""


_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(slots=True)
class _Task:
    """A work unit: its shard, its number in the shard, and how many bytes are still to write."""

    shard: int
    number: int
    unit: WorkUnit
    left: int


@dataclass(slots=True)
class _Tensor:
    """An awaited tensor: its task, its place in the file, and how many bytes are written."""

    task: int
    place: int
    nbytes: int
    written: int = 0
    digest: Any = None
    """The sha256 so far, of a tensor that may be written out of order."""


class ShardSet:
    """All output shards of a plan.

    Engines write tensors in any order, each tensor from its first byte to its last. A shard is
    complete when its last tensor is. The ledger counts the work units that are on disk, and every
    observer hears of them.

    A later run trusts what the ledger has a sha256 of: the front of each partial shard. That is
    almost all, if units come in the order of the output. If they come in another order (`in_order`
    False), the ledger has the sha256 of each unit, too.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        ledger: Ledger,
        recorded: Recorded | None = None,
        sources: Mapping[str, Stamp] | None = None,
        emit: Emit = silent,
        stage: str = "quantize",
        away: Mapping[str, str] | None = None,
    ) -> None:
        """Resume what an earlier run `recorded`, if the `sources` are unchanged since.

        `away` maps the names of shards that are complete elsewhere to their sha256: the run does
        not write these shards.
        """
        self._observers: list[ShardObserver] = []
        self._away = dict(away or {})
        self._out, self._plan, self._ledger, self._emit = out, plan, ledger, emit
        self._stage = stage
        self._tasks = [
            _Task(shard, number, unit, unit.output_bytes)
            for shard, shard_plan in enumerate(plan.shards)
            for number, unit in enumerate(shard_plan.units)
        ]
        self._tensors: dict[str, _Tensor] = {}
        self.in_order = True
        """Whether the engine writes units in the order of the output, or nearly so."""
        self._unit_digests: dict[int, str] = {}  # of work units that are not counted yet
        for index, task in enumerate(self._tasks):
            _, places = plan.shards[task.shard].layout
            for output in task.unit.outputs:
                self._tensors[output.name] = _Tensor(index, places[output.name], output.nbytes)
        self._lock, self._opening = Lock(), Lock()
        self._open: dict[int, ShardWriter] = {}
        self._hashed: dict[int, Hashed] = {}  # of partial shards that an earlier run began
        self._fronts: dict[str, Front] = {}  # as the ledger has them
        self._written: set[int] = set()  # tasks whose bytes may not be on disk yet
        self.digests: dict[str, str] = {}
        self._done: set[int] = set()
        if recorded is not None:
            self._resume(recorded, sources or {})
        for shard, units in zip(plan.shards, plan.numbers, strict=True):
            if shard.name in self._away:
                self.digests[shard.name] = self._away[shard.name]
                self._done.update(units)
        self._left = [len(shard.units) for shard in plan.shards]
        for index in self._done:
            self._left[self._tasks[index].shard] -= 1
        self._bytes = sum(self._tasks[index].unit.source_bytes for index in self._done)

    def observe(self, observer: ShardObserver) -> None:
        """Add an observer; tell the observer of shards that an earlier run completed in OUT."""
        self._observers.append(observer)
        for shard in self._plan.shards:
            if shard.name in self.digests and shard.name not in self._away:
                observer.completed(shard, self.digests[shard.name])

    @property
    def done_bytes(self) -> int:
        """Bytes of the source that need not be read any more."""
        return self._bytes

    @property
    def pending(self) -> list[WorkUnit]:
        """The work units that are not done, in the order of the output."""
        return [*self.numbered.values()]

    @property
    def numbered(self) -> dict[int, WorkUnit]:
        """The pending work units, by the number that observers get."""
        return {i: task.unit for i, task in enumerate(self._tasks) if i not in self._done}

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write the next bytes of a tensor, which `name` names in the output.

        Raises EngineError if the tensor is not in the plan, is complete, or is larger than planned.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise EngineError(f"The engine made {name}, which is not in the plan.")
        task = self._tasks[tensor.task]
        nbytes = memoryview(data).nbytes
        if tensor.task in self._done or tensor.written + nbytes > tensor.nbytes:
            raise EngineError(f"The engine made {name} twice, or over {tensor.nbytes:,} bytes.")
        writer = self._writer(task.shard)
        writer.write(data, tensor.place + tensor.written)
        if not self.in_order:
            tensor.digest = tensor.digest or hashlib.sha256()
            tensor.digest.update(data)
        tensor.written += nbytes
        task.left -= nbytes
        if not task.left:
            self._complete(tensor.task)

    def commit(self) -> None:
        """Sync the written bytes to disk, and count the complete work units."""
        for observer in self._observers:
            observer.poll()
        with self._lock:
            units, writers = set(self._written), list(self._open.values())
            digests = {i: self._unit_digests[i] for i in units if i in self._unit_digests}
        fronts: dict[str, Front] = {}
        for writer in writers:
            writer.hash()
            if self._fronts.get(writer.shard.name) != writer.front:
                fronts[writer.shard.name] = writer.front
        if units or fronts:
            for writer in writers:
                writer.sync()
            self._ledger.count(units, fronts, digests)
            self._fronts |= fronts
            for observer in self._observers:
                observer.settled(units)
            with self._lock:
                self._written -= units
                for index in digests:
                    self._unit_digests.pop(index, None)

    def finish(self) -> None:
        """Rename shards that lack only the final name. Raises EngineError for a missing tensor."""
        for index, task in enumerate(self._tasks):
            if index not in self._done:
                names = (o.name for o in task.unit.outputs)
                name = next(n for n in names if self._tensors[n].written < self._tensors[n].nbytes)
                raise EngineError(f"The engine did not make {name} as planned.")
        for shard, left in enumerate(self._left):
            if not left and self._plan.shards[shard].name not in self.digests:
                self._close(shard)  # an earlier run wrote this shard but did not rename the file

    def stop(self) -> None:
        """Stop every observer, so that no thread waits for an observer any longer."""
        for observer in self._observers:
            observer.stop()

    def abandon(self) -> None:
        """Close the open shards. Their partial files stay for the next run."""
        for writer in self._open.values():
            writer.abandon()
        self._open.clear()

    def _writer(self, shard: int) -> ShardWriter:
        writer = self._open.get(shard)
        if writer is not None:
            return writer
        with self._opening:
            if shard not in self._open:
                for observer in self._observers:
                    observer.opening(self._plan.shards[shard])
                units = self._plan.numbers[shard]
                with self._lock:
                    done = {i - units.start for i in units if i in self._done}
                    hashed = self._hashed.pop(shard, None)
                    self._open[shard] = ShardWriter(
                        self._out, self._plan.shards[shard], done, hashed
                    )
            return self._open[shard]

    def _complete(self, index: int) -> None:
        task = self._tasks[index]
        writer = self._open[task.shard]
        writer.done(task.number)
        digest = None if self.in_order else self._digest(task.unit)
        with self._lock:
            if digest:
                self._unit_digests[index] = digest
            self._done.add(index)
            self._written.add(index)
            self._bytes += task.unit.source_bytes
            self._left[task.shard] -= 1
            last = not self._left[task.shard]
            self._emit(Progress(self._stage, self._bytes, self._plan.source_bytes))
        if last:
            self._close(task.shard)
        else:
            writer.hash()

    def _digest(self, unit: WorkUnit) -> str:
        """Return a unit's sha256, and forget those of its tensors."""
        tensors = [self._tensors[output.name] for output in unit.outputs]
        digests = [(each.digest or hashlib.sha256()).digest() for each in tensors]
        for each in tensors:
            each.digest = None
        return unit_sha256(digests)

    def _close(self, shard: int) -> None:
        name = self._plan.shards[shard].name
        digest = self._writer(shard).close()
        units = self._plan.numbers[shard]
        self._ledger.complete_shard(name, digest, units)
        with self._lock:
            self.digests[name] = digest
            self._written.difference_update(units)
            del self._open[shard]
        for observer in self._observers:
            observer.settled(units)
            observer.completed(self._plan.shards[shard], digest)

    def _resume(self, recorded: Recorded, sources: Mapping[str, Stamp]) -> None:
        """Count recorded work units whose sources are unchanged and whose shard is in OUT."""
        valid = units_still_valid(self._plan, recorded, sources)
        for index, (shard, numbers) in enumerate(
            zip(self._plan.shards, self._plan.numbers, strict=True)
        ):
            if shard.name in self._away:
                continue
            final, partial = self._out / shard.name, self._out / (shard.name + PARTIAL)
            units = set(numbers) & valid
            with out_of_space(partial, shard.file_bytes):
                if final.is_symlink():
                    final.unlink()  # mquant writes no links
                whole = shard.name in recorded.shards and len(units) == len(shard.units)
                if shard.name in recorded.shards and not recorded.has(shard.name, final):
                    final.unlink(missing_ok=True)  # the file changed since a run completed it
                elif whole:
                    self.digests[shard.name] = recorded.shards[shard.name]
                elif final.is_file():
                    final.rename(partial)
                unlink_foreign(partial)
                if shard.name not in self.digests:
                    units = self._unchanged_units(index, partial, units, recorded)
            self._done |= units
        # Before the first byte behind a front changes.
        self._ledger.count((), self._fronts)

    def _unchanged_units(
        self, index: int, partial: Path, units: set[int], recorded: Recorded
    ) -> set[int]:
        """Return the work units of `units` whose bytes are in the partial file, as recorded."""
        shard, first = self._plan.shards[index], self._plan.numbers[index].start
        front = recorded.fronts.get(shard.name)
        if front is None and shard.name in recorded.shards:
            front = Front(shard.file_bytes, recorded.shards[shard.name])
        if front is None:  # of an earlier release, or without a work unit
            return units if _is_of(partial, shard.file_bytes) else set()
        behind = {number + first for end, number in tensor_ends(shard) if end > front.nbytes}
        alone = units & behind & recorded.digests.keys()
        units, hashed = units - behind, None
        if (units or alone) and _is_of(partial, shard.file_bytes):
            done = {number - first for number in units}
            hashed = hash_resumed(partial, shard, done, front)
            digests = {number - first: recorded.digests[number] for number in alone}
            same = has_units(partial, shard, digests)
            if hashed is None or not same:
                sentence = "is not as an earlier run left it; its tensors are made again."
                self._emit(Note("warning", f"{partial.name} {sentence}"))
                hashed = None
        self._hashed[index] = hashed or Hashed()
        self._fronts[shard.name] = self._hashed[index].front
        return units | alone if hashed else set()


def units_still_valid(plan: Plan, recorded: Recorded, sources: Mapping[str, Stamp]) -> set[int]:
    """Return the numbers of the recorded work units whose source files are unchanged."""
    return {
        number
        for number, unit in enumerate(plan.units)
        if number in recorded.units and _unchanged(unit, recorded.units[number], sources)
    }


def complete_shards(
    out: Path, plan: Plan, recorded: Recorded, sources: Mapping[str, Stamp]
) -> dict[str, str]:
    """Return the sha256 of the shards that are complete in OUT, by name; write nothing."""
    valid = units_still_valid(plan, recorded, sources)
    digests: dict[str, str] = {}
    for shard, units in zip(plan.shards, plan.numbers, strict=True):
        digest, path = recorded.shards.get(shard.name, ""), out / shard.name
        known = valid.issuperset(units) and _SHA256.fullmatch(digest)
        if known and _is_of(path, shard.file_bytes) and recorded.has(shard.name, path):
            digests[shard.name] = digest
    return digests


def _unchanged(unit: WorkUnit, recorded: Mapping[str, Stamp], sources: Mapping[str, Stamp]) -> bool:
    return all(file in sources and recorded.get(file) == sources[file] for file in unit.files)


def _is_of(path: Path, nbytes: int) -> bool:
    """Return whether `path` is a file of exactly `nbytes` bytes."""
    return path.is_file() and path.stat().st_size == nbytes
