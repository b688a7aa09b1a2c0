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
    kept: list[str] = field(default_factory=list)
    """The further linear modules of the tiny checkpoint that recipe nvfp4 keeps."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of a variant -> the keys of the tiny config.json that change the list of tensors."""


QKV = {"qkv": ["q_proj", "k_proj", "v_proj"]}
GATE_UP = ["gate_proj", "up_proj"]
DEEPSEEK_SETS = {
    "qkv_a": ["q_a_proj", "kv_a_proj_with_mqa"],
    "gate_up": GATE_UP,
    "expert_gate_up": GATE_UP,
    "shared_gate_up": GATE_UP,
}
INDEXER = [f"self_attn.indexer.{part}" for part in ("wq_b", "wk", "weights_proj")]
TIED = {"tie_word_embeddings": True}

# The families whose every behaviour is tested; test_every_family.py has what holds of all.
DEEP: tuple[str, ...] = ("deepseek_v3", "glm4_moe", "llama", "minimax_m2", "mistral")
DEEP += ("mixtral", "olmoe", "qwen2", "qwen3", "qwen3_moe")

# MiniMax-M2 has tests of its own.
FAMILY_CASES = {
    "deepseek_v3": FamilyCase(
        fused_sets=DEEPSEEK_SETS,
        parameters=684_489_845_504,
        routers=[f"model.layers.{layer}.mlp.gate" for layer in (1, 2)],
        variants={
            "whole query": {"q_lora_rank": None},
            "two shared experts": {"n_shared_experts": 2},
            "multi-token prediction": {"num_nextn_predict_layers": 1},
        },
    ),
    "deepseek_v32": FamilyCase(
        fused_sets=DEEPSEEK_SETS,
        parameters=685_355_329_792,
        routers=[f"model.layers.{layer}.mlp.gate" for layer in (1, 2)],
        kept=[f"model.layers.{layer}.{part}" for layer in (0, 1, 2) for part in INDEXER],
        variants={"multi-token prediction": {"num_nextn_predict_layers": 1}},
    ),
    "glm_moe_dsa": FamilyCase(
        fused_sets=DEEPSEEK_SETS,
        parameters=755_233_105_920,
        routers=[f"model.layers.{layer}.mlp.gate" for layer in (1, 2)],
        kept=[f"model.layers.{layer}.{part}" for layer in (0, 2) for part in INDEXER],
        variants={
            "an indexer in every layer": {"index_topk_freq": 1},
            "indexers by a list": {"indexer_types": ["full", "shared", "full"]},
            "indexers by a pattern": {"index_topk_pattern": "FSF"},
            "multi-token prediction": {"num_nextn_predict_layers": 1},
        },
    ),
    "glm4_moe_lite": FamilyCase(
        fused_sets=DEEPSEEK_SETS,
        parameters=31_221_488_576,
        routers=[f"model.layers.{layer}.mlp.gate" for layer in (1, 2)],
        variants={
            "whole query": {"q_lora_rank": None},
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
