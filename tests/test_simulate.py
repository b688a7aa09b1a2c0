"""The times of scripts/simulation.py obey laws, here for the plan of a small checkpoint."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from make import make_checkpoint
from mquant.plan import Plan, shares
from run import plan_of
from simulation import (
    FREE,
    Phase,
    Rates,
    Task,
    fetched_again,
    makespan,
    pieces_of,
    pipeline,
    share_out,
    work_of,
)
from simulation_page import fill

NETWORK, STORAGE = 1_000_000.0, 2_500_000.0
RATES = Rates(fetch=500_000.0, quantize=2_000_000.0, send=400_000.0)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Return the plan of a checkpoint of 2.7 MB in 6 files, which has a dozen shards."""
    src = tmp_path_factory.mktemp("small") / "src"
    make_checkpoint(src, layers=2, experts=8, hidden=128, intermediate=192, shards=6)
    return plan_of(src, max_shard_bytes=80_000)


def files_of(plan: Plan) -> dict[str, int]:
    files = plan.survey.checkpoint.source.files
    return {path: size for path, size in files.items() if path.endswith(".safetensors")}


def stream(part: Plan, network: float = NETWORK) -> Task:
    work = work_of(part)
    load = 1 + work.written / work.read
    return (Phase(work.read, network, shared=1, load=load, on_network=True),)


def tasks_of(plan: Plan, network: float = NETWORK) -> list[Task]:
    return [stream(replace(plan, shards=(shard,)), network) for shard in plan.shards]


def seconds(tasks: Sequence[Task], machines: int, times: float = 1) -> float:
    return makespan(tasks, machines, machines, NETWORK * times, (STORAGE * times,))


def through(plan: Plan, rates: Rates, room: float = np.inf, shard_room: float = np.inf) -> float:
    return pipeline(pieces_of(plan), files_of(plan), rates, room, shard_room).seconds


# -------------------------------------------------------------------------------- many machines


def test_one_machine_takes_the_sum(plan: Plan) -> None:
    assert len(plan.shards) > 8
    assert seconds(tasks_of(plan), 1) == pytest.approx(plan.source_bytes / NETWORK)
    assert seconds([stream(plan)], 1) == pytest.approx(plan.source_bytes / NETWORK)


@pytest.mark.parametrize("machines", [1, 2, 3, 5, 8, 100])
def test_a_run_is_never_faster_than_network_storage_or_the_largest_shard(
    plan: Plan, machines: int
) -> None:
    time = seconds(tasks_of(plan), machines) * (1 + 1e-9)
    assert time >= plan.source_bytes / NETWORK / machines
    assert time >= (plan.source_bytes + plan.output_bytes) / STORAGE
    assert time >= max(task[0].size for task in tasks_of(plan)) / NETWORK


def test_more_machines_are_never_slower(plan: Plan) -> None:
    by_task = [makespan(tasks_of(plan), n, n, NETWORK, (np.inf,)) for n in range(1, 20)]
    assert by_task == sorted(by_task, reverse=True)
    by_share = [seconds([stream(p) for p in shares(plan, n)], n) for n in (1, 2, 4, 8)]
    assert by_share == sorted(by_share, reverse=True)


def test_no_more_machines_work_than_there_are_shards(plan: Plan) -> None:
    tasks, shards = tasks_of(plan), len(plan.shards)
    assert seconds(tasks, shards) == seconds(tasks, shards + 1) == seconds(tasks, 10 * shards)


def test_twice_all_bandwidths_is_half_the_time(plan: Plan) -> None:
    twice = seconds(tasks_of(plan, 2 * NETWORK), 5, times=2)
    assert twice == pytest.approx(seconds(tasks_of(plan), 5) / 2)


def test_each_working_slot_goes_through_the_first_phases_once() -> None:
    first, task = (Phase(10, 1.0),), (Phase(3, 1.0),)
    assert makespan([task] * 4, 2, 2, NETWORK, first=first) == 10 + 2 * 3


def test_slots_of_one_machine_share_its_network() -> None:
    task = (Phase(NETWORK, NETWORK, on_network=True),)
    assert makespan([task] * 4, slots=4, machines=1, network=NETWORK) == pytest.approx(4)
    assert makespan([task] * 4, slots=4, machines=2, network=NETWORK) == pytest.approx(2)


def test_a_slot_leaves_the_part_that_the_slot_cannot_use_to_the_others() -> None:
    cap, capacity = np.array([1.0, 9.0, 9.0]), np.array([np.inf, 9.0, 2.0])
    uses, loads = np.array([[1, FREE], [1, 2], [1, FREE]]), np.array([[1.0, 0], [1, 1], [1, 0]])
    assert share_out(cap, uses, loads, capacity) == pytest.approx([0.7, 2, 6.3])


def test_a_lone_slot_gets_all_that_its_cap_and_the_capacity_allow() -> None:
    uses, loads, capacity = np.array([[1, FREE]]), np.array([[1.0, 0]]), np.array([np.inf, 9.0])
    assert share_out(np.array([8.0]), uses, loads, capacity) == pytest.approx([8])
    assert share_out(np.array([10.0]), uses, loads, capacity) == pytest.approx([9])


# ----------------------------------------------------------------------- one machine and a hub


def test_a_run_with_a_hub_takes_longer_than_each_part_and_less_than_the_sum(plan: Plan) -> None:
    fetched = sum(files_of(plan).values()) / RATES.fetch
    sent = plan.output_bytes / RATES.send
    assert through(plan, RATES) > max(fetched, sent, plan.source_bytes / RATES.quantize)
    assert through(plan, RATES) < fetched + sent + plan.source_bytes / RATES.quantize


def test_one_file_and_one_shard_take_the_sum_of_all_parts(tmp_path: Path) -> None:
    whole = plan_of(make_checkpoint(tmp_path / "src", shards=1))
    (size,) = files_of(whole).values()
    parts = size / RATES.fetch, whole.source_bytes / RATES.quantize, whole.output_bytes / RATES.send
    assert through(whole, replace(RATES, commit=7)) == pytest.approx(sum(parts) + 7)


def test_twice_as_fast_parts_take_half_the_time(plan: Plan) -> None:
    twice = Rates(2 * RATES.fetch, 2 * RATES.quantize, 2 * RATES.send)
    assert through(plan, twice) == pytest.approx(through(plan, RATES) / 2)


def test_less_room_is_never_faster(plan: Plan) -> None:
    largest = max(files_of(plan).values())
    by_files = [through(plan, RATES, room) for room in (2 * largest, 3 * largest, np.inf)]
    assert by_files == sorted(by_files, reverse=True)
    by_shards = [through(plan, RATES, np.inf, room) for room in (90_000, 200_000, np.inf)]
    assert by_shards == sorted(by_shards, reverse=True)
    assert by_files[0] > by_files[-1]
    assert by_shards[0] > by_shards[-1]


def test_shards_that_wait_go_in_one_commit(plan: Plan) -> None:
    sizes, shards = files_of(plan), len(plan.shards)
    quick = pipeline(pieces_of(plan), sizes, replace(RATES, send=1e12))
    slow = pipeline(pieces_of(plan), sizes, replace(RATES, fetch=1e12, quantize=1e12))
    assert quick.commits == shards
    assert slow.commits == 2  # the first shard, then all shards that were made meanwhile


def test_files_at_the_edges_of_shares_are_fetched_again(plan: Plan) -> None:
    sizes = files_of(plan)
    assert fetched_again(shares(plan, 1), sizes) == 0
    halves = [{f for s in p.shards for j in s.units for f in j.files} for p in shares(plan, 2)]
    common = halves[0] & halves[1]
    assert fetched_again(shares(plan, 2), sizes) == sum(sizes[path] for path in common) > 0


def test_a_page_lacks_no_value() -> None:
    assert fill("a {{b}} c", {"b": "1"}) == "a 1 c"
    with pytest.raises(KeyError):
        fill("a {{b}}", {})
