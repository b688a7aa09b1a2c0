"""How far a checkpoint's weights are from its parent's, tensor by tensor, in one pass over both.

Workers take one tensor after another in the order of the parent's files. A worker decodes a few
rows of each side into buffers that stay in the cache, and adds up squares in float64, row by row:
the result does not depend on the number of workers. Memory is a few buffers for each worker.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, cast

import numpy as np

from mquant.checkpoint.slices import read_part
from mquant.events import Emit, Progress, silent
from mquant.loader_model.modules import Module, ModuleView
from mquant.loader_model.storage import GROUP
from mquant.verify.against_parent import (
    KEPT_TENSOR_DIFFERS,
    PARENT_LACKS_TENSOR,
    PARENT_TENSOR_MISSING,
    WEIGHT_NOT_COMPARED,
)
from mquant.verify.tally import Tally
from mquant.weights.decode import Floats, floats
from mquant.weights.kernels import SUMS, Array, add_nvfp4_sums, add_sums
from mquant.weights.matrix import (
    AnyReader,
    Matrix,
    Nvfp4,
    Plain,
    Scratch,
    Workers,
    matrix_of,
    plain,
)

_TILE: Final = 1 << 18
"""Elements per call: few enough for a cache, enough to hide the cost of calls."""
_HUB_TILE: Final = 5 << 20
"""Elements per call on a hub, where requests are slow: one expert's weight of MiniMax-M2."""
_AHEAD: Final = 6  # how many tensors ahead a worker prefetches
_EVENT_BYTES: Final = 64_000_000  # bytes between two events of progress


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of one tensor from the parent's.

    `form` and `parent_form` are the storage formats. `identical`: equal bit for bit; otherwise
    `error`, `power` and `own` are sums of squares: of the differences, of the parent's weight, of
    the checkpoint's weight. `worst` is the block of 16 in a row with the largest squared error: its
    row, first column, and relative error.
    """

    name: str
    role: str
    layer: int | None
    expert: int | None
    form: str
    parent_form: str
    elements: int
    identical: bool
    error: float = 0.0
    power: float = 0.0
    own: float = 0.0
    worst: tuple[int, int, float] | None = None

    @property
    def equal(self) -> bool:
        """Whether all numbers are the parent's, under other bits: in another format, or as -0."""
        return not self.identical and self.error == 0.0


@dataclass(frozen=True)
class Pair:
    """A tensor of the checkpoint, `weight`, and the same tensor of the parent, `reference`."""

    weight: Matrix
    reference: Matrix
    role: str
    layer: int | None
    expert: int | None

    @property
    def name(self) -> str:
        """The tensor's name in the parent, or the name a quantized parent's would have."""
        return self.reference.name

    @property
    def place(self) -> tuple[str, int]:
        """The shard and offset in the parent's files."""
        return self.reference.tensors[0].shard, self.reference.tensors[0].start

    @property
    def nbytes(self) -> int:
        """The bytes to read of both tensors."""
        return sum(info.nbytes for side in (self.weight, self.reference) for info in side.tensors)


def pairs(
    view: ModuleView, parent: ModuleView, readers: tuple[AnyReader, AnyReader], tally: Tally
) -> list[Pair]:
    """Return the pairs to compare, in the order of the parent's files.

    `tally` gets a finding for each tensor without a pair.
    """
    for name in sorted(view.modules.keys() - parent.modules.keys()):
        tally.add(PARENT_LACKS_TENSOR, name, f"The parent has no {name}")
    matched: list[Pair] = []
    for name, reference in parent.modules.items():
        module = view.modules.get(name)
        if module is None:
            missing = next(iter(reference.tensors.values())).name
            tally.add(PARENT_TENSOR_MISSING, missing, f"{missing} of the parent is missing")
        else:
            matched += _of_module(view, parent, module, reference, readers, tally)
    return sorted(
        matched, key=lambda pair: (pair.reference.tensors[0].shard, pair.reference.tensors[0].start)
    )


def _of_module(
    view: ModuleView,
    parent: ModuleView,
    module: Module,
    reference: Module,
    readers: tuple[AnyReader, AnyReader],
    tally: Tally,
) -> Iterator[Pair]:
    sides: list[tuple[str, Matrix | None, Matrix | None]] = []
    rest = set(reference.tensors)
    if module.quantized or reference.quantized:
        weight = matrix_of(view, module, readers[0])
        sides.append((module.name, weight, matrix_of(parent, reference, readers[1])))
        rest -= {"weight", *reference.quantized}
    for suffix in sorted(rest):
        info = module.tensors.get(suffix)
        if info is None:
            missing = reference.tensors[suffix].name
            tally.add(PARENT_TENSOR_MISSING, missing, f"{missing} of the parent is missing")
        else:
            parent_info = reference.tensors[suffix]
            sides.append((info.name, plain(info, readers[0]), plain(parent_info, readers[1])))
    for name, weight, original in sides:
        if weight is None or original is None:
            why = "its layout cannot be dequantized here"
            tally.add(WEIGHT_NOT_COMPARED, name, f"{name} was not compared: {why}")
        elif weight.shape != original.shape:
            message = f"{name} is {list(weight.shape)}; the parent's is {list(original.shape)}"
            tally.add(KEPT_TENSOR_DIFFERS, name, message)
        else:
            yield _pair(parent, weight, original)


def _pair(parent: ModuleView, weight: Matrix, reference: Matrix) -> Pair:
    meaning = parent.family.classify(reference.name) if parent.family else None
    if meaning is None:
        return Pair(weight, reference, "unknown", None, None)
    return Pair(weight, reference, meaning.row.role.value, meaning.layer, meaning.expert)


def compare_pairs(
    todo: list[Pair],
    *,
    hub: bool,
    workers: int,
    done: Callable[[Difference], None],
    emit: Emit = silent,
    skipped: int = 0,
) -> None:
    """Compare pairs, and pass every result to `done`, in order, in the calling thread.

    `hub`: reads are requests, so reads are larger. `skipped` bytes count as done. Raises
    SourceError if data cannot be read, or if a file changes meanwhile.
    """
    total = skipped + sum(pair.nbytes for pair in todo)

    def work(number: int) -> Difference:
        for later in todo[number + _AHEAD : number + _AHEAD + 1]:
            later.weight.prefetch()
            later.reference.prefetch()
        return difference(todo[number], pool.scratch, _HUB_TILE if hub else _TILE)

    bytes_done = bytes_shown = skipped
    with Workers(workers) as pool:
        for pair, result in zip(todo, pool.map(work, range(len(todo))), strict=True):
            done(result)
            bytes_done += pair.nbytes
            if bytes_done - bytes_shown >= _EVENT_BYTES or bytes_done == total:
                bytes_shown = bytes_done
                emit(Progress("compare", bytes_done, total))


def difference(pair: Pair, scratch: Scratch, tile: int = _TILE) -> Difference:
    """Return the difference of one pair. Raises SourceError as `compare_pairs`."""
    weight, parent = pair.weight, pair.reference
    result = partial(
        Difference,
        name=parent.name,
        role=pair.role,
        layer=pair.layer,
        expert=pair.expert,
        form=weight.format,
        parent_form=parent.format,
        elements=parent.shape[0] * parent.shape[1],
    )
    plain_both = (
        isinstance(weight, Plain) and isinstance(parent, Plain) and weight.format == parent.format
    )
    if plain_both and _equal(weight, parent, scratch, tile):
        return result(identical=True)
    sums, worst, largest = np.zeros(SUMS), None, 0.0
    rows, columns = parent.shape
    step = max(1, tile // max(columns, 1))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        blocks = scratch.floats("blocks", (last - first, -(-columns // GROUP)))
        parents = _add(pair, first, last, sums, blocks, scratch)
        row, block = divmod(int(blocks.argmax()), blocks.shape[1])  # argmax takes the first NaN
        if not blocks[row, block] <= largest:
            largest, at = float(blocks[row, block]), block * GROUP
            power = float(np.square(parents(row)[at : at + GROUP], dtype=np.float64).sum())
            worst = (first + row, at, (largest / power) ** 0.5 if power else float("inf"))
    for side in (weight, parent):
        side.check()
    error, power, own = sums.tolist()
    return result(identical=False, error=error, power=power, own=own, worst=worst)


def _add(
    pair: Pair, first: int, last: int, sums: Array, blocks: Floats, scratch: Scratch
) -> Callable[[int], Floats]:
    """Add the sums of some rows; return a function that gives a row of the parent.

    The function is valid until the next use of `scratch`.
    """
    weight, parent, shape = pair.weight, pair.reference, (last - first, pair.reference.shape[1])
    with np.errstate(all="ignore"):  # broken scales overflow, and the sums become infinite or NaN
        if isinstance(weight, Nvfp4) and isinstance(parent, Plain) and parent.format == "BF16":
            words = parent.raw(first, last, scratch).view("<u2").reshape(shape)
            add_nvfp4_sums(words, weight.stored(first, last, scratch), sums, blocks)
            return lambda row: floats(words[row].tobytes(), "BF16")
        x, y = scratch.floats("reference", shape), scratch.floats("mine", shape)
        parent.read(first, last, x, scratch)
        weight.read(first, last, y, scratch)
        add_sums(x, y, sums, blocks)
        return lambda row: cast(Floats, x[row])


def _equal(weight: Matrix, reference: Matrix, scratch: Scratch, tile: int) -> bool:
    (info,), (original,) = weight.tensors, reference.tensors
    for start in range(0, info.nbytes, 2 * tile):
        count = min(2 * tile, info.nbytes - start)
        buffer, parent_buffer = scratch.bytes("mine", count), scratch.bytes("reference", count)
        read_part(weight.reader, info, start, buffer.data)
        read_part(reference.reader, original, start, parent_buffer.data)
        if not np.array_equal(buffer, parent_buffer):
            return False
    return True
