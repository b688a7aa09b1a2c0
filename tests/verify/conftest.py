"""Fixtures: a good checkpoint and its parent. Tests break copies of the two."""

from pathlib import Path

import pytest

from make import make_checkpoint
from run import quantize_nvfp4


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("parent") / "src")


@pytest.fixture(scope="session")
def good(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "good"
    return quantize_nvfp4(parent, out, shard_bytes=60_000)
