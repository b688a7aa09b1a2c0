"""`Reader` fills whole buffers from files, and names every failure in one sentence."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mquant.checkpoint import Folder, Reader
from mquant.errors import SourceError

DATA = np.random.default_rng(0).bytes(100_000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def reader(file: Path) -> Iterator[Reader]:
    reader = Reader(Folder(file.parent))
    yield reader
    reader.close()


def read(reader: Reader, start: int, count: int) -> bytes:
    buffer = bytearray(count)
    reader.read_into("model.safetensors", start, memoryview(buffer))
    return bytes(buffer)


def test_a_buffer_is_filled_from_any_place(reader: Reader) -> None:
    assert read(reader, 0, 100_000) == DATA
    assert read(reader, 777, 1000) == DATA[777:1777]
    assert read(reader, 100_000, 0) == b""


def test_a_read_that_returns_in_parts_is_joined(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: whole(file, [views[0][:999]], at))
    assert read(reader, 5, 5000) == DATA[5:5005]


def test_threads_read_at_once(reader: Reader) -> None:
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda start: read(reader, start, 100), range(0, 100_000, 100))
        assert b"".join(parts) == DATA


def test_a_file_that_shrank_is_one_sentence(reader: Reader, file: Path) -> None:
    os.truncate(file, 500)
    with pytest.raises(SourceError) as caught:
        read(reader, 400, 200)
    assert caught.value.message == "model.safetensors ends at byte 500; 600 were expected."
    assert caught.value.fix == (
        "The file changed while it was read: wait until nothing writes to it, then run "
        "the same command again."
    )


def test_a_read_error_of_the_disk_is_one_sentence(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(SourceError) as caught:
        read(reader, 4096, 10)
    assert caught.value.message == (
        "model.safetensors cannot be read at byte 4,096: Input/output error."
    )


def test_a_deleted_file_is_one_sentence(reader: Reader, file: Path) -> None:
    file.unlink()
    with pytest.raises(SourceError, match=r"model\.safetensors cannot be read: No such file"):
        read(reader, 0, 1)


def test_an_unchanged_file_passes_the_check(reader: Reader) -> None:
    read(reader, 0, 1)
    reader.check("model.safetensors")


@pytest.mark.parametrize("change", ["touch", "grow", "shrink"])
def test_a_file_that_changed_fails_the_check(reader: Reader, file: Path, change: str) -> None:
    read(reader, 0, 1)
    if change == "touch":
        os.utime(file, ns=(0, 12345))
    else:
        os.truncate(file, 100_001 if change == "grow" else 99_999)
    with pytest.raises(SourceError, match="changed while it was read"):
        reader.check("model.safetensors")


def test_prefetching_never_fails(reader: Reader, file: Path) -> None:
    reader.prefetch("model.safetensors", 0, 10**9)
    reader.prefetch("no such file", 0, 10)
    assert read(reader, 0, 10) == DATA[:10]
