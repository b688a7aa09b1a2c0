"""The simulated runs and their figures: every figure is measured, or marked as assumed.

Real headers (sparse files of `mquant synth --shapes-only`) become real plans. The time of a run is
a function of a checkpoint, machines and bandwidths; docs/scale-out.md shows the results.
"""

import tempfile
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Final

from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.plan import DEFAULT_SHARD_BYTES, Plan, ShardPlan, cut_shards, make_plan, shares
from mquant.recipe import find_recipe
from mquant.synth import Sizes, synth
from simulation import (
    Passage,
    Phase,
    Rates,
    Share,
    Task,
    makespan,
    pieces_of,
    pipeline,
    work_of,
)

# ------------------------------------------------- measured; docs/lab-log.md, 2026-11-24, says how

CORE: Final = 1.0e9
"""Bytes of BF16 a second that a core quantizes ("the streaming engine", "the same once more")."""
DIGEST: Final = 1.57e9
"""Bytes a second of sha256 in one thread ("the streaming engine": 0.81 s for 1.27 GB)."""
FETCH: Final = 1.15e9
"""Bytes a second from a hub through --scratch, in one process ("the arithmetic of scaling out")."""
DISK: Final = 1.5e9
"""Bytes a second of a local disk, each way ("the streaming engine": 1 to 1.7 GB/s)."""

# -------------------------------------------------------------------------------------- assumed

CORES: Final = 16
LAUNCH: Final = 10.0
"""Seconds until a Slurm task, with its Python, runs."""
WORKER: Final = 3.0
"""Seconds until a worker of a running Ray cluster runs."""
SAMPLE: Final = 0.001
"""Seconds to open a file on shared storage and to read 4 KiB of the file."""
SAMPLES: Final = 200_000.0
"""Samples a second that shared storage serves, for all processes together."""
COMMIT: Final = 3.0
"""Seconds of a commit on the hub, besides sending the bytes."""
SCRATCH: Final = 20_000_000_000
SHARD: Final = DEFAULT_SHARD_BYTES

GBIT: Final = 1e9 / 8
NETWORKS: Final = (1, 10, 25, 100)
"""Gbit/s of a machine, each way."""
STORAGES: Final = (10, 100)
"""GB/s of shared storage, reading and writing together."""
MACHINES: Final = tuple(2**n for n in range(11))
SAMPLING, STORAGE = 1, 2
"""Numbers of shared resources."""


@dataclass(frozen=True)
class Case:
    """A checkpoint: how the checkpoint is made, and its measured times.

    `start`: seconds from the start of a process to the first byte of a weight, without sampling the
    source; `verify`: seconds of index and verdict. Both are processor seconds, on a busy machine.
    """

    name: str
    title: str
    family: str
    sizes: Sizes
    command: str
    start: float
    verify: float

    @cached_property
    def plan(self) -> Plan:
        """The checkpoint's plan with recipe nvfp4, from real headers."""
        families = load_families()
        with tempfile.TemporaryDirectory() as folder:
            src = Path(folder) / "src"
            synth(src, families[self.family], sizes=self.sizes, shapes_only=True)
            return make_plan(open_checkpoint(Folder(src)), find_recipe("nvfp4"), families)

    @cached_property
    def files(self) -> dict[str, int]:
        """Sizes of the source's shards."""
        files = self.plan.survey.checkpoint.source.files
        return {path: size for path, size in files.items() if path.endswith(".safetensors")}

    @property
    def samples(self) -> int:
        """The reads with which a process recognises the source: 64 in every file."""
        return 64 * len(self.files)


CASES: Final = (
    Case(
        "278gb",
        "278 GB",
        "minimax_m2",
        Sizes(),
        "mquant synth x --family minimax_m2 --shapes-only",
        4.1,
        5.4,
    ),
    Case(
        "1tb",
        "1.4 TB",
        "deepseek_v3",
        Sizes(),
        "mquant synth x --family deepseek_v3 --shapes-only",
        4.5,
        8.1,
    ),
    Case(
        "10tb",
        "10 TB",
        "minimax_m2",
        Sizes(layers=88, experts=256, hidden=12288, intermediate=6144),
        "mquant synth x --family minimax_m2 --shapes-only --layers 88 --experts 256 --hidden 12288 "
        "--intermediate 6144",
        5.7,
        10.6,
    ),
)


# --------------------------------------------------------------------- many machines, one storage


@dataclass(frozen=True)
class Outcome:
    """A run on so many machines: seconds in all, and the seconds of each part alone.

    `begin`: until the last process reads weights. `finish`: after the last share. `storage`: shared
    storage at its full rate. `largest`: the largest share on its own machine. `ideal`: the
    streaming of one machine alone.
    """

    machines: int
    seconds: float
    begin: float
    finish: float
    storage: float
    largest: float
    ideal: float

    @property
    def hours(self) -> float:
        """The machine-hours that are paid for."""
        return self.machines * self.seconds / 3600

    @property
    def efficiency(self) -> float:
        """The part of the paid time that one machine's streaming alone would have cost."""
        return self.ideal / (self.machines * self.seconds)


@cache
def cut(case: Case, shard_bytes: int) -> Plan:
    """Return the plan with shards of another size."""
    units = [unit for shard in case.plan.shards for unit in shard.units]
    groups = cut_shards(units, lambda unit: unit.output_bytes, shard_bytes)
    return replace(case.plan, shards=tuple(ShardPlan(name, tuple(g)) for name, g in groups.items()))


@cache
def single(case: Case, shard_bytes: int) -> tuple[Share, ...]:
    """Return every shard as a share of its own, like Ray's tasks."""
    plan = cut(case, shard_bytes)
    return tuple(work_of(replace(plan, shards=(shard,))) for shard in plan.shards)


@cache
def parts(case: Case, shard_bytes: int, of: int) -> tuple[Share, ...]:
    """Return the shares of `mquant quantize --share i/N`."""
    works = iter(single(case, shard_bytes))
    cuts = [len(part.shards) for part in shares(cut(case, shard_bytes), of)]
    return tuple(_together([next(works) for _ in range(count)]) for count in cuts)


def _together(works: list[Share]) -> Share:
    return Share(
        sum(work.read for work in works),
        sum(work.written for work in works),
        max((work.largest for work in works), default=0),
    )


def streaming(work: Share, network: float, cores: int = CORES) -> Task:
    """Return the work of a process that has a plan; empty if its share has no shard."""
    if not work.read:
        return ()
    # One thread computes a shard's digest, however many cores there are.
    cap = min(cores * CORE, network, work.read * DIGEST / work.largest)
    return (Phase(work.read, cap, STORAGE, 1 + work.written / work.read, on_network=True),)


@cache
def in_jobs(
    case: Case, machines: int, network: float, storage: float, shard_bytes: int = SHARD
) -> Outcome:
    """Simulate `mquant quantize --share i/N` on each of N machines, then `mquant finish`."""
    begin: Task = (
        Phase(LAUNCH + case.start, 1.0),
        Phase(case.samples, 1 / SAMPLE, SAMPLING, 1.0),
    )
    streams = [streaming(work, network) for work in parts(case, shard_bytes, machines)]
    shared = (SAMPLES, storage)
    seconds = makespan([(*begin, *s) for s in streams], machines, machines, network, shared)
    finish = LAUNCH + case.start + case.samples * SAMPLE + case.verify
    return Outcome(
        machines,
        seconds + finish,
        makespan([begin] * machines, machines, machines, network, shared),
        finish,
        (case.plan.source_bytes + case.plan.output_bytes) / storage,
        max(phase.size / phase.cap for stream in streams for phase in stream),
        case.plan.source_bytes / min(CORES * CORE, network),
    )


def on_ray(
    case: Case, machines: int, network: float, storage: float, shard_bytes: int = SHARD
) -> float:
    """Return the seconds of `mquant quantize --cluster ray`: a task for each shard.

    If there are more CPUs than shards, a task gets several CPUs, at most those of one machine.
    A worker process makes the plan once, for all its tasks. The driver starts before the workers.
    """
    works = single(case, shard_bytes)
    cpus = max(1, min(CORES * machines // len(works), CORES))
    sampling = Phase(case.samples, 1 / SAMPLE, SAMPLING, 1.0)
    first = (Phase(WORKER + case.start, 1.0), sampling)
    tasks = [streaming(work, network, cpus) for work in works]
    slots = machines * (CORES // cpus)
    seconds = makespan(tasks, slots, machines, network, (SAMPLES, storage), first)
    return case.start + case.samples * SAMPLE + seconds + case.verify


# ------------------------------------------------------------------------------- one machine, a hub


@dataclass(frozen=True)
class Alone:
    """A run on one machine whose source is on a hub: its seconds, its limit, and its commits."""

    seconds: float
    bound: str
    commits: int = 0


def downloaded(case: Case, network: float) -> Alone:
    """Simulate `mquant quantize REPO -o OUT`: a full download, then quantizing from the disk."""
    plan = case.plan
    fetch = sum(case.files.values()) / min(network, DISK)
    work = plan.source_bytes / min(CORES * CORE, DISK)
    bound = "network" if network < DISK else "disk"
    return Alone(case.start + fetch + work + case.verify, bound)


def through_scratch(case: Case, network: float, *, push: bool) -> Alone:
    """Simulate `mquant quantize REPO --scratch 20GB`, to a local disk or (`push`) to a hub."""
    plan = case.plan
    fetch, send = min(network, FETCH), min(network, DISK)
    # One thread hashes each shard before the upload.
    rates = Rates(fetch, CORES * CORE, 1 / (1 / send + 1 / DIGEST) if push else 0, COMMIT, DIGEST)
    largest = max(sum(unit.output_bytes for unit in shard.units) for shard in plan.shards)
    shard_room = max(2 * largest, SCRATCH // 4) if push else float("inf")
    room = SCRATCH - (shard_room if push else 0)
    run = pipeline(pieces_of(plan), case.files, rates, room, shard_room)
    return Alone(case.start + run.seconds + case.verify, _bound(run, network), run.commits)


def _bound(passage: Passage, network: float) -> str:
    """Return the part that works for nearly all of the time, or the scratch's size."""
    busy = {
        "network" if network <= FETCH else "one process's downloads": passage.fetching,
        "cores": passage.quantizing,
        "sending": passage.sending,
    }
    most = max(busy, key=lambda part: busy[part])
    return most if busy[most] > 0.85 * passage.seconds else "the scratch's size"
