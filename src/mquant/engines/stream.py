"""The stream engine: no model, no torch; arithmetic on blocks of 16 at the speed of the disk.

Workers take one fused set after another, in the order of the output: read it into a buffer of
their own, taking the largest magnitudes on the way, quantize it from there a piece at a time, and
hand each piece to the output. So while one reads another computes or writes, every byte of the
source is read once, and memory holds a fused set per worker, however large the model is. Where the
recipe has scales searched, that is one more step, between reading and quantizing.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from threading import Event, Lock
from typing import Final, Protocol

import numpy as np

from mquant.errors import OutputError, SourceError
from mquant.numerics.formats import FLOATS, Array, Bytes, Floats
from mquant.numerics.fp8 import encode_into, prepare_fp8
from mquant.numerics.kernels import block_maxima, pack_into, prepare, quantize_into
from mquant.numerics.nvfp4 import GROUP, global_scale_of
from mquant.numerics.search import ALIKE, Weight, prepare_search, search
from mquant.numerics.thresholds import Magnitudes, thresholds
from mquant.plan import Action, Job

PIECE: Final = 2 << 20
"""Bytes handled at once: few enough for a cache, enough to make calls cost nothing."""
_AHEAD: Final = 64 << 20
"""Bytes of a job that the system is asked to fetch ahead of time; it reads on by itself."""
_COMMIT_SECONDS: Final = 0.3

Importance = Callable[[str], Floats]
"""A module's name -> float32 [in]: how much an error in each column of its weight counts."""


def alike(_module: str) -> Floats:
    """The importance of everything where nothing is known."""
    return ALIKE


class Reader(Protocol):
    """Where bytes come from: `mquant.checkpoint.Reader`, or an assembly's. Any thread may call."""

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on."""

    def prefetch(self, path: str, start: int, end: int) -> None:
        """Have bytes [start, end) fetched meanwhile."""

    def check(self, path: str) -> None:
        """Raise SourceError where the file has changed since it was planned with."""


class Output(Protocol):
    """Where tensors go: `mquant.output.ShardSet`."""

    @property
    def pending(self) -> list[Job]:
        """The jobs to do."""

    def write(self, name: str, data: memoryview) -> None:
        """Take the next bytes of a tensor."""

    def commit(self) -> None:
        """Make what was written count."""


def run(reader: Reader, output: Output, workers: int, importance: Importance | None = None) -> None:
    """Do all pending jobs of `output`; scales are searched where an `importance` is given.

    Raises SourceError for a source that cannot be read, changes, or holds NaN or infinity where
    it is quantized. However it ends, jobs that were complete by then count.
    """
    jobs = output.pending
    _prepare(jobs, search=importance is not None)
    stop = Event()
    with ThreadPoolExecutor(workers) as pool:
        queue = _Queue(jobs, reader, ahead=workers)

        def work() -> None:
            worker = Worker(reader, output.write, jobs, importance)
            for job in queue:
                if stop.is_set():
                    return
                worker.do(job)

        busy = {pool.submit(work) for _ in range(min(workers, len(jobs)))}
        try:
            while busy:
                done, busy = wait(busy, _COMMIT_SECONDS, return_when=FIRST_EXCEPTION)
                output.commit()
                for each in done:
                    each.result()
        except BaseException:
            stop.set()
            wait(busy)
            with suppress(OutputError):  # what stopped the run says more
                output.commit()
            raise


def make(reader: Reader, job: Job) -> dict[str, bytes]:
    """The tensors of one job, by name, in memory. Raises as `run`."""
    _prepare([job], search=False)
    made: dict[str, bytearray] = {output.name: bytearray() for output in job.outputs}
    Worker(reader, lambda name, data: made[name].extend(data), [job], None).do(job)
    return {name: bytes(data) for name, data in made.items()}


def _prepare(jobs: list[Job], *, search: bool) -> None:
    """Compile what the jobs need, before threads ask for it at once."""
    wanted = {(_is_fp8(job), a.source.dtype) for job in jobs if job.scheme for a in job.actions}
    for fp8, dtype in sorted(wanted):
        if fp8:
            prepare_fp8(FLOATS[dtype])
            continue
        prepare(FLOATS[dtype])
        if search:
            prepare_search(FLOATS[dtype])


def _is_fp8(job: Job) -> bool:
    return job.scheme is not None and job.scheme.format == "float-quantized"


class _Queue(Iterator[Job]):
    """Jobs for threads to take. When one is taken, a later one's bytes are asked for."""

    def __init__(self, jobs: list[Job], reader: Reader, ahead: int) -> None:
        self._jobs, self._reader, self._ahead = jobs, reader, ahead
        self._next = 0
        self._lock = Lock()

    def __next__(self) -> Job:
        with self._lock:
            taken = self._next
            self._next += 1
        for later in self._jobs[taken + self._ahead : taken + self._ahead + 1]:
            for source in (action.source for action in later.actions):
                end = min(source.end, source.start + _AHEAD)
                self._reader.prefetch(source.shard, source.start, end)
        if taken >= len(self._jobs):
            raise StopIteration
        return self._jobs[taken]


class Worker:
    """Does jobs, one at a time, in buffers that it keeps."""

    def __init__(
        self,
        reader: Reader,
        write: Callable[[str, memoryview], None],
        jobs: list[Job],
        importance: Importance | None,
    ) -> None:
        """Make buffers that hold the largest fused set among `jobs`."""
        self._reader = reader
        self._write = write
        self._importance = importance
        sets = [job for job in jobs if job.scheme and not _is_fp8(job)]
        stripes = [_stripe(action)[0] for job in jobs if _is_fp8(job) for action in job.actions]
        held = max([PIECE, *stripes, *(job.source_bytes for job in sets)])
        self._weights = np.empty(held, np.uint8)
        self._codes = np.empty(max([PIECE, *stripes]) // 2 if stripes else 0, np.uint8)
        self._maxima = np.empty(max([0, *map(_blocks, sets)]), np.uint32)
        self._packed = np.empty(PIECE // 4, np.uint8)  # of a 16-bit source; F32 fills half
        self._scales = np.empty(PIECE // 2 // GROUP, np.uint8)
        self._found = np.empty((3, len(self._maxima) if importance else 0), np.uint8)

    def do(self, job: Job) -> None:
        """Quantize or copy the tensors of a job."""
        if job.scheme is None:
            for action in job.actions:
                self._copy(action)
        elif _is_fp8(job):
            for action in job.actions:
                self._encode(action)
        else:
            self._quantize(job)
        for path in {action.source.shard for action in job.actions}:
            self._reader.check(path)

    def _copy(self, action: Action) -> None:
        source, (output,) = action.source, action.outputs
        for start in range(source.start, source.end, PIECE) or [source.start]:
            part = self._weights[: min(PIECE, source.end - start)].data
            self._reader.read_into(source.shard, start, part)
            self._write(output.name, part)

    def _encode(self, action: Action) -> None:
        """Quantize a weight to FP8, a few rows of blocks at a time: nothing else is shared."""
        source, form = action.source, FLOATS[action.source.dtype]
        codes_name, scale_name = (output.name for output in action.outputs)
        height, block = _stripe(action)
        rows, columns = source.shape
        step = max(1, PIECE // height) * block[0]
        scales = []
        for first in range(0, rows, step):
            count = min(step, rows - first) * columns
            part = self._weights[: count * form.word.itemsize]
            start = source.start + first * columns * form.word.itemsize
            self._reader.read_into(source.shard, start, part.data)
            words, codes = part.view(form.word).reshape(-1, columns), self._codes[:count]
            made, bad = encode_into(words, form, block, codes.reshape(-1, columns))
            _refuse(action, bad)
            self._write(codes_name, codes.data)
            scales.append(made.view(form.word))
        self._write(scale_name, np.concatenate(scales).data.cast("B"))

    def _quantize(self, job: Job) -> None:
        sizes = [(0, 0)]
        for action in job.actions:
            nbytes, blocks = sizes[-1]
            source = action.source
            sizes.append((nbytes + source.nbytes, blocks + source.elements // GROUP))
        members = [
            (action, self._weights[begin:end], self._maxima[first:last])
            for action, (begin, first), (end, last) in zip(
                job.actions, sizes, sizes[1:], strict=False
            )
        ]
        amaxes = [self._read(*member) for member in members]
        if self._importance is None:
            scale, found = global_scale_of(amaxes), None
        else:
            scale, found = self._search(members, self._importance)
        for member, (_, first), (_, last) in zip(members, sizes, sizes[1:], strict=False):
            self._pack(*member, scale, None if found is None else found[first:last])

    def _search(
        self, members: list[tuple[Action, Bytes, Magnitudes]], importance: Importance
    ) -> tuple[np.float32, Bytes]:
        """The best global scale of a fused set, and the best codes of all its blocks."""
        weights = []
        for action, weight, maxima in members:
            form = FLOATS[action.source.dtype]
            weights.append(Weight(weight.view(form.word), form, maxima, importance(action.module)))
        return search(weights, self._found)

    def _read(self, action: Action, weight: Bytes, maxima: Magnitudes) -> Array:
        """Read a weight; returns its absolute maximum, a scalar in its own dtype."""
        source, form = action.source, FLOATS[action.source.dtype]
        blocks = PIECE // form.word.itemsize // GROUP
        largest = bad = 0
        for i, start in enumerate(range(0, len(weight), PIECE)):
            part = weight[start : start + PIECE]
            self._reader.read_into(source.shard, source.start + start, part.data)
            magnitude, odd = block_maxima(
                part.view(form.word), form, maxima[i * blocks : (i + 1) * blocks]
            )
            largest, bad = max(largest, magnitude), bad + odd
        _refuse(action, bad)
        return form.values(np.array(largest, form.word))

    def _pack(
        self,
        action: Action,
        weight: Bytes,
        maxima: Magnitudes,
        scale: np.float32,
        found: Bytes | None,
    ) -> None:
        packed_name, scale_name, global_name = (output.name for output in action.outputs)
        steps = thresholds(action.source.dtype, float(scale))
        words = weight.view(steps.form.word)
        blocks = PIECE // steps.form.word.itemsize // GROUP
        for first in range(0, len(maxima), blocks):
            some = maxima[first : first + blocks]
            packed, scales = self._packed[: len(some) * GROUP // 2], self._scales[: len(some)]
            piece = words[first * GROUP : (first + blocks) * GROUP]
            if found is None:
                quantize_into(piece, some, steps, packed, scales)
            else:
                scales = found[first : first + blocks]
                pack_into(piece, steps, scales, packed)
            self._write(packed_name, packed.data)
            self._write(scale_name, scales.data)
        self._write(global_name, np.array([scale], "<f4").data.cast("B"))


def _stripe(action: Action) -> tuple[int, tuple[int, int]]:
    """Bytes of the rows of an FP8 weight that blocks lie across, and a block's height and width."""
    source = action.source
    shape = action.scheme.config_group["weights"]["block_structure"] if action.scheme else None
    high, wide = shape or (1, source.shape[1])
    return high * source.nbytes // source.shape[0], (high, wide)


def _refuse(action: Action, bad: int) -> None:
    """Raise SourceError where a weight has `bad` numbers that are none."""
    if bad:
        values = "value that is" if bad == 1 else "values that are"
        raise SourceError(
            f"{action.source.name} holds {bad:,} {values} NaN or infinite: it cannot be quantized.",
            "Get the checkpoint again; or keep the module with the recipe's ignore list.",
        )


def _blocks(job: Job) -> int:
    return sum(action.source.elements for action in job.actions) // GROUP


__all__ = ["PIECE", "Importance", "alike", "make", "run"]
