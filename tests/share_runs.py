"""Runs in shares in tests: a source, the files that a run writes, and a folder of done shares."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from judges import hashes
from make import make_checkpoint
from mquant.errors import MquantError
from run import quantize_nvfp4, shares_of

SMALL = 20_000
"""The bytes of an output shard, so that a small checkpoint gets several shards."""


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in three shards, with a side file."""
    src = make_checkpoint(tmp_path_factory.mktemp("small") / "src", layers=2, experts=4, shards=3)
    (src / "tokenizer.json").write_text("{}")
    return src


@pytest.fixture(scope="module")
def expected(src: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file's hash after a run of one process."""
    return hashes(quantize_nvfp4(src, tmp_path_factory.mktemp("whole") / "out", shard_bytes=SMALL))


@pytest.fixture(scope="module")
def done(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OUT whose three shares are done; tests take copies."""
    out = tmp_path_factory.mktemp("made") / "out"
    for number in (2, 3, 1):
        shares_of(src, out, 3, SMALL).make(number)
    return out


def copy(folder: Path, path: Path) -> Path:
    """Copy a folder, and return the path of the copy."""
    shutil.copytree(folder, path)
    return path


def refused(error: type[MquantError], run: Any, *arguments: Any) -> MquantError:
    """Return the error of a call, and assert that the error has a fix."""
    with pytest.raises(error) as caught:
        run(*arguments)
    assert caught.value.fix
    return caught.value
