"""A run that was killed, interrupted or short of disk resumes with the same command."""

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from judges import hashes
from killed import run_and_die, run_and_kill
from make import make_checkpoint
from mquant.checkpoint import Folder
from mquant.errors import MquantError, OutputError, SourceError
from mquant.events import Event, Progress
from mquant.output import LEDGER
from mquant.output.ledger import read_ledger
from run import plan_of, quantize_nvfp4

SMALL = 20_000
"""The bytes of an output shard, so that a small checkpoint gets several shards."""


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small") / "src", layers=1, experts=2, shards=3)


@pytest.fixture(scope="module")
def expected(src: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file's hash after a run without a fault."""
    return hashes(quantize_nvfp4(src, tmp_path_factory.mktemp("whole") / "out", shard_bytes=SMALL))


@pytest.fixture(scope="module")
def units(src: Path) -> int:
    return sum(len(shard.units) for shard in plan_of(src, max_shard_bytes=SMALL).shards)


def resume(src: Path, out: Path) -> int:
    """Run again to the end, and return the source's bytes that were done before."""
    events: list[Event] = []
    quantize_nvfp4(src, out, events.append, SMALL)
    return next(event.done for event in events if isinstance(event, Progress))


# --- SIGKILL


@pytest.mark.parametrize("counted", [True, False])
def test_a_rerun_after_a_kill_at_any_job_writes_the_same_bytes(
    src: Path, expected: dict[str, str], units: int, tmp_path: Path, *, counted: bool
) -> None:
    before, last = hashes(src), 0
    for unit in range(1, units + 1):
        out = tmp_path / f"killed-{unit}"
        assert run_and_die(src, out, SMALL, unit, counted=counted) == -signal.SIGKILL
        assert not (out / "config.json").exists()
        done = resume(src, out)
        assert hashes(out) == expected
        assert done > last if counted else done >= last
        last = done
    assert hashes(src) == before


def test_a_run_that_is_killed_at_every_job_can_be_finished(
    src: Path, expected: dict[str, str], units: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for unit in range(units):
        assert run_and_die(src, out, SMALL, 1, counted=True) == -signal.SIGKILL
        ledger = read_ledger(out)
        assert ledger is not None
        assert len(ledger.units) == unit + 1
    resume(src, out)
    assert hashes(out) == expected


LARGER = 10_000_000


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("larger") / "src",
        layers=2,
        experts=24,
        hidden=1024,
        intermediate=1024,
        shards=3,
    )


@pytest.fixture(scope="module")
def larger_expected(larger: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return hashes(quantize_nvfp4(larger, out, shard_bytes=LARGER))


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_moments_writes_the_same_bytes(
    larger: Path, larger_expected: dict[str, str], tmp_path: Path, seed: int
) -> None:
    moments = random.Random(seed)  # noqa: S311  (no secret)
    out, killed = tmp_path / "out", 0
    for _ in range(12):
        code = run_and_kill(larger, out, LARGER, moments.uniform(0, 0.25))
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        assert (out / LEDGER).exists() != (code == 0)
    assert killed > 1
    quantize_nvfp4(larger, out, shard_bytes=LARGER)
    assert hashes(out) == larger_expected


# --- faults, each during the run


E = TypeVar("E", bound=BaseException)


def fail(src: Path, out: Path, error: type[E], during: Callable[[], object], after: int = 3) -> E:
    """Quantize, call `during` when `after` jobs are done, and return the error that follows."""
    units = 0

    def emit(event: Event) -> None:
        nonlocal units
        units += isinstance(event, Progress) and event.stage == "quantize"
        if units == after:
            during()

    with pytest.raises(error) as caught:
        quantize_nvfp4(src, out, emit, SMALL, workers=1)
    assert not (out / "config.json").exists()
    return caught.value


def stop() -> None:
    raise KeyboardInterrupt


def failing(
    monkeypatch: pytest.MonkeyPatch, name: str, code: int, after: int
) -> Callable[[], None]:
    """Return a function that makes `os.NAME` fail after `after` more calls."""
    real = getattr(os, name)
    calls = 0

    def call(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    return lambda: monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("pwrite", 0),
        ("pwrite", 2),
        ("posix_fallocate", 0),
        ("write", 1),  # the ledger
        ("fsync", 0),
        ("fsync", 1),
    ],
)
def test_a_disk_that_fills_up_is_one_sentence_and_the_rerun_resumes(
    src: Path, expected: dict[str, str], tmp_path: Path, name: str, after: int
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        error = fail(src, out, OutputError, failing(patch, name, errno.ENOSPC, after))
    assert error.message.startswith("The disk is full: ")
    assert error.fix == "Free space, then run the same command again."
    resume(src, out)
    assert hashes(out) == expected


def test_bytes_that_cannot_be_read_are_one_sentence_and_the_rerun_resumes(
    src: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out, preadv = tmp_path / "out", os.preadv

    def bad_sector(file: int, buffers: list[memoryview], at: int) -> int:
        if Path(f"/proc/self/fd/{file}").readlink().parent == src:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, buffers, at)

    with pytest.MonkeyPatch.context() as patch:
        error = fail(src, out, SourceError, lambda: patch.setattr(os, "preadv", bad_sector))
    assert error.message.endswith(": Input/output error.")
    assert resume(src, out) > 0
    assert hashes(out) == expected


@pytest.fixture
def copy(src: Path, tmp_path: Path) -> Path:
    return shutil.copytree(src, tmp_path / "copy")


def test_a_file_that_shrinks_and_comes_back_is_read_again(
    copy: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out, shard = tmp_path / "out", copy / "model-00003-of-00003.safetensors"
    whole = shard.read_bytes()
    error = fail(copy, out, SourceError, lambda: os.truncate(shard, 1000))
    assert error.message.startswith(f"{shard.name} ends at byte 1,000; ")
    shard.write_bytes(whole)
    assert resume(copy, out) > 0
    assert hashes(out) == expected


def test_a_file_written_to_during_the_run_stops_it(
    copy: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out, shard = tmp_path / "out", copy / "model-00003-of-00003.safetensors"
    error = fail(copy, out, SourceError, lambda: os.utime(shard, (1, 1)))
    assert error.message == f"{shard.name} changed while it was read."
    assert resume(copy, out) > 0
    assert hashes(out) == expected


def test_jobs_made_from_a_file_that_changed_since_are_made_again(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", layers=1, hidden=512, intermediate=256, shards=3)
    out, shard = tmp_path / "out", src / "model-00001-of-00003.safetensors"
    identity = Folder(src).identity()
    fail(src, out, KeyboardInterrupt, stop, after=9)
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 64 * 40 - 1] ^= 1
    shard.write_bytes(whole)
    assert Folder(src).identity() == identity, "no sample is taken there"
    resume(src, out)
    assert hashes(out) == hashes(quantize_nvfp4(src, tmp_path / "new", shard_bytes=SMALL))


def test_an_output_folder_that_vanishes_is_one_sentence(
    src: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    error = fail(src, out, OutputError, lambda: shutil.rmtree(out))
    assert error.message in {
        f"{out} was deleted or replaced during the run.",
        f"{out} cannot be written (model-00001-of-00003.safetensors: No such file or directory).",
    }
    resume(src, out)
    assert hashes(out) == expected


def test_a_second_run_into_the_same_folder_is_refused_and_changes_nothing(
    src: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out, refused = tmp_path / "out", list[MquantError]()

    def emit(event: Event) -> None:
        if isinstance(event, Progress) and not refused:
            with pytest.raises(OutputError) as caught:
                quantize_nvfp4(src, out, shard_bytes=SMALL)
            refused.append(caught.value)

    quantize_nvfp4(src, out, emit, SMALL)
    assert refused[0].message == f"Another mquant is writing into {out}."
    assert hashes(out) == expected
