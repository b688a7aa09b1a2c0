"""A `ShardSet` writes tensors at planned places, and names a shard only when it is complete."""

import errno
import os
import random
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from make import make_checkpoint
from mquant.errors import EngineError, OutputError
from mquant.events import Event, Progress
from mquant.output import PARTIAL, Ledger, ShardObserver, ShardSet
from mquant.output.ledger import read_ledger
from mquant.plan import Plan, ShardPlan
from output.shard_runs import assert_whole, do, fill, outputs, stamps
from plan.planning import with_odd_norm
from run import plan_of


def test_every_planned_tensor_is_written_to_its_shard(
    plan: Plan, out: Path, ledger: Ledger
) -> None:
    shards = ShardSet(out, plan, ledger)
    for output in reversed(outputs(plan)):  # in any order
        shards.write(output.name, fill(output))
    shards.finish()
    assert_whole(out, plan, shards.digests)
    for shard in plan.shards:
        assert (out / shard.name).stat().st_size == shard.file_bytes
        with safe_open(out / shard.name, framework="np") as file:
            assert set(file.keys()) == {o.name for unit in shard.units for o in unit.outputs}


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_pieces_of_any_size_write_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    plan = plan_of(make_checkpoint(folder / "src", layers=1), max_shard_bytes=20_000)
    ledger, dice = Ledger(folder / "out"), random.Random(seed)  # noqa: S311 -- not a secret
    shards = ShardSet(folder / "out", plan, ledger)
    for output in outputs(plan):
        content, done = fill(output), 0
        while done < len(content):
            end = min(len(content), done + dice.randrange(1, 3000))
            shards.write(output.name, content[done:end])
            done = end
    shards.finish()
    ledger.release()
    assert_whole(folder / "out", plan, shards.digests)


def test_threads_write_at_once(plan: Plan, out: Path, ledger: Ledger) -> None:
    shards = ShardSet(out, plan, ledger)
    units = shards.pending
    random.Random(1).shuffle(units)  # noqa: S311 -- not a secret
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda unit: do(shards, unit), units))
    shards.finish()
    assert_whole(out, plan, shards.digests)


def test_a_shard_is_a_partial_until_its_last_tensor(plan: Plan, out: Path, ledger: Ledger) -> None:
    shards = ShardSet(out, plan, ledger)
    first = outputs(plan)[0]
    shards.write(first.name, fill(first))
    assert [path.name for path in out.glob("*.safetensors*")] == [plan.shards[0].name + PARTIAL]
    shards.abandon()


def test_a_tensor_larger_than_planned_is_refused(plan: Plan, out: Path, ledger: Ledger) -> None:
    shards = ShardSet(out, plan, ledger)
    first = outputs(plan)[0]
    with pytest.raises(EngineError, match=rf"{first.name} twice, or over {first.nbytes:,}"):
        shards.write(first.name, fill(first) + b"1")
    shards.abandon()


def test_a_tensor_that_is_not_in_the_plan_is_refused(plan: Plan, out: Path, ledger: Ledger) -> None:
    with pytest.raises(EngineError, match=r"lm_head\.weight_packed, which is not in the plan"):
        ShardSet(out, plan, ledger).write("lm_head.weight_packed", b"")


def test_a_tensor_written_twice_is_refused(plan: Plan, out: Path, ledger: Ledger) -> None:
    shards = ShardSet(out, plan, ledger)
    first = outputs(plan)[0]
    shards.write(first.name, fill(first))
    with pytest.raises(EngineError, match="twice, or"):
        shards.write(first.name, fill(first))
    shards.abandon()


@pytest.mark.parametrize("kept", [0, 10])
def test_finishing_without_a_planned_tensor_names_it(
    plan: Plan, out: Path, ledger: Ledger, kept: int
) -> None:
    shards = ShardSet(out, plan, ledger)
    first, *rest = outputs(plan)
    shards.write(first.name, fill(first)[:kept])
    for output in rest:
        shards.write(output.name, fill(output))
    with pytest.raises(EngineError, match=f"did not make {first.name} as planned"):
        shards.finish()
    shards.abandon()


def test_a_full_disk_is_one_sentence(
    plan: Plan, out: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    first = outputs(plan)[0]
    with pytest.raises(OutputError) as caught:
        ShardSet(out, plan, ledger).write(first.name, fill(first))
    assert caught.value.message.startswith("The disk is full: model-00001-of-")
    assert caught.value.fix == "Free space, then run the same command again."


def test_progress_counts_the_sources_bytes(plan: Plan, out: Path, ledger: Ledger) -> None:
    events: list[Event] = []
    shards = ShardSet(out, plan, ledger, emit=events.append)
    for output in outputs(plan):
        shards.write(output.name, fill(output))
    assert events[-1] == Progress("quantize", plan.source_bytes, plan.source_bytes)


def test_a_shard_in_another_order_than_its_work_units_is_hashed(tmp_path: Path) -> None:
    plan = plan_of(make_checkpoint(tmp_path / "src", edit=with_odd_norm))
    ledger = Ledger(tmp_path / "out")
    shards = ShardSet(tmp_path / "out", plan, ledger)
    for unit in shards.pending:
        do(shards, unit)
    shards.finish()
    ledger.release()
    assert_whole(tmp_path / "out", plan, shards.digests)


def test_a_commit_during_writes_counts_only_complete_work_units(
    plan: Plan, out: Path, ledger: Ledger
) -> None:
    ledger.read_from(stamps(plan))
    shards = ShardSet(out, plan, ledger)
    stop = threading.Event()

    def commit() -> None:
        while not stop.is_set():
            shards.commit()

    with ThreadPoolExecutor(3) as pool:
        committer = pool.submit(commit)
        list(pool.map(lambda unit: do(shards, unit), shards.pending))
        stop.set()
        committer.result()
    shards.commit()
    recorded = read_ledger(out)
    assert recorded is not None
    assert recorded.units.keys() == set(range(sum(len(shard.units) for shard in plan.shards)))
    assert_whole(out, plan, shards.digests)


class Listening(ShardObserver):
    """An observer that records shards and work units, and fails on `poll` if `fails`."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.shards: list[str] = []
        self.units: set[int] = set()

    def settled(self, units: Iterable[int]) -> None:
        self.units.update(units)

    def completed(self, shard: ShardPlan, sha256: str) -> None:
        self.shards.append(f"{shard.name} {sha256}")

    def poll(self) -> None:
        if self.fails:
            raise OutputError("The observer failed.")


def test_every_observer_hears_of_every_shard(plan: Plan, out: Path, ledger: Ledger) -> None:
    first, second = Listening(), Listening()
    shards = ShardSet(out, plan, ledger)
    shards.observe(first)
    shards.observe(second)
    for unit in plan.units:
        do(shards, unit)
    shards.finish()
    expected = [f"{name} {digest}" for name, digest in shards.digests.items()]
    for observer in (first, second):
        assert sorted(observer.shards) == sorted(expected)
        assert observer.units == set(range(len(list(plan.units))))


def test_an_observer_hears_of_shards_of_an_earlier_run(
    plan: Plan, out: Path, ledger: Ledger
) -> None:
    ledger.read_from(stamps(plan))
    shards = ShardSet(out, plan, ledger)
    for unit in plan.units:
        do(shards, unit)
    shards.finish()
    late = Listening()
    ShardSet(out, plan, ledger, read_ledger(out), stamps(plan)).observe(late)
    assert len(late.shards) == len(plan.shards)


def test_an_observers_error_stops_the_run(plan: Plan, out: Path, ledger: Ledger) -> None:
    shards = ShardSet(out, plan, ledger)
    shards.observe(Listening(fails=True))
    with pytest.raises(OutputError, match="The observer failed"):
        shards.commit()
