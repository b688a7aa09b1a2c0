"""The stream engine: quantizes blocks of 16 weights at the speed of the disk, without torch.

A worker takes the next fused set in the order of the output. The worker reads the set into its own
buffer and computes the largest magnitude of each block while reading; then the worker quantizes a
piece of the buffer at a time and writes the piece to the output. So one worker reads while another
computes or writes, every byte of the source is read once, and memory holds a fused set per worker,
however large the model is. If the recipe searches scales, a worker searches between reading and
quantizing.

A weight that the source stores quantized is dequantized to BF16 on its way into the buffer. If the
plan keeps such a weight, the worker writes the weight in BF16 to the output, a piece at a time. A
fused set that the plan casts from MXFP4 to NVFP4 is not dequantized: see `engines.cast`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from threading import Event, Lock
from typing import Final, Protocol

import numpy as np

from mquant.checkpoint.slices import forget, read_part, read_pieces
from mquant.engines.cast import cast_unit
from mquant.engines.dequantized_rows import decoded, open_rows, room
from mquant.errors import OutputError, SourceError
from mquant.events import Emit, Note, silent
from mquant.numerics.dequantize import not_finite, prepare_decoding
from mquant.numerics.floats import BF16, FLOATS, Array, Bytes, Floats
from mquant.numerics.fp8 import encode_into, prepare_fp8
from mquant.numerics.kernels import block_maxima, pack_into, prepare, quantize_into
from mquant.numerics.mx_cast import powers_of_two, prepare_cast
from mquant.numerics.nvfp4 import GROUP, global_scale_of
from mquant.numerics.scale_search import ALIKE, SearchedWeight, prepare_search, search
from mquant.numerics.thresholds import Magnitudes, thresholds
from mquant.plan import Action, WorkUnit
from mquant.text import plural

PIECE: Final = 2 << 20
"""Bytes of a weight per kernel call: few enough for a cache, enough to hide the cost of calls."""
_AHEAD: Final = 64 << 20
"""Bytes of each source tensor to prefetch; the system then reads ahead by itself."""
_COMMIT_SECONDS: Final = 0.3

Importance = Callable[[str], Floats]
"""A module's name -> float32 [in]: how much an error in each column of its weight counts."""
InputScale = Callable[[str], np.float32]
"""A module's name -> the divisor of its inputs in 4 bits."""


def alike(_module: str) -> Floats:
    """Return the importance of a module without a known importance: all columns count alike."""
    return ALIKE


class Reader(Protocol):
    """The source of bytes: `mquant.checkpoint.Reader`, or an assembly's. Any thread may call it."""

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on."""

    def prefetch(self, path: str, start: int, end: int) -> None:
        """Fetch bytes [start, end) in the background."""

    def check(self, path: str) -> None:
        """Raise SourceError if the file has changed since the plan was made."""


class TensorSink(Protocol):
    """The destination of tensors: `mquant.output.ShardSet`."""

    @property
    def pending(self) -> list[WorkUnit]:
        """The work units to do."""

    def write(self, name: str, data: memoryview) -> None:
        """Write the next bytes of a tensor."""

    def commit(self) -> None:
        """Record the complete work units. Raises what an observer of the output raises."""

    def stop(self) -> None:
        """End every wait for room or for files."""


def run(
    reader: Reader,
    output: TensorSink,
    workers: int,
    importance: Importance | None = None,
    emit: Emit = silent,
    input_scale: InputScale | None = None,
) -> None:
    """Do all pending work units of `output`; if an `importance` is given, search the scales.

    `input_scale` gives the scale of a module's inputs, if the plan stores such scales. `emit` gets
    a warning if dequantized weights are NaN or infinite.
    Raises SourceError if the source cannot be read, changes, or holds NaN or infinity in a weight
    that is quantized. Complete work units are committed, however the run ends. If the run ends
    early, it stops `output`, so that no worker waits forever.
    """
    units = output.pending
    _prepare(units, importance)
    stop = Event()
    started: list[Worker] = []
    with ThreadPoolExecutor(workers) as pool:
        queue = _Queue(units, reader, ahead=workers)

        def work() -> None:
            worker = Worker(reader, output.write, units, importance, input_scale)
            started.append(worker)
            for unit in queue:
                if stop.is_set():
                    return
                worker.do(unit)

        busy = {pool.submit(work) for _ in range(min(workers, len(units)))}
        try:
            while busy:
                done, busy = wait(busy, _COMMIT_SECONDS, return_when=FIRST_EXCEPTION)
                output.commit()
                for future in done:
                    future.result()
        except BaseException:
            stop.set()
            output.stop()
            wait(busy)
            with suppress(OutputError):  # the error that stopped the run says more
                output.commit()
            raise
        finally:
            _warn([name for worker in started for name in worker.not_finite], emit)


def make(reader: Reader, unit: WorkUnit, importance: Importance | None = None) -> dict[str, bytes]:
    """Return the tensors of one work unit, by name, in memory. Raises SourceError as `run`."""
    _prepare([unit], importance)
    tensors: dict[str, bytearray] = {output.name: bytearray() for output in unit.outputs}
    Worker(reader, lambda name, data: tensors[name].extend(data), [unit], importance).do(unit)
    return {name: bytes(data) for name, data in tensors.items()}


def _prepare(units: list[WorkUnit], importance: Importance | None) -> None:
    """Compile the kernels that the work units need, before the workers start."""
    if any(unit.cast for unit in units):
        prepare_cast()
    quantized = [unit for unit in units if unit.scheme and not unit.cast]
    kernels = {(_is_fp8(unit), a.source.dtype) for unit in quantized for a in unit.actions}
    for fp8, dtype in sorted(kernels):
        if fp8:
            prepare_fp8(FLOATS[dtype])
            continue
        prepare(FLOATS[dtype])
        if importance:
            prepare_search(FLOATS[dtype])
    if any(action.stored for unit in units if not unit.cast for action in unit.actions):
        prepare_decoding()


def _is_fp8(unit: WorkUnit) -> bool:
    return unit.scheme is not None and unit.scheme.format == "float-quantized"


class _Queue(Iterator[WorkUnit]):
    """Work units for threads to take. Taking a work unit prefetches a later one."""

    def __init__(self, units: list[WorkUnit], reader: Reader, ahead: int) -> None:
        self._units, self._reader, self._ahead = units, reader, ahead
        self._next = 0
        self._lock = Lock()

    def __next__(self) -> WorkUnit:
        with self._lock:
            taken = self._next
            self._next += 1
        for later in self._units[taken + self._ahead : taken + self._ahead + 1]:
            for source in (info for action in later.actions for info in action.read):
                end = min(source.end, source.start + _AHEAD)
                self._reader.prefetch(source.shard, source.start, end)
        if taken >= len(self._units):
            raise StopIteration
        return self._units[taken]


class Worker:
    """A worker that carries out work units, one at a time, in its own buffers."""

    def __init__(
        self,
        reader: Reader,
        write: Callable[[str, memoryview], None],
        units: list[WorkUnit],
        importance: Importance | None,
        input_scale: InputScale | None = None,
    ) -> None:
        """Allocate buffers that hold the largest fused set among `units`.

        `not_finite` will name the kept weights that dequantizing makes NaN or infinite.
        """
        self.not_finite: list[str] = []
        self._reader = reader
        self._write = write
        self._importance = importance
        self._input_scale = input_scale
        sets = [unit for unit in units if unit.scheme and not _is_fp8(unit)]
        read = [unit for unit in units if not unit.cast]
        stored = [action for unit in read for action in unit.actions if action.stored]
        stripes = [_stripe(action)[0] for unit in units if _is_fp8(unit) for action in unit.actions]
        # Counted in elements of 16 bits: a buffer of the same bytes holds fewer F32 elements.
        columns = (action.source.shape[1] for action in stored)
        widest = max([PIECE // 2, *columns, *(stripe // 2 for stripe in stripes)])
        rooms = (room(action, PIECE) for action in stored)
        nbytes = max([2 * widest, *rooms, *(unit.buffer_bytes for unit in sets)])
        self._weights = np.empty(nbytes, np.uint8)
        self._codes = np.empty(widest if stored or stripes else 0, np.uint8)
        self._maxima = np.empty(max([0, *(_blocks(s) for s in sets if not s.cast)]), np.uint32)
        self._packed = np.empty(PIECE // 4, np.uint8)  # for a 16-bit source; F32 fills half
        self._scales = np.empty(PIECE // 2 // GROUP, np.uint8)
        self._searched = np.empty((2, len(self._maxima) if importance else 0), np.uint8)

    def do(self, unit: WorkUnit) -> None:
        """Quantize or keep the tensors of a work unit."""
        if unit.scheme is None:
            for action in unit.actions:
                self._keep(action)
        elif unit.cast:
            cast_unit(self._reader, unit, self._weights, self._write)
        elif _is_fp8(unit):
            for action in unit.actions:
                self._encode(action)
        else:
            self._quantize(unit)
        forget()
        for path in unit.files:
            self._reader.check(path)

    def _keep(self, action: Action) -> None:
        source, (output,) = action.source, action.outputs
        if action.value is not None:
            self._write(output.name, memoryview(action.value))
            return
        if action.stored:
            bad = 0
            for rows in self._decoded(action, self._weights, again=True):
                bad += not_finite(rows.view(BF16.word))
                self._write(output.name, rows.data)
            self.not_finite += [output.name] if bad else []
            return
        for start in range(0, source.nbytes, PIECE) or [0]:
            part = self._weights[: min(PIECE, source.nbytes - start)]
            read_part(self._reader, source, start, part.data)
            if source.dtype == "F8_E8M0" and output.dtype == "F32":
                part = powers_of_two(part).view(np.uint8)
            self._write(output.name, part.data)

    def _encode(self, action: Action) -> None:
        """Quantize a weight to FP8, a few rows of blocks at a time: blocks share no other value."""
        source, float_format = action.source, FLOATS[action.source.dtype]
        codes_name, scale_name = (output.name for output in action.outputs)
        height, block = _stripe(action)
        rows, columns = source.shape
        step = max(1, PIECE // height) * block[0]
        stored = (
            open_rows(self._reader, action.stored, columns, self._codes) if action.stored else None
        )
        scales = []
        for first in range(0, rows, step):
            last = min(first + step, rows)
            count = (last - first) * columns
            part = self._weights[: count * float_format.word.itemsize]
            if stored:
                stored.read(first, last, part.view(float_format.word))
            else:
                start = first * columns * float_format.word.itemsize
                read_part(self._reader, source, start, part.data)
            # The source codes are decoded already, so the new codes reuse their buffer.
            words, codes = part.view(float_format.word).reshape(-1, columns), self._codes[:count]
            part_scales, bad = encode_into(words, float_format, block, codes.reshape(-1, columns))
            _refuse(action, bad)
            self._write(codes_name, codes.data)
            scales.append(part_scales.view(float_format.word))
        self._write(scale_name, np.concatenate(scales).data.cast("B"))

    def _quantize(self, unit: WorkUnit) -> None:
        sizes = [(0, 0)]
        for action in unit.actions:
            nbytes, blocks = sizes[-1]
            elements = action.source.elements
            sizes.append((nbytes + action.weight_bytes, blocks + elements // GROUP))
        members = [
            (action, self._weights[begin:end], self._maxima[first:last])
            for action, (begin, first), (end, last) in zip(
                unit.actions, sizes, sizes[1:], strict=False
            )
        ]
        amaxes = [self._read(*member) for member in members]
        if self._importance is None:
            scale, searched = global_scale_of(amaxes), None
        else:
            scale, searched = self._search(members, self._importance)
        for member, (_, first), (_, last) in zip(members, sizes, sizes[1:], strict=False):
            self._pack(*member, scale, None if searched is None else searched[first:last])

    def _search(
        self, members: list[tuple[Action, Bytes, Magnitudes]], importance: Importance
    ) -> tuple[np.float32, Bytes]:
        """Return the best global scale of a fused set, and the best scale code of each block."""
        weights = []
        for action, weight, maxima in members:
            float_format = FLOATS[action.source.dtype]
            weights.append(
                SearchedWeight(
                    weight.view(float_format.word), float_format, maxima, importance(action.module)
                )
            )
        return search(weights, self._searched)

    def _read(self, action: Action, weight: Bytes, maxima: Magnitudes) -> Array:
        """Read a weight into its buffers; return its absolute maximum, a scalar in its dtype."""
        source, float_format = action.source, FLOATS[action.source.dtype]
        largest = bad = first = 0
        plain = read_pieces(self._reader, source, weight, PIECE)
        for part in self._decoded(action, weight) if action.stored else plain:
            words = part.view(float_format.word)
            last = first + len(words) // GROUP
            magnitude, nonfinite = block_maxima(words, float_format, maxima[first:last])
            largest, bad, first = max(largest, magnitude), bad + nonfinite, last
        _refuse(action, bad)
        return float_format.values(np.array(largest, float_format.word))

    def _decoded(self, action: Action, weight: Bytes, *, again: bool = False) -> Iterator[Bytes]:
        """Yield a weight that is stored quantized, in BF16, in pieces of whole rows."""
        return decoded(self._reader, action, weight, self._codes, PIECE, again=again)

    def _pack(
        self,
        action: Action,
        weight: Bytes,
        maxima: Magnitudes,
        scale: np.float32,
        searched: Bytes | None,
    ) -> None:
        packed_name, scale_name, global_name, *rest = (output.name for output in action.outputs)
        steps = thresholds(action.source.dtype, float(scale))
        words = weight.view(steps.float_format.word)
        blocks = PIECE // steps.float_format.word.itemsize // GROUP
        for first in range(0, len(maxima), blocks):
            amaxes = maxima[first : first + blocks]
            packed, scales = self._packed[: len(amaxes) * GROUP // 2], self._scales[: len(amaxes)]
            piece = words[first * GROUP : (first + blocks) * GROUP]
            if searched is None:
                quantize_into(piece, amaxes, steps, packed, scales)
            else:
                scales = searched[first : first + blocks]
                pack_into(piece, steps, scales, packed)
            self._write(packed_name, packed.data)
            self._write(scale_name, scales.data)
        self._write(global_name, np.array([scale], "<f4").data.cast("B"))
        if rest and self._input_scale:
            scale = self._input_scale(action.module)
            self._write(rest[0], np.array([scale], "<f4").data.cast("B"))


def _stripe(action: Action) -> tuple[int, tuple[int, int]]:
    """Return the bytes of a row of blocks of an FP8 weight, and a block's height and width."""
    source = action.source
    shape = action.scheme.config_group["weights"]["block_structure"] if action.scheme else None
    high, wide = shape or (1, source.shape[1])
    return high * action.weight_bytes // source.shape[0], (high, wide)


def _refuse(action: Action, bad: int) -> None:
    """Raise SourceError if a weight has `bad` values that are NaN or infinite."""
    if bad:
        values = "value that is" if bad == 1 else "values that are"
        raise SourceError(
            f"{action.source.name} holds {bad:,} {values} NaN or infinite: it cannot be quantized.",
            "Get the checkpoint again; or keep the module with the recipe's ignore list.",
        )


def _warn(names: list[str], emit: Emit) -> None:
    """Emit one warning that names the first weight and counts the others."""
    if names:
        more = f" (and {plural(len(names) - 1, 'more weight')} like it)" if names[1:] else ""
        emit(
            Note(
                "warning",
                f"{min(names)} holds NaN or infinity once it is dequantized{more}: codes times "
                "scales are beyond BF16's largest number, or are NaN in the source.",
            )
        )


def _blocks(unit: WorkUnit) -> int:
    return sum(action.source.elements for action in unit.actions) // GROUP
