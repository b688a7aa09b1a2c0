"""Output shards: sizes and places known beforehand, whole under their final name or not there.

A shard is written as `NAME.partial`: header first, every tensor at its planned offset in any
order, then fsync and rename. A crash leaves partials, never a shard that only looks whole.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from mquant.checkpoint import Source
from mquant.errors import EngineError, OutputError
from mquant.events import Emit, Progress, silent
from mquant.findings import size
from mquant.plan import Action, Output, Plan, ShardJob

PARTIAL: Final = ".partial"
COPY_BYTES: Final = 16 * 1024 * 1024


class ShardWriter:
    """One output shard being written."""

    def __init__(self, out: Path, shard: ShardJob) -> None:
        self.shard = shard
        self._final = out / shard.name
        self._partial = out / (shard.name + PARTIAL)
        header, self._offsets = shard.layout
        self._missing: dict[str, Output] = {o.name: o for job in shard.jobs for o in job.outputs}
        with out_of_space(self._partial, shard.file_bytes):
            self._file = os.open(self._partial, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
            try:
                preallocate(self._file, shard.file_bytes)
                _pwrite(self._file, header, 0)
            except BaseException:
                os.close(self._file)
                raise

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        """Write one tensor's bytes; returns how many.

        Raises EngineError for a tensor that is not planned here, was written before, or has
        another size than planned.
        """
        output = self._missing.pop(name, None)
        if output is None:
            raise EngineError(f"The engine made {name}, which {self.shard.name} does not await.")
        offset = written = self._offsets[name]
        with out_of_space(self._partial, self.shard.file_bytes):
            for chunk in chunks:
                written += _pwrite(self._file, chunk, written)
        if written - offset != output.nbytes:
            raise EngineError(
                f"{name} came out with {written - offset:,} bytes; {output.nbytes:,} were planned."
            )
        return output.nbytes

    def close(self) -> None:
        """Put the shard under its final name, on disk. Raises EngineError if it is not whole."""
        if self._missing:
            name = next(iter(self._missing))
            raise EngineError(f"The engine did not make {name} of {self.shard.name}.")
        with out_of_space(self._partial, self.shard.file_bytes):
            os.fsync(self._file)
            os.close(self._file)
            self._partial.rename(self._final)
            fsync_folder(self._final.parent)

    def abandon(self) -> None:
        """Close the file and leave the partial."""
        os.close(self._file)


class ShardSet:
    """All output shards of a plan. A shard is finished as soon as its last tensor is made.

    Engines hand in quantized tensors, in any order; tensors that are copied come from the source.
    """

    def __init__(self, out: Path, plan: Plan, emit: Emit = silent) -> None:
        self._out = out
        self._plan = plan
        self._source = plan.survey.checkpoint.source
        self._emit = emit
        self._open: dict[str, ShardWriter] = {}
        self._place: dict[str, ShardJob] = {}
        self._awaited: dict[str, int] = {}
        for shard in plan.shards:
            made = [o.name for a in _actions(shard) if a.scheme for o in a.outputs]
            self._place.update(dict.fromkeys(made, shard))
            self._awaited[shard.name] = len(made)
        self._done = 0

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Take one tensor of a quantized module: its name in the output, its bytes."""
        shard = self._place.get(name)
        if shard is None:
            raise EngineError(f"The engine made {name}, which is not in the plan.")
        if shard.name not in self._open:
            self._open[shard.name] = ShardWriter(self._out, shard)
        self._count(self._open[shard.name].write(name, [data]))
        self._awaited[shard.name] -= 1
        if not self._awaited[shard.name]:
            self._complete(shard)

    def finish(self) -> None:
        """Write the shards that only copy. Raises EngineError where a planned tensor is missing."""
        for shard in self._plan.shards:
            if shard.name in self._open or not any(a.scheme for a in _actions(shard)):
                self._complete(shard)

    def abandon(self) -> None:
        """Close what is open; the partials stay, to be dropped by the next run."""
        for writer in self._open.values():
            writer.abandon()
        self._open.clear()

    def _complete(self, shard: ShardJob) -> None:
        writer = self._open.get(shard.name) or ShardWriter(self._out, shard)
        self._open[shard.name] = writer
        for action in _actions(shard):
            if action.scheme is None:
                self._count(writer.write(action.source.name, _read(self._source, action)))
        writer.close()
        del self._open[shard.name]

    def _count(self, written: int) -> None:
        self._done += written
        self._emit(Progress("quantize", self._done, self._plan.output_bytes))


def preallocate(file: int, size: int) -> None:
    """Reserve `size` bytes, so that a full disk shows before the work is done."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(file, size)


class out_of_space:  # noqa: N801  (a context manager reads as a phrase)
    """Turn OSErrors of the output folder into one sentence."""

    def __init__(self, path: Path, needed: int) -> None:
        self._path = path
        self._needed = needed

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise OutputError in place of an OSError."""
        if not isinstance(error, OSError):
            return
        name = self._path.name.removesuffix(PARTIAL)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"The disk is full: {name} needs {size(self._needed)} in {self._path.parent}.",
                "Free space, then run the same command again.",
            ) from error
        raise OutputError(
            f"{self._path.parent} cannot be written ({name}: {error.strerror}).",
            "Check the folder and the disk, then run the same command again.",
        ) from error


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _actions(shard: ShardJob) -> Iterator[Action]:
    return (action for job in shard.jobs for action in job.actions)


def _read(source: Source, action: Action) -> Iterator[bytes]:
    info = action.source
    for start in range(info.start, info.end, COPY_BYTES):
        yield source.read(info.shard, start, min(start + COPY_BYTES, info.end))


def _pwrite(file: int, data: bytes | memoryview, offset: int) -> int:
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):  # pwrite stops at 2 GiB
        done += os.pwrite(file, view[done:], offset + done)
    return done


__all__ = ["PARTIAL", "ShardSet", "ShardWriter", "fsync_folder", "out_of_space"]
