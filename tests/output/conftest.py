"""A plan of several small shards, and an OUT whose ledger is open."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from make import make_checkpoint
from mquant.output import Ledger
from mquant.plan import Plan
from run import plan_of


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of(make_checkpoint(tmp_path / "src", shards=3), max_shard_bytes=20_000)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def ledger(out: Path) -> Iterator[Ledger]:
    ledger = Ledger(out)
    ledger.begin({"plan": "aa"}, [], afresh=True)
    yield ledger
    ledger.release()
