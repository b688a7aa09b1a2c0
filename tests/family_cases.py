"""The facts that upstream states about each shipped family. A new family needs a case here only."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FamilyCase:
    """The facts about one family, from loaders' code and the release, not from the family file."""

    fused_sets: dict[str, list[str]]
    """Fused set -> the modules whose weights loaders join into one matrix."""
    parameters: int
    """The number of parameters of the release that `synth.config` describes."""
    routers: list[str] = field(default_factory=list)
    """The router modules of the tiny checkpoint."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of a variant -> the keys of the tiny config.json that change the list of tensors."""


QKV = {"qkv": ["q_proj", "k_proj", "v_proj"]}
GATE_UP = ["gate_proj", "up_proj"]
TIED = {"tie_word_embeddings": True}

# MiniMax-M2 has tests of its own.
FAMILY_CASES = {
    "deepseek_v3": FamilyCase(
        fused_sets={
            "qkv_a": ["q_a_proj", "kv_a_proj_with_mqa"],
            "gate_up": GATE_UP,
            "expert_gate_up": GATE_UP,
            "shared_gate_up": GATE_UP,
        },
        parameters=684_489_845_504,
        routers=[f"model.layers.{layer}.mlp.gate" for layer in (1, 2)],
        variants={
            "whole query": {"q_lora_rank": None},
            "two shared experts": {"n_shared_experts": 2},
            "multi-token prediction": {"num_nextn_predict_layers": 1},
        },
    ),
    "llama": FamilyCase(
        fused_sets={**QKV, "gate_up": GATE_UP},
        parameters=8_030_261_248,
        variants={"tied": TIED, "biases": {"attention_bias": True, "mlp_bias": True}},
    ),
    "mixtral": FamilyCase(
        fused_sets={**QKV, "w13": ["w1", "w3"]},
        parameters=46_702_792_704,
        routers=[f"model.layers.{layer}.block_sparse_moe.gate" for layer in (0, 1)],
    ),
    "qwen3": FamilyCase(
        fused_sets={**QKV, "gate_up": GATE_UP}, parameters=8_190_735_360, variants={"tied": TIED}
    ),
    "qwen3_moe": FamilyCase(
        fused_sets={**QKV, "gate_up": GATE_UP, "expert_gate_up": GATE_UP},
        parameters=30_532_122_624,
        routers=[f"model.layers.{layer}.mlp.gate" for layer in (0, 1)],
        variants={"a dense layer": {"mlp_only_layers": [1]}},
    ),
    "qwen3_next": FamilyCase(
        fused_sets={
            **QKV,
            "gate_up": GATE_UP,
            "expert_gate_up": GATE_UP,
            "shared_gate_up": GATE_UP,
        },
        parameters=79_674_391_296,
        routers=[
            f"model.layers.{layer}.mlp.{name}"
            for layer in range(4)
            for name in ("gate", "shared_expert_gate")
        ],
        variants={
            "a dense layer": {"mlp_only_layers": [1]},
            "more full attention": {"full_attention_interval": 2},
            "types of layers": {"layer_types": ["full_attention"] + ["linear_attention"] * 3},
        },
    ),
    "qwen3_5_moe": FamilyCase(
        fused_sets={
            **QKV,
            "expert_gate_up": GATE_UP,
            "shared_gate_up": GATE_UP,
            "linear_qkvz": ["in_proj_qkv", "in_proj_z"],
            "linear_ba": ["in_proj_b", "in_proj_a"],
        },
        parameters=34_660_610_688,
        routers=[
            f"model.layers.{layer}.mlp.{name}"
            for layer in range(4)
            for name in ("gate", "shared_expert_gate")
        ],
        variants={"tied": TIED, "more full attention": {"full_attention_interval": 2}},
    ),
    "qwen3_5": FamilyCase(
        fused_sets={
            **QKV,
            "gate_up": GATE_UP,
            "linear_qkvz": ["in_proj_qkv", "in_proj_z"],
            "linear_ba": ["in_proj_b", "in_proj_a"],
        },
        parameters=26_895_998_464,
        variants={"tied": TIED},
    ),
}
