"""What a run takes, computed from a plan's real jobs and files: the laws behind simulate.py.

Two models. `makespan` is of many machines over shared storage: tasks go through phases, each at the
rate that its own limits and the capacities it shares with others leave it, from one event to the
next. `pipeline` is of one machine whose source comes from a hub: files, jobs and shards follow one
another as the spool, the engine and the shipper have them. Rates are in bytes a second, times
in seconds. Nothing here reads or writes, or knows where a number comes from.
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
    """A part of a task: `size` units, at most `cap` of them a second.

    A unit takes 1 of the machine's bandwidth where it is `on_network`, and `load` of the resource
    with the number `shared`.
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
    """Seconds until all tasks are done.

    Each of `slots`, which lie on `machines` in turn, takes the next task when it has done one; the
    first time it goes through `first` before. `shared` are the capacities of the resources
    1, 2, ...; `network` is that of each machine.
    """
    slots = min(slots, len(tasks))
    waiting = deque(tasks)
    queues = [deque((*first, *waiting.popleft())) for _ in range(slots)]
    capacity = np.array([np.inf, *shared, *[network] * machines])
    uses = np.zeros((slots, 2), np.int64)
    loads, left, cap = np.zeros((slots, 2)), np.zeros(slots), np.zeros(slots)
    busy = np.ones(slots, bool)
    time = 0.0

    def folder_lock(slot: int) -> None:
        """Have a slot begin its next phase that takes any time, or none."""
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
        folder_lock(slot)
    while busy.any():
        rate = share_out(np.where(busy, cap, 0.0), uses, loads, capacity)
        needed = np.divide(left, rate, out=np.full(slots, np.inf), where=busy)
        step = float(needed.min())
        time += step
        left -= rate * step
        for ended in np.flatnonzero(busy & (needed <= step * (1 + _EPSILON))):
            folder_lock(int(ended))
    return time


def share_out(cap: Floats, uses: Integers, loads: Floats, capacity: Floats) -> Floats:
    """The rate of each: as much of its `cap` as everybody who wants the same resource gets of his.

    Each of n uses two resources, `uses` [n, 2], with `loads` [n, 2] for a unit. Whoever is held up
    by a resource leaves the others to the rest.
    """
    rate, left = cap.copy(), capacity.copy()
    open_, wanted = cap > 0, loads * cap[:, None]
    while open_.any():
        demand = _by_resource(uses, wanted * open_[:, None], len(capacity))
        part = np.divide(left, demand, out=np.full(len(left), np.inf), where=demand > 0)
        least = float(part.min())
        if least >= 1:
            break
        short = part <= least * (1 + _EPSILON)
        stuck = open_ & (short[uses] & (wanted > 0)).any(axis=1)
        rate[stuck] = cap[stuck] * least
        taken = wanted * (stuck * least)[:, None]
        left = np.maximum(left - _by_resource(uses, taken, len(capacity)), 0.0)
        open_ &= ~stuck
    return rate


def _by_resource(uses: Integers, amounts: Floats, count: int) -> Floats:
    found = np.zeros(count)
    np.add.at(found, uses, amounts)
    return found


# ------------------------------------------------------------------- the work that a plan holds


@dataclass(frozen=True)
class Share:
    """Bytes that are read and written for a share of a plan, and those of its largest shard."""

    read: int
    written: int
    largest: int


def work_of(plan: Plan) -> Share:
    """What a plan, or a share of one, holds."""
    units = [unit for shard in plan.shards for unit in shard.units]
    return Share(
        read=sum(unit.source_bytes for unit in units),
        written=sum(unit.output_bytes for unit in units),
        largest=max((sum(j.output_bytes for j in s.units) for s in plan.shards), default=0),
    )


def fetched_again(parts: Sequence[Plan], sizes: Mapping[str, int]) -> int:
    """Bytes of the files that more than one share needs, counted once less than they are needed."""
    needed = [
        {path for shard in part.shards for unit in shard.units for path in unit.files}
        for part in parts
    ]
    each = sum(sizes[path] for paths in needed for path in paths)
    return each - sum(sizes[path] for path in set().union(*needed))


# ---------------------------------------------------------------------- one machine and a hub


@dataclass(frozen=True)
class Rates:
    """Of one machine: source bytes fetched and quantized, shard bytes sent; 0: nothing is sent.

    `commit` is what each commit of shards takes besides, `digest` the rate at which a shard's
    sha256 is taken: one thread's.
    """

    fetch: float
    quantize: float
    send: float = 0.0
    commit: float = 0.0
    digest: float = np.inf


@dataclass(frozen=True)
class Passage:
    """How a run went: seconds in all, those in which each part was at work, and commits."""

    seconds: float
    fetching: float
    quantizing: float
    sending: float
    commits: int


@dataclass(frozen=True)
class Piece:
    """A job: bytes that are read and written, the files it needs, and its shard's number."""

    read: int
    written: int
    files: tuple[str, ...]
    shard: int


def pieces_of(plan: Plan) -> list[Piece]:
    """The jobs of a plan, in its order."""
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
    """Files in the order of need, jobs as their files are here, shards as they are whole.

    At most `room` bytes of files and `shard_room` of shards lie on the disk: a file goes with its
    last job, a shard when it was sent, and what needs their room waits.
    """
    last = {path: number for number, piece in enumerate(pieces) for path in piece.files}
    shards: dict[int, int] = {}
    for piece in pieces:
        shards[piece.shard] = shards.get(piece.shard, 0) + piece.written
    ends = {a.shard for a, b in pairwise(pieces) if a.shard != b.shard} | {pieces[-1].shard}
    assert len(ends) == len(shards), "shards follow one another"
    here: dict[str, float] = {}
    going: list[tuple[float, int]] = []  # when a file goes, and its size
    taken, fetched, clock = 0.0, 0.0, 0.0
    shipper = _Shipper(rates, shard_room)
    for number, piece in enumerate(pieces):
        for path in piece.files:
            if path in here:
                continue
            while taken + sizes[path] > room:
                gone, nbytes = heappop(going)
                fetched, taken = max(fetched, gone), taken - nbytes
            taken += sizes[path]
            fetched += sizes[path] / rates.fetch
            here[path] = fetched
        if number == 0 or piece.shard != pieces[number - 1].shard:
            opened = clock = shipper.open(clock, shards[piece.shard])
        clock = max([clock, *(here[path] for path in piece.files)]) + piece.read / rates.quantize
        for path in piece.files:
            if last[path] == number:
                heappush(going, (clock, sizes[path]))
        if number + 1 == len(pieces) or pieces[number + 1].shard != piece.shard:
            whole = max(clock, opened + shards[piece.shard] / rates.digest)
            shipper.take(whole, shards[piece.shard])
    end = shipper.rest()
    return Passage(
        seconds=max(end, clock),
        fetching=sum(sizes[path] for path in here) / rates.fetch,
        quantizing=sum(piece.read for piece in pieces) / rates.quantize,
        sending=shipper.at_work,
        commits=shipper.commits,
    )


class _Shipper:
    """Sends what waits, all of it in one commit, and then what waits by then."""

    def __init__(self, rates: Rates, room: float) -> None:
        self._rates, self._room = rates, room
        self._waiting: deque[tuple[float, int]] = deque()
        self._free_at = self._taken = 0.0
        self.at_work, self.commits, self._end = 0.0, 0, 0.0

    def open(self, now: float, nbytes: int) -> float:
        """When a shard of so many bytes can be begun; the room for it is taken."""
        while self._taken and self._taken + nbytes > self._room:
            now = max(now, self._send())
        self._taken += nbytes
        return now

    def take(self, now: float, nbytes: int) -> None:
        """A shard is whole."""
        self._end = max(self._end, now)
        if not self._rates.send:
            self._taken -= nbytes
            return
        while self._waiting and max(self._waiting[0][0], self._free_at) < now:
            self._send()
        self._waiting.append((now, nbytes))

    def rest(self) -> float:
        """When all is sent."""
        while self._waiting:
            self._send()
        return max(self._end, self._free_at)

    def _send(self) -> float:
        """Send what waits when the last commit is done; returns when that is away."""
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
