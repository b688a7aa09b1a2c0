"""Checkpoint x Family x Recipe -> Plan: the only place that decides what happens to a tensor."""

from mquant.plan.action import Action, OutputTensor, WorkUnit
from mquant.plan.build import DEFAULT_SHARD_BYTES, cut_shards, make_plan
from mquant.plan.completeness import completeness
from mquant.plan.declare import KV_SCALES, declarations
from mquant.plan.dequantize import make_bf16_plan
from mquant.plan.export import Target, hf_quant_config, make_export_plan, scalars, survey_for
from mquant.plan.members import Member
from mquant.plan.model import Plan, ShardPlan, config_json
from mquant.plan.never_quantized import natural
from mquant.plan.repair import (
    BAD,
    PARENT,
    RepairPlan,
    from_parent,
    make_config_plan,
    make_copy_plan,
    make_repair_plan,
)
from mquant.plan.share import share, shares
from mquant.plan.stored import Stored
from mquant.plan.survey import survey

__all__ = [
    "BAD",
    "DEFAULT_SHARD_BYTES",
    "KV_SCALES",
    "PARENT",
    "Action",
    "Member",
    "OutputTensor",
    "Plan",
    "RepairPlan",
    "ShardPlan",
    "Stored",
    "Target",
    "WorkUnit",
    "completeness",
    "config_json",
    "cut_shards",
    "declarations",
    "from_parent",
    "hf_quant_config",
    "make_bf16_plan",
    "make_config_plan",
    "make_copy_plan",
    "make_export_plan",
    "make_plan",
    "make_repair_plan",
    "natural",
    "scalars",
    "share",
    "shares",
    "survey",
    "survey_for",
]
