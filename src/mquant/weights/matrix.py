"""Read weights as float32 rows into the caller's buffers, decoded at the speed of the disk.

`loader_model` defines the formats; `stored_weight` checks whether a module's parts fit, and decodes
the rarer formats. The arithmetic is that of `decode`, without any of `numerics`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from threading import local
from typing import Any, Final, Self, TypeVar, cast

import numpy as np
from threadpoolctl import threadpool_limits

from mquant.checkpoint import RangeReader, Reader, TensorInfo
from mquant.checkpoint.slices import read_part, read_whole
from mquant.loader_model.modules import Module, ModuleView
from mquant.loader_model.storage import (
    E4M3S,
    MXFP4S,
    NVFP4S,
    SUFFIXES,
    StorageFormat,
    Suffixes,
)
from mquant.weights.decode import READABLE, Bytes, Floats, floats
from mquant.weights.kernels import Stored, unpack_bf16, unpack_e4m3, unpack_mxfp4, unpack_nvfp4
from mquant.weights.stored_weight import StoredWeight, byte_block, scale_dtype, weight_of

T = TypeVar("T")
R = TypeVar("R")
AnyReader = Reader | RangeReader
_AHEAD: Final = 64 << 20


@dataclass(frozen=True)
class Matrix(ABC):
    """A weight [rows, columns] on disk. Any number of threads may read, each with its own Scratch.

    `name` is the module's, or a plain tensor's; `format` is a dtype or a layout's name; `shape` is
    [rows, columns] after decoding; `tensors` are the stored tensors.
    """

    name: str
    format: str
    shape: tuple[int, int]
    tensors: tuple[TensorInfo, ...]
    reader: AnyReader

    @abstractmethod
    def read(self, first: int, last: int, out: Floats, scratch: "Scratch") -> None:
        """Read rows [first, last) into `out`, [last - first, columns]. Raises SourceError."""

    def prefetch(self) -> None:
        """Ask the system to read ahead, at most the first 64 MiB of each tensor."""
        for info in self.tensors:
            self.reader.prefetch(info.shard, info.start, min(info.end, info.start + _AHEAD))

    def check(self) -> None:
        """Raise SourceError if a file changed after the checkpoint was opened."""
        for path in {info.shard for info in self.tensors}:
            self.reader.check(path)


class Scratch:
    """A thread's reusable buffers: fresh memory is slower than the disk."""

    def __init__(self) -> None:
        self._buffers: dict[str, Bytes] = {}

    def bytes(self, use: str, count: int) -> Bytes:
        """Return a buffer of `count` bytes; the same `use` gets the same memory."""
        buffer = self._buffers.get(use)
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[use] = np.empty(count, np.uint8)
        return buffer[:count]

    def floats(self, use: str, shape: tuple[int, ...]) -> Floats:
        """Return a float32 buffer of a shape; the same `use` gets the same memory."""
        count = int(np.prod(shape, dtype=np.int64)) * 4
        flat: Floats = self.bytes(use, count).view(np.float32)
        return flat.reshape(shape)


class Plain(Matrix):
    """A tensor of plain numbers. A vector is one row."""

    def raw(self, first: int, last: int, scratch: Scratch) -> Bytes:
        """Return the bytes of rows [first, last), read into `scratch`."""
        return _rows(self.reader, self.tensors[0], self.shape[0], first, last, scratch)

    def read(self, first: int, last: int, out: Floats, scratch: Scratch) -> None:
        """Read rows as float32."""
        raw = self.raw(first, last, scratch)
        if self.format == "BF16":
            unpack_bf16(raw.view("<u2"), out.reshape(-1))
        else:
            out[:] = floats(raw.tobytes(), self.format).reshape(out.shape)


class Workers:
    """Threads that each keep a Scratch. A context manager that ends the threads.

    In the context, BLAS uses one thread a call: the workers share the cores, and a product has the
    same bytes whatever the number of cores and workers.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        # Broken weights overflow: callers look at the result, and need no warnings.
        self._pool = ThreadPoolExecutor(count, initializer=np.seterr, initargs=("ignore",))
        self._local = local()
        self._blas = ExitStack()

    @property
    def scratch(self) -> Scratch:
        """The calling thread's Scratch."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        scratch: Scratch = self._local.scratch
        return scratch

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Return the results in the order of `items`; all items are submitted at once."""
        return self._pool.map(function, items)

    def __enter__(self) -> Self:
        self._blas.enter_context(threadpool_limits(1, "blas"))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._blas.close()


@dataclass(frozen=True)
class _Stored(Matrix):
    """The base of the quantized layouts."""

    weight: StoredWeight

    @property
    def _suffixes(self) -> Suffixes:
        return SUFFIXES[self.weight.format or StorageFormat.NVFP4]

    def _part(self, suffix: str, first: int, last: int, scratch: Scratch, use: str = "") -> Bytes:
        info = self.weight.module.tensors[suffix]
        return _rows(self.reader, info, info.shape[0], first, last, scratch, use)

    def _values(self, suffix: str) -> Floats:
        info = self.weight.module.tensors[suffix]
        raw = np.empty(info.nbytes, np.uint8)
        read_whole(self.reader, info, raw.data)
        return floats(raw.tobytes(), scale_dtype(info))


class Nvfp4(_Stored):
    """E2M1 codes, E4M3 scales, one number: compressed-tensors' divisor, or ModelOpt's factor."""

    def stored(self, first: int, last: int, scratch: Scratch) -> Stored:
        """Return the stored rows [first, last), read into `scratch`."""
        packed = self._part(self._suffixes.codes, first, last, scratch).reshape(last - first, -1)
        scales = self._part(self._suffixes.scale, first, last, scratch).reshape(last - first, -1)
        return packed, scales, self._factor

    def read(self, first: int, last: int, out: Floats, scratch: Scratch) -> None:
        """Read and decode rows."""
        packed, scales, factor = self.stored(first, last, scratch)
        unpack_nvfp4(packed.reshape(-1), scales.reshape(-1), factor, out.reshape(-1))

    @cached_property
    def _factor(self) -> float:
        second = self._values(self._suffixes.second)[0]
        if self.weight.format is StorageFormat.MODELOPT_NVFP4:
            return float(second)
        with np.errstate(all="ignore"):  # a scale of zero gives infinity
            return float(np.float64(1) / np.float64(second))


class _Mxfp4(_Stored):
    """E2M1 codes under E8M0 scales."""

    def read(self, first: int, last: int, out: Floats, scratch: Scratch) -> None:
        """Read and decode rows."""
        packed = self._part(self._suffixes.codes, first, last, scratch)
        # Codes and scales may have the same dtype, and so the same buffer.
        scales = self._part(self._suffixes.scale, first, last, scratch, "scales")
        unpack_mxfp4(packed.view(np.uint8), scales.view(np.uint8), out.reshape(-1))


class _Fp8(_Stored):
    """E4M3 codes with one scale for the tensor, for each row, or for each block."""

    def read(self, first: int, last: int, out: Floats, scratch: Scratch) -> None:
        """Read and decode rows."""
        unpack_e4m3(self._part("weight", first, last, scratch), out.reshape(-1))
        scales, (high, wide) = self._scales
        start = first
        while start < last:  # rows under the same scales
            end = min(last, (start // high + 1) * high)
            row = np.repeat(scales[start // high], wide)[: out.shape[1]]
            out[start - first : end - first] *= row
            start = end

    @cached_property
    def _scales(self) -> tuple[Floats, tuple[int, int]]:
        """The scales, and how many rows and columns share one scale."""
        rows, columns = self.shape
        tensors = self.weight.module.tensors
        suffix = self._suffixes.scale
        values, info = self._values(suffix), tensors[suffix]
        if info.elements == 1:
            return values.reshape(1, 1), (rows, columns)
        if info.shape in ((rows,), (rows, 1)):
            return values.reshape(rows, 1), (1, columns)
        return values.reshape(info.shape), byte_block(
            self.weight.format, self.shape, self.weight.view
        )


class _Other(_Stored):
    """Every other layout that `stored_weight` can decode."""

    def read(self, first: int, last: int, out: Floats, scratch: Scratch) -> None:
        """Read and decode rows."""
        out[:] = self.weight.rows(first, last).values


def plain(info: TensorInfo, reader: AnyReader) -> Plain | None:
    """Return a tensor as stored; None if its dtype cannot be read."""
    if info.dtype not in READABLE:
        return None
    columns = info.shape[-1] if info.shape else 1
    rows = info.elements // columns if columns else 0
    return Plain(info.name, info.dtype, (rows, columns), (info,), reader)


def matrix_of(view: ModuleView, module: Module, reader: AnyReader) -> Matrix | None:
    """Return a module's `weight`; None if there is no weight that can be decoded."""
    if not module.quantized:
        info = module.tensors.get("weight")
        return plain(info, reader) if info else None
    weight = weight_of(view, module)
    if weight is None or weight.format is None:
        return None
    kind: Any = _Other
    if weight.format in NVFP4S:
        kind = Nvfp4
    elif weight.format in MXFP4S:
        kind = _Mxfp4
    elif weight.format in E4M3S:
        kind = _Fp8
    name, tensors = f"{module.name}.weight", tuple(module.tensors.values())
    return cast(Matrix, kind(name, weight.format.short, weight.shape, tensors, reader, weight))


def _rows(
    reader: AnyReader,
    info: TensorInfo,
    rows: int,
    first: int,
    last: int,
    scratch: Scratch,
    use: str = "",
) -> Bytes:
    """Return the bytes of rows [first, last) of a tensor that has `rows` rows.

    The buffer is that of `use`, or of the tensor's dtype.
    """
    row = info.nbytes // rows if rows else 0
    raw = scratch.bytes(use or info.dtype, (last - first) * row)
    read_part(reader, info, first * row, raw.data)
    return raw
