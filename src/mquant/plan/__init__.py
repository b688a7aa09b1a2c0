"""Checkpoint x Family x Recipe -> Plan: the only place that decides what happens to a tensor."""

from mquant.plan.bf16 import make_bf16_plan
from mquant.plan.build import DEFAULT_SHARD_BYTES, cut_shards, make_plan
from mquant.plan.export import Target, hf_quant_config, make_export_plan, scalars, survey_for
from mquant.plan.members import Member
from mquant.plan.mend import BAD, PARENT, Mending, from_parent, mend
from mquant.plan.model import Action, OutputTensor, Plan, ShardPlan, WorkUnit
from mquant.plan.never_quantized import natural
from mquant.plan.share import share, shares
from mquant.plan.stored import Stored
from mquant.plan.survey import survey
from mquant.plan.wholeness import wholeness

__all__ = [
    "BAD",
    "DEFAULT_SHARD_BYTES",
    "PARENT",
    "Action",
    "Member",
    "Mending",
    "OutputTensor",
    "Plan",
    "ShardPlan",
    "Stored",
    "Target",
    "WorkUnit",
    "cut_shards",
    "from_parent",
    "hf_quant_config",
    "make_bf16_plan",
    "make_export_plan",
    "make_plan",
    "mend",
    "natural",
    "scalars",
    "share",
    "shares",
    "survey",
    "survey_for",
    "wholeness",
]
