"""Fixtures: small checkpoints to plan."""

from pathlib import Path

import pytest

from make import make_checkpoint
from plan.planning import Make


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "src", shards=3)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda **options: make_checkpoint(tmp_path / "src", **options)
