"""A plan in shares for many processes: a share is a run of neighbouring output shards.

Every file has one writer. Neighbouring shards are made from the same source files and stay
together. The plan and the number of shares alone decide which process writes which shards.
"""

from dataclasses import replace

from mquant.plan.model import Plan, ShardPlan


def share(plan: Plan, number: int, of: int) -> Plan:
    """Return share `number` (1 to `of`) of a plan: the plan with fewer shards, perhaps no shard."""
    return shares(plan, of)[number - 1]


def shares(plan: Plan, of: int) -> tuple[Plan, ...]:
    """Return all shares of a plan. Together the shares have each shard of the plan once, in order.

    A share is at most one shard larger than its part of the source bytes. No share is empty if
    there are enough shards.
    """
    parts: list[list[ShardPlan]] = [[] for _ in range(of)]
    shards = plan.shards
    sizes = [sum(unit.source_bytes for unit in shard.units) for shard in shards]
    filled = min(of, len(shards))
    before, owner = 0, -1
    for place, (shard, size) in enumerate(zip(shards, sizes, strict=True)):
        due = (2 * before + size) * filled // max(2 * sum(sizes), 1)
        # No share may stay empty: skip no share, and keep one shard for each of the last shares.
        owner = max(owner, min(due, owner + 1), filled - len(shards) + place)
        parts[owner].append(shard)
        before += size
    return tuple(replace(plan, shards=tuple(part)) for part in parts)
