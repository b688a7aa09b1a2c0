"""Digests of a checkpoint's files, computed in parallel and with progress."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Event, Lock
from typing import Final

from mquant.checkpoint.reader import RangeReader, Reader, reader_of
from mquant.checkpoint.source import Source
from mquant.events import Emit, Progress

_PIECE: Final = 2_000_000
_MOST_THREADS: Final = 16
_GIT_DIGITS: Final = 40


def sha256_of(source: Source, sizes: Mapping[str, int], emit: Emit) -> Iterator[tuple[str, str]]:
    """Yield the name and sha256 of each file, in order.

    `sizes` has the bytes of each file. Raises what reading the source raises.
    """
    yield from _digests(source, dict.fromkeys(sizes, ""), emit)


def differing(source: Source, known: Mapping[str, str], emit: Emit) -> Iterator[tuple[str, str]]:
    """Yield the name and digest of each file whose bytes do not have the digest in `known`.

    A known digest of 40 digits is git's id of the file, a digest of 64 digits is the sha256.
    """
    for path, digest in _digests(source, known, emit):
        if digest != known[path]:
            yield path, digest


def _digests(source: Source, known: Mapping[str, str], emit: Emit) -> Iterator[tuple[str, str]]:
    """Yield the name and digest of each file; the known digest says which kind of digest."""
    lock, stopped = Lock(), Event()
    total, done = sum(source.files[path] for path in known), 0

    def tell(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            emit(Progress("hash", done, total))

    def digest_of(path: str) -> str:
        size, git = source.files[path], len(known[path]) == _GIT_DIGITS
        digest = hashlib.sha1(b"blob %d\0" % size) if git else hashlib.sha256()  # noqa: S324 -- git's id
        buffer = memoryview(bytearray(min(size, _PIECE)))
        for start in range(0, size, _PIECE):
            if stopped.is_set():
                break
            part = buffer[: min(_PIECE, size - start)]
            reader.read_into(path, start, part)
            digest.update(part)
            tell(len(part))
        return digest.hexdigest()

    reader: Reader | RangeReader
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    with closing(reader_of(source)) as reader, ThreadPoolExecutor(threads) as pool:
        try:
            yield from zip(known, pool.map(digest_of, known), strict=True)
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
