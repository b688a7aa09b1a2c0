"""sha256 of a checkpoint's files, with progress."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Final

from mquant.checkpoint import Source
from mquant.events import Emit, Progress

_PIECE: Final = 16_000_000


def sha256_of(source: Source, sizes: Mapping[str, int], emit: Emit) -> Iterator[tuple[str, str]]:
    """Yield the name and sha256 of each file; each file is read lazily.

    `sizes` has the bytes of each file. Raises what reading the source raises.
    """
    total, done = sum(sizes.values()), 0
    for name, size in sizes.items():
        digest = hashlib.sha256()
        for start in range(0, size, _PIECE):
            piece = source.read(name, start, min(start + _PIECE, size))
            digest.update(piece)
            done += len(piece)
            emit(Progress("hash", done, total))
        yield name, digest.hexdigest()
