"""The time of a run, computed from a plan's real work units and files: the formulas of simulate.py.

There are two models. `makespan` models many machines with shared storage: tasks go through phases;
from one event to the next, each phase has the rate that its own limit and the shared capacities
allow. `pipeline` models one machine whose source comes from a hub: files, work units and shards
follow one another as in the spool, the engine and the shipper. Rates are in bytes a second, times
in seconds. The functions are pure, and the figures are their arguments.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from mquant.plan import Plan

FREE: Final = 0
"""The resource that is never short."""
_EPSILON: Final = 1e-9

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


# ------------------------------------------------------------- many machines, shared resources


@dataclass(frozen=True)
class Phase:
    """A part of a task: `size` units, at most `cap` units a second.

    A unit takes `load` of the resource with the number `shared`. If the phase is `on_network`, a
    unit also takes 1 of the machine's bandwidth.
    """

    size: float
    cap: float
    shared: int = FREE
    load: float = 0.0
    on_network: bool = False


Task = tuple[Phase, ...]


def makespan(
    tasks: Sequence[Task],
    slots: int,
    machines: int,
    network: float,
    shared: Sequence[float] = (),
    first: Task = (),
) -> float:
    """Return the seconds until all tasks are done.

    The slots are assigned to `machines` in turn. A slot takes the next task when its task is done,
    and goes through the phases of `first` before its first task. `shared` are the capacities of the
    resources 1, 2, ...; `network` is the bandwidth of each machine.
    """
    slots = min(slots, len(tasks))
    waiting = deque(tasks)
    queues = [deque((*first, *waiting.popleft())) for _ in range(slots)]
    capacity = np.array([np.inf, *shared, *[network] * machines])
    uses = np.zeros((slots, 2), np.int64)
    loads, left, cap = np.zeros((slots, 2)), np.zeros(slots), np.zeros(slots)
    busy = np.ones(slots, bool)
    time = 0.0

    def next_phase(slot: int) -> None:
        """Start the next phase of a slot that takes time; mark the slot idle if none is left."""
        while True:
            if not queues[slot] and waiting:
                queues[slot].extend(waiting.popleft())
            if not queues[slot]:
                busy[slot] = False
                return
            phase = queues[slot].popleft()
            if phase.size > 0:
                break
        machine = 1 + len(shared) + slot % machines if phase.on_network else FREE
        uses[slot] = phase.shared, machine
        loads[slot] = phase.load, float(phase.on_network)
        left[slot], cap[slot] = phase.size, phase.cap

    for slot in range(slots):
        next_phase(slot)
    while busy.any():
        rate = share_out(np.where(busy, cap, 0.0), uses, loads, capacity)
        needed = np.divide(left, rate, out=np.full(slots, np.inf), where=busy)
        step = float(needed.min())
        time += step
        left -= rate * step
        for ended in np.flatnonzero(busy & (needed <= step * (1 + _EPSILON))):
            next_phase(int(ended))
    return time


def share_out(cap: Floats, uses: Integers, loads: Floats, capacity: Floats) -> Floats:
    """Return the rate of each of n slots: all slots at a short resource get the same part of `cap`.

    A slot uses two resources, `uses` [n, 2], with `loads` [n, 2] for a unit. If a resource is
    short, the rates of its slots are final, and the remaining slots share the remaining capacity.
    """
    rate, left = cap.copy(), capacity.copy()
    open_, demanded = cap > 0, loads * cap[:, None]
    while open_.any():
        demand = _by_resource(uses, demanded * open_[:, None], len(capacity))
        part = np.divide(left, demand, out=np.full(len(left), np.inf), where=demand > 0)
        least = float(part.min())
        if least >= 1:
            break
        short = part <= least * (1 + _EPSILON)
        stuck = open_ & (short[uses] & (demanded > 0)).any(axis=1)
        rate[stuck] = cap[stuck] * least
        taken = demanded * (stuck * least)[:, None]
        left = np.maximum(left - _by_resource(uses, taken, len(capacity)), 0.0)
        open_ &= ~stuck
    return rate


def _by_resource(uses: Integers, amounts: Floats, count: int) -> Floats:
    totals = np.zeros(count)
    np.add.at(totals, uses, amounts)
    return totals


# ------------------------------------------------------------------- the work that a plan holds


@dataclass(frozen=True)
class Share:
    """The bytes read and written for a share of a plan, and the bytes of its largest shard."""

    read: int
    written: int
    largest: int


def work_of(plan: Plan) -> Share:
    """Return the work of a plan or of a share."""
    units = [unit for shard in plan.shards for unit in shard.units]
    return Share(
        read=sum(unit.source_bytes for unit in units),
        written=sum(unit.output_bytes for unit in units),
        largest=max((sum(j.output_bytes for j in s.units) for s in plan.shards), default=0),
    )


def fetched_again(parts: Sequence[Plan], sizes: Mapping[str, int]) -> int:
    """Return the bytes that shares download again: a file that n shares need counts n - 1 times."""
    needed = [
        {path for shard in part.shards for unit in shard.units for path in unit.files}
        for part in parts
    ]
    total = sum(sizes[path] for paths in needed for path in paths)
    return total - sum(sizes[path] for path in set().union(*needed))


# ---------------------------------------------------------------------- one machine and a hub


@dataclass(frozen=True)
class Rates:
    """The rates of one machine: source bytes fetched and quantized, shard bytes sent (0: none).

    `commit` is the seconds of a commit besides the bytes. `digest` is the rate of a shard's sha256,
    which one thread computes.
    """

    fetch: float
    quantize: float
    send: float = 0.0
    commit: float = 0.0
    digest: float = np.inf


@dataclass(frozen=True)
class Passage:
    """The result of a run: its seconds, the seconds in which each part worked, and the commits."""

    seconds: float
    fetching: float
    quantizing: float
    sending: float
    commits: int


@dataclass(frozen=True)
class Piece:
    """A work unit: the bytes read and written, the files needed, and the shard's number."""

    read: int
    written: int
    files: tuple[str, ...]
    shard: int


def pieces_of(plan: Plan) -> list[Piece]:
    """Return the work units of a plan, in the plan's order."""
    return [
        Piece(unit.source_bytes, unit.output_bytes, tuple(sorted(unit.files)), number)
        for number, shard in enumerate(plan.shards)
        for unit in shard.units
    ]


def pipeline(
    pieces: Sequence[Piece],
    sizes: Mapping[str, int],
    rates: Rates,
    room: float = np.inf,
    shard_room: float = np.inf,
) -> Passage:
    """Simulate a run from a hub, and return its times.

    Files arrive in the order of need. A work unit starts when its files are on the disk, and a
    shard is sent when all its work units are done. At most `room` bytes of files and `shard_room`
    bytes of shards are on the disk: a file is deleted after its last work unit, a shard after it
    was sent, and a download or a new shard waits for this room.
    """
    last = {path: number for number, piece in enumerate(pieces) for path in piece.files}
    shards: dict[int, int] = {}
    for piece in pieces:
        shards[piece.shard] = shards.get(piece.shard, 0) + piece.written
    ends = {a.shard for a, b in pairwise(pieces) if a.shard != b.shard} | {pieces[-1].shard}
    assert len(ends) == len(shards), "shards follow one another"
    arrival: dict[str, float] = {}
    deletions: list[tuple[float, int]] = []  # when a file is deleted, and its size
    taken, fetched, clock = 0.0, 0.0, 0.0
    shipper = _Shipper(rates, shard_room)
    for number, piece in enumerate(pieces):
        for path in piece.files:
            if path in arrival:
                continue
            while taken + sizes[path] > room:
                deleted, nbytes = heappop(deletions)
                fetched, taken = max(fetched, deleted), taken - nbytes
            taken += sizes[path]
            fetched += sizes[path] / rates.fetch
            arrival[path] = fetched
        if number == 0 or piece.shard != pieces[number - 1].shard:
            opened = clock = shipper.open(clock, shards[piece.shard])
        clock = max([clock, *(arrival[path] for path in piece.files)]) + piece.read / rates.quantize
        for path in piece.files:
            if last[path] == number:
                heappush(deletions, (clock, sizes[path]))
        if number + 1 == len(pieces) or pieces[number + 1].shard != piece.shard:
            whole = max(clock, opened + shards[piece.shard] / rates.digest)
            shipper.take(whole, shards[piece.shard])
    end = shipper.rest()
    return Passage(
        seconds=max(end, clock),
        fetching=sum(sizes[path] for path in arrival) / rates.fetch,
        quantizing=sum(piece.read for piece in pieces) / rates.quantize,
        sending=shipper.at_work,
        commits=shipper.commits,
    )


class _Shipper:
    """The sender of shards: each commit has all shards that wait when the last commit ends."""

    def __init__(self, rates: Rates, room: float) -> None:
        self._rates, self._room = rates, room
        self._waiting: deque[tuple[float, int]] = deque()
        self._free_at = self._taken = 0.0
        self.at_work, self.commits, self._end = 0.0, 0, 0.0

    def open(self, now: float, nbytes: int) -> float:
        """Reserve room for a shard of `nbytes`, and return when the shard can start."""
        while self._taken and self._taken + nbytes > self._room:
            now = max(now, self._send())
        self._taken += nbytes
        return now

    def take(self, now: float, nbytes: int) -> None:
        """Queue a shard that is whole at `now`."""
        self._end = max(self._end, now)
        if not self._rates.send:
            self._taken -= nbytes
            return
        while self._waiting and max(self._waiting[0][0], self._free_at) < now:
            self._send()
        self._waiting.append((now, nbytes))

    def rest(self) -> float:
        """Send all queued shards, and return when the last shard is sent."""
        while self._waiting:
            self._send()
        return max(self._end, self._free_at)

    def _send(self) -> float:
        """Send the shards that wait when the last commit ends; return when this commit ends."""
        start = max(self._waiting[0][0], self._free_at)
        nbytes = 0
        while self._waiting and self._waiting[0][0] <= start:
            nbytes += self._waiting.popleft()[1]
        seconds = nbytes / self._rates.send + self._rates.commit
        self._free_at, self._taken = start + seconds, self._taken - nbytes
        self.at_work, self.commits = self.at_work + seconds, self.commits + 1
        return self._free_at


__all__ = [
    "FREE",
    "Passage",
    "Phase",
    "Piece",
    "Rates",
    "Share",
    "Task",
    "fetched_again",
    "makespan",
    "pieces_of",
    "pipeline",
    "share_out",
    "work_of",
]
