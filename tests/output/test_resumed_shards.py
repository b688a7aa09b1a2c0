"""A `ShardSet` resumes: what the ledger counts and the files still have is not made again."""

import os
from pathlib import Path

import pytest

from mquant.checkpoint import Stamp
from mquant.events import Event, Note
from mquant.output import PARTIAL, Ledger, ShardSet
from mquant.output.ledger import read_ledger
from mquant.plan import Plan, WorkUnit
from output.shard_runs import assert_whole, do, fill, stamps


def do_half(out: Path, plan: Plan, ledger: Ledger, *, committed: bool = True) -> list[WorkUnit]:
    """Do the first half of a run's work units, and stop; return the remaining work units."""
    ledger.read_from(stamps(plan))
    shards = ShardSet(out, plan, ledger)
    units = shards.pending
    for unit in units[: len(units) // 2]:
        do(shards, unit)
    if committed:
        shards.commit()
    shards.abandon()
    return units[len(units) // 2 :]


def finish(shards: ShardSet, out: Path, plan: Plan) -> None:
    """Do the pending work units, and compare the shards with those of a run without a stop."""
    for unit in shards.pending:
        do(shards, unit)
    shards.finish()
    assert_whole(out, plan, shards.digests)


def partial_of(out: Path) -> Path:
    """Return the one partial shard in OUT."""
    (partial,) = out.glob("*" + PARTIAL)
    return partial


def flip(path: Path, at: int) -> None:
    """Change a bit of the byte at `at`."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_committed_work_is_not_repeated(plan: Plan, out: Path, ledger: Ledger) -> None:
    remaining = do_half(out, plan, ledger)
    shards = ShardSet(out, plan, ledger, read_ledger(out), stamps(plan))
    assert shards.pending == remaining
    assert shards.done_bytes == plan.source_bytes - sum(unit.source_bytes for unit in remaining)
    finish(shards, out, plan)


def test_uncommitted_work_is_repeated(plan: Plan, out: Path, ledger: Ledger) -> None:
    do_half(out, plan, ledger, committed=False)
    partial = partial_of(out)
    shards = ShardSet(out, plan, ledger, read_ledger(out), stamps(plan))
    units = next(shard.units for shard in plan.shards if shard.name == partial.stem)
    assert shards.pending[: len(units)] == list(units)


def test_work_from_a_changed_source_file_is_repeated(plan: Plan, out: Path, ledger: Ledger) -> None:
    remaining = do_half(out, plan, ledger)
    changed = sorted(stamps(plan))[1]
    new_stamps = {**stamps(plan), changed: Stamp(1, 1)}
    pending = ShardSet(out, plan, ledger, read_ledger(out), new_stamps).pending
    repeated = [unit for unit in pending if unit not in remaining]
    assert repeated
    assert all(changed in {a.source.shard for a in unit.actions} for unit in repeated)


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_damaged_partial_is_written_again(
    plan: Plan, out: Path, ledger: Ledger, damage: str
) -> None:
    do_half(out, plan, ledger)
    partial = partial_of(out)
    if damage == "gone":
        partial.unlink()
    else:
        os.truncate(partial, 1000)
    shards = ShardSet(out, plan, ledger, read_ledger(out), stamps(plan))
    units = next(shard.units for shard in plan.shards if shard.name == partial.stem)
    assert shards.pending[: len(units)] == list(units)
    finish(shards, out, plan)


@pytest.mark.parametrize("part", ["the header", "a tensor"])
def test_a_partial_that_changed_since_is_written_again_and_the_run_says_so(
    plan: Plan, out: Path, ledger: Ledger, part: str
) -> None:
    do_half(out, plan, ledger)
    partial, notes = partial_of(out), list[Event]()
    shard = next(shard for shard in plan.shards if shard.name == partial.stem)
    flip(partial, len(shard.layout[0]) + (-2 if part == "the header" else 1))
    shards = ShardSet(out, plan, ledger, read_ledger(out), stamps(plan), notes.append)
    assert shards.pending[: len(shard.units)] == list(shard.units)
    sentence = f"{partial.name} is not as an earlier run left it; its tensors are made again."
    assert notes[0] == Note("warning", sentence)
    finish(shards, out, plan)


def test_bytes_that_no_run_counted_may_change(plan: Plan, out: Path, ledger: Ledger) -> None:
    remaining = do_half(out, plan, ledger)
    partial = partial_of(out)
    flip(partial, partial.stat().st_size - 1)
    shards = ShardSet(out, plan, ledger, read_ledger(out), stamps(plan))
    assert shards.pending == remaining
    finish(shards, out, plan)


def test_work_behind_a_gap_is_repeated(plan: Plan, out: Path, ledger: Ledger) -> None:
    ledger.read_from(stamps(plan))
    shards = ShardSet(out, plan, ledger)
    first, _, third, *_ = shards.pending
    for unit in (first, third):
        do(shards, unit)
    shards.commit()
    shards.abandon()
    again = ShardSet(out, plan, ledger, read_ledger(out), stamps(plan))
    assert first not in again.pending
    assert third in again.pending, "no digest covers its bytes"
    finish(again, out, plan)


def test_a_run_that_is_stopped_while_it_repeats_work_can_be_resumed(
    plan: Plan, out: Path, ledger: Ledger
) -> None:
    do_half(out, plan, ledger)
    new_stamps = {**stamps(plan), sorted(stamps(plan))[1]: Stamp(1, 1)}
    ledger.read_from(new_stamps)
    shards = ShardSet(out, plan, ledger, read_ledger(out), new_stamps)
    output = next(iter(shards.pending[0].outputs))
    shards.write(output.name, bytes([fill(output)[0] ^ 1]))  # another source; no commit follows
    shards.abandon()
    notes: list[Event] = []
    again = ShardSet(out, plan, ledger, read_ledger(out), new_stamps, notes.append)
    assert notes == []
    finish(again, out, plan)


def test_a_ledger_of_an_earlier_release_has_no_digests_of_partials_and_is_resumed(
    plan: Plan, out: Path, ledger: Ledger
) -> None:
    remaining = do_half(out, plan, ledger)
    recorded = read_ledger(out)
    assert recorded is not None
    recorded.fronts.clear()
    shards = ShardSet(out, plan, ledger, recorded, stamps(plan))
    assert shards.pending == remaining
    finish(shards, out, plan)


def test_a_complete_shard_is_left_alone(plan: Plan, out: Path, ledger: Ledger) -> None:
    ledger.read_from(stamps(plan))
    shards = ShardSet(out, plan, ledger)
    for unit in plan.shards[0].units:
        do(shards, unit)
    before = (out / plan.shards[0].name).stat()
    again = ShardSet(out, plan, ledger, read_ledger(out), stamps(plan))
    assert again.pending == [unit for shard in plan.shards[1:] for unit in shard.units]
    for unit in again.pending:
        do(again, unit)
    again.finish()
    after = (out / plan.shards[0].name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert_whole(out, plan, again.digests)


def test_a_named_shard_that_the_ledger_lacks_is_resumed(
    plan: Plan, out: Path, ledger: Ledger
) -> None:
    ledger.read_from(stamps(plan))
    shards = ShardSet(out, plan, ledger)
    units = plan.shards[0].units
    for unit in units[:-1]:
        do(shards, unit)
    shards.commit()
    do(shards, units[-1])
    recorded = read_ledger(out)
    assert recorded is not None
    recorded.shards.clear()
    del recorded.units[len(units) - 1]
    again = ShardSet(out, plan, ledger, recorded, stamps(plan))
    assert again.pending[0] == units[-1]
    for unit in again.pending:
        do(again, unit)
    again.finish()
    assert_whole(out, plan, again.digests)


def test_a_complete_shard_without_its_name_is_renamed(
    plan: Plan, out: Path, ledger: Ledger
) -> None:
    ledger.read_from(stamps(plan))
    shards = ShardSet(out, plan, ledger)
    for unit in shards.pending:
        do(shards, unit)
    name = plan.shards[1].name
    (out / name).rename(out / (name + PARTIAL))
    again = ShardSet(out, plan, ledger, read_ledger(out), stamps(plan))
    assert again.pending == []
    again.finish()
    assert_whole(out, plan, again.digests)
