"""A plan in shares, for many processes: each is a run of neighbouring output shards.

So every file has one writer, and neighbours, which come of the same source files, go together.
Who has which is decided from the plan and the number of shares alone: nobody has to be asked.
"""

from dataclasses import replace

from mquant.plan.model import Plan, ShardPlan


def share(plan: Plan, number: int, of: int) -> Plan:
    """Share `number` (1 to `of`) of a plan: the same plan with fewer shards, perhaps with none."""
    return shares(plan, of)[number - 1]


def shares(plan: Plan, of: int) -> tuple[Plan, ...]:
    """All shares of a plan; together they have its shards, each once and in their order.

    A shard belongs where the middle of its source bytes lies in those of the plan: no share is
    larger than its due by more than a shard. None is empty while there are as many shards.
    """
    parts: list[list[ShardPlan]] = [[] for _ in range(of)]
    shards = plan.shards
    sizes = [sum(unit.source_bytes for unit in shard.units) for shard in shards]
    filled = min(of, len(shards))
    before, owner = 0, -1
    for place, (shard, size) in enumerate(zip(shards, sizes, strict=True)):
        due = (2 * before + size) * filled // max(2 * sum(sizes), 1)
        # Never past an empty share, and not so slowly that one would be left at the end.
        owner = max(owner, min(due, owner + 1), filled - len(shards) + place)
        parts[owner].append(shard)
        before += size
    return tuple(replace(plan, shards=tuple(part)) for part in parts)
