"""Fixtures: a small checkpoint of two shards."""

from pathlib import Path

import pytest

from make import make_checkpoint


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "src")
