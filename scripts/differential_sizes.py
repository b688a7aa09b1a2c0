"""The families of the differential test: sizes that every format fits, and legal variations."""

from typing import Any, Final

COMMON: Final = {"hidden_size": 256, "vocab_size": 256}
_DELTA_NET: Final = {
    "head_dim": 32,
    "full_attention_interval": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "shared_expert_intermediate_size": 128,
}
_LATENT: Final = {
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
}
_SPARSE: Final = {**_LATENT, "index_head_dim": 64, "index_n_heads": 4}
SIZES: Final[dict[str, dict[str, Any]]] = {
    "minimax_m2": {"intermediate_size": 128, "head_dim": 64, "rotary_dim": 32},
    "qwen3_moe": {"head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 128},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _SPARSE,
    "glm_moe_dsa": _SPARSE,
    "glm4_moe_lite": _LATENT,
    "kimi_k2": _LATENT,
    "mixtral": {"intermediate_size": 128},
    "llama": {"intermediate_size": 256},
    "qwen3": {"head_dim": 64, "intermediate_size": 256},
    "glm4_moe": {"head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 128},
    "mistral": {"head_dim": 64, "intermediate_size": 256},
    "qwen2": {"head_dim": 64, "intermediate_size": 256},
    "olmoe": {"head_dim": 64, "intermediate_size": 128},
    "qwen3_next": {"moe_intermediate_size": 128, **_DELTA_NET},
    "qwen3_5_moe": {"moe_intermediate_size": 128, **_DELTA_NET},
    "qwen3_5": {"intermediate_size": 256, **_DELTA_NET},
    "qwen3_vl_moe": {"head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 128},
    "qwen3_vl": {"head_dim": 64, "intermediate_size": 256},
    "gemma3": {"head_dim": 64, "intermediate_size": 256},
    "gemma4": {
        "head_dim": 64,
        "global_head_dim": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
    },
    "kimi_k25": _LATENT,
    "llama4": {"head_dim": 64, "intermediate_size": 128, "intermediate_size_mlp": 256},
    "afmoe": {"head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 128},
    "ernie4_5_moe": {"head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 128},
    "phi3": {"intermediate_size": 256},
    "phimoe": {"intermediate_size": 128},
    "hy_v3": {
        "head_dim": 64,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "expert_hidden_dim": 128,
    },
    "hunyuan_v1_moe": {
        "head_dim": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": [128] * 3,
        "moe_topk": [2] * 3,
    },
    "mistral4": _LATENT,
    "mimo_v2_flash": {
        "head_dim": 128,
        "intermediate_size": 256,
        "num_key_value_heads": 2,
        "swa_head_dim": 128,
        "swa_v_head_dim": 64,
        "v_head_dim": 64,
        "moe_intermediate_size": 128,
    },
    "jamba": {"intermediate_size": 128},
    "step3p5": {
        "num_hidden_layers": 2,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "head_dim": 64,
            "num_attention_groups": 2,
            "num_attention_heads": 8,
        },
        "head_dim": 64,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "share_expert_dim": 128,
    },
    "nemotron_h": {
        "num_hidden_layers": 4,
        "head_dim": 64,
        "intermediate_size": 256,
        "mamba_head_dim": 32,
        "moe_intermediate_size": 128,
        "moe_latent_size": 128,
        "moe_shared_expert_intermediate_size": 128,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "mamba_d_head": 32,
        "shared_intermediate_size": 128,
    },
}
_TIED: Final = {"tie_word_embeddings": True}
_BIASED: Final = {"attention_bias": True}
_EXPERTS: Final = (
    {"num_nextn_predict_layers": 1},
    {"n_shared_experts": 2},
    {"first_k_dense_replace": 0},
)
_LONGROPE: Final = {
    "rope_scaling": {
        "type": "longrope",
        **dict.fromkeys(("short_factor", "long_factor"), [1.0] * 32),
        **dict.fromkeys(("short_mscale", "long_mscale"), 1.2),
    },
}
_ALPHA: Final = {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}}
# Legal variations of a family's config.json; the tensors follow.
VARIANTS: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "minimax_m2": ({"num_key_value_heads": 4},),
    "qwen3_moe": (_TIED, _BIASED, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}),
    "deepseek_v2": ({"q_lora_rank": None}, {"n_shared_experts": 1}, {"topk_method": "noaux_tc"}),
    "deepseek_v3": ({"q_lora_rank": None}, *_EXPERTS),
    "deepseek_v32": _EXPERTS,
    "glm_moe_dsa": (*_EXPERTS, {"index_topk_freq": 1}, {"index_topk_pattern": "FSS"}),
    "glm4_moe_lite": ({"q_lora_rank": None}, *_EXPERTS),
    "kimi_k2": ({"q_lora_rank": None}, *_EXPERTS),
    "mixtral": (_TIED,),
    "llama": (_TIED, _BIASED, {"mlp_bias": True}),
    "qwen3": (_TIED, _BIASED),
    "glm4_moe": (_BIASED, {"use_qk_norm": False}, {"first_k_dense_replace": 0}),
    "mistral": (_TIED,),
    "qwen2": (_TIED,),
    "olmoe": (),
    "qwen3_next": ({"mlp_only_layers": [0]}, {"linear_num_value_heads": 2}),
    "qwen3_5_moe": ({"linear_num_value_heads": 2}, _TIED, {"full_attention_interval": 1}),
    "qwen3_5": ({"linear_num_value_heads": 2}, _TIED),
    "qwen3_vl_moe": (_BIASED, {"mlp_only_layers": [0]}),
    "qwen3_vl": (_TIED, _BIASED),
    "gemma3": (_BIASED, {"layer_types": None}),
    "gemma4": (
        {"layer_types": None},
        {"attention_k_eq_v": False},
        {"num_experts": None, "enable_moe_block": False},
        {"hidden_size_per_layer_input": 64},
    ),
    "llama4": ({"interleave_moe_layer_step": 1}, _TIED),
    "kimi_k25": ({"q_lora_rank": None}, *_EXPERTS[1:]),
    "ernie4_5_moe": ({"moe_num_shared_experts": 0}, {"moe_layer_start_index": 0}),
    "afmoe": ({"num_shared_experts": 2}, {"num_dense_layers": 0}),
    "phi3": (_TIED, _LONGROPE),
    "phimoe": (_LONGROPE,),
    "hy_v3": (_TIED, {"num_shared_experts": 2}, {"num_nextn_predict_layers": 1}),
    "hunyuan_v1_moe": ({"tie_word_embeddings": False}, _BIASED, _ALPHA),
    "mistral4": (
        _TIED,
        {"q_lora_rank": None},
        {"n_shared_experts": 2},
        {"first_k_dense_replace": 0},
    ),
    "mimo_v2_flash": ({"add_swa_attention_sink_bias": False}, {"moe_layer_freq": [0, 0, 0]}),
    "jamba": (
        _TIED,
        {"mamba_proj_bias": True, "mamba_conv_bias": False},
        {"num_experts": 1},
        {"expert_layer_period": 1, "expert_layer_offset": 0},
    ),
    "step3p5": (
        {"attention_other_setting": None},
        {
            "num_nextn_predict_layers": 1,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        {"moe_layers_enum": "0,1", "rope_theta": [5000000.0, 10000.0]},
    ),
    "nemotron_h": (
        {"use_bias": True, "use_conv_bias": False},
        {"mlp_bias": True},
        {"moe_latent_size": None},
        {"hybrid_override_pattern": "*E", "num_hidden_layers": 2},
        {
            "hybrid_override_pattern": None,
            "layers_block_type": ["mamba", "mlp", "moe", "attention"],
        },
    ),
    "granitemoehybrid": (
        _TIED,
        _BIASED,
        {"mamba_proj_bias": True, "mamba_conv_bias": False},
        {"num_local_experts": 0},
        {"layer_types": ["full_attention", "mamba", "mamba"], "num_hidden_layers": 3},
    ),
}
