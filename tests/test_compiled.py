"""Compiled code is cached; whatever happens to the cache, functions are compiled and run."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest

from mquant.compiled import compiled


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def doubled() -> int:
    """Compile a function, or read it from the cache; return how often the cache was read."""
    function: Any = compiled(_double)
    assert function(21) == 42
    return sum(function.stats.cache_hits.values())


def _double(x: int) -> int:
    return 2 * x


def _half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _zeros(file: Path) -> None:
    _half(file)
    os.truncate(file, 2 * file.stat().st_size)


def _flipped(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-len(raw) // 3] ^= 0x55
    file.write_bytes(raw)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize(
    "damage",
    [_half, _zeros, _flipped, lambda file: file.write_bytes(b""), Path.unlink],
    ids=["half", "zeros", "flipped", "empty", "gone"],
)
def test_a_damaged_file_is_compiled_again_and_replaced(
    cache: Path, suffix: str, damage: Callable[[Path], object]
) -> None:
    assert (doubled(), doubled()) == (0, 1)
    (file,) = cache.rglob(f"*.{suffix}")
    damage(file)
    assert (doubled(), doubled()) == (0, 1)


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_what_cannot_be_deleted_costs_only_time(cache: Path, suffix: str) -> None:
    doubled()
    (file,) = cache.rglob(f"*.{suffix}")
    _folder(file)
    assert doubled() == 0


def test_a_full_disk_costs_only_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert (doubled(), doubled()) == (0, 0)


def test_without_a_folder_that_can_be_written_each_run_compiles(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    assert (doubled(), doubled()) == (0, 0)
    assert not list(cache.rglob("*.nb*"))
