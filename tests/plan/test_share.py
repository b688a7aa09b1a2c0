"""The plan and a number alone decide which output shards a share writes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from make import make_checkpoint
from mquant.plan import Plan, ShardPlan, share, shares
from run import plan_of


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    src = make_checkpoint(tmp_path_factory.mktemp("share") / "src", layers=2, experts=16)
    return plan_of(src, max_shard_bytes=20_000)


def names(plan: Plan) -> list[str]:
    return [shard.name for shard in plan.shards]


def source_bytes(shard: ShardPlan) -> int:
    return sum(unit.source_bytes for unit in shard.units)


@pytest.mark.parametrize("of", [1, 2, 3, 5, 7])
def test_all_shares_together_are_the_plan_in_its_order(plan: Plan, of: int) -> None:
    parts = shares(plan, of)
    assert len(parts) == of
    assert [name for part in parts for name in names(part)] == names(plan)
    assert [share(plan, number, of) for number in range(1, of + 1)] == list(parts)


def test_one_share_of_one_is_the_plan(plan: Plan) -> None:
    assert share(plan, 1, 1) == plan


def test_as_many_shares_as_shards_have_one_each(plan: Plan) -> None:
    count = len(plan.shards)
    assert count > 4
    assert [len(part.shards) for part in shares(plan, count)] == [1] * count


def test_more_shares_than_shards_leave_the_last_ones_empty(plan: Plan) -> None:
    count = len(plan.shards)
    assert [len(part.shards) for part in shares(plan, count + 3)] == [1] * count + [0] * 3


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_no_share_is_empty_or_exceeds_its_part_by_more_than_two_shards(
    plan: Plan, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(plan.shards)))
    picked = data.draw(st.permutations(plan.shards))[:count]
    few = Plan(plan.survey, plan.family, plan.recipe, tuple(picked), plan.ignore, plan.findings)
    of = data.draw(st.integers(1, count))
    parts = shares(few, of)
    assert all(part.shards for part in parts)
    largest = max(map(source_bytes, picked))
    # A share exceeds its part by one shard for rounding, and by one because no share is empty.
    assert max(part.source_bytes for part in parts) <= few.source_bytes / of + 2 * largest
