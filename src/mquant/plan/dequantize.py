"""Checkpoint x Family -> the plan that dequantizes every quantized weight and copies the rest."""

from collections.abc import Mapping
from typing import Final

from mquant.checkpoint import Checkpoint
from mquant.errors import Refused
from mquant.family import Family
from mquant.findings import Finding, rule
from mquant.plan.action import Action, WorkUnit
from mquant.plan.build import DEFAULT_SHARD_BYTES, cut_shards
from mquant.plan.loadable import checked
from mquant.plan.members import Member, as_stored
from mquant.plan.model import Plan, ShardPlan
from mquant.plan.starts_from import dequantizes
from mquant.plan.stored import READABLE
from mquant.plan.survey import Survey, survey
from mquant.recipe import Recipe

BF16: Final = Recipe(
    name="bf16", title="BF16 for quantized weights, all else as it is", suffix="BF16", roles={}
)

NOTHING_TO_DEQUANTIZE: Final = rule(
    "nothing-to-dequantize",
    "The checkpoint has quantized weights.",
    "A checkpoint without quantized weights needs no dequantization.",
    "Use the checkpoint as it is.",
    needs="plan",
)


def make_bf16_plan(
    checkpoint: Checkpoint,
    families: Mapping[str, Family],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Plan:
    """Decide what happens to every tensor. Problems are `findings` of the plan, as in `make_plan`.

    Raises Refused if the family is unknown.
    """
    surveyed = survey(checkpoint, families, READABLE)
    if surveyed.family is None:
        raise Refused(surveyed.findings)
    units = [WorkUnit((_action(member),)) for member in as_stored(surveyed.members)]
    cut = cut_shards(units, lambda unit: unit.output_bytes, max_shard_bytes)
    plan = Plan(
        survey=surveyed,
        family=surveyed.family,
        recipe=BF16,
        shards=tuple(ShardPlan(name, tuple(group)) for name, group in cut.items()),
        ignore=(),
        findings=(*surveyed.findings, *dequantizes(surveyed), *_nothing(surveyed)),
    )
    return checked(plan)


def _action(member: Member) -> Action:
    stored = member.stored
    return Action.kept(member, f"dequantized from {stored.described}" if stored else "as it is")


def _nothing(surveyed: Survey) -> list[Finding]:
    if not surveyed.readable or any(member.stored for member in surveyed.members):
        return []
    return [
        NOTHING_TO_DEQUANTIZE.finding(
            "config.json",
            f"{surveyed.checkpoint.source.name} has no quantized weights.",
            "Use the checkpoint as it is.",
        )
    ]
