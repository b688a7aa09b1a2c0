"""A config.json that asks for what the decoder does not know is refused in one sentence."""

from typing import Any

import pytest

from mquant.errors import SourceError
from mquant.family_files import load_families
from mquant.forward.shape import Shape, shape_of


def _shape(name: str, context: int, **config: Any) -> Shape:
    family = load_families()[name]
    return shape_of(family, family.with_settings(family.synth.config, config), context)


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        ("jamba", {}, "Jamba cannot be evaluated: mquant does not know its forward pass"),
        ("llama", {"hidden_act": "gelu"}, "mquant does not know hidden_act gelu, only silu."),
        ("llama", {"sliding_window": 8}, "Attention slides over 8 tokens, fewer than the context"),
        ("llama", {"num_hidden_layers": None}, "config.json does not say num_hidden_layers."),
        ("llama", {"num_attention_heads": 0}, "config.json describes no model: "),
        ("llama", {"num_key_value_heads": 5}, "32 heads cannot share 5 heads of keys"),
        ("qwen3", {"rope_scaling": {"type": "dynamic"}}, "mquant does not know RoPE of type dyn"),
        ("qwen3", {"layer_types": ["chunked_attention"]}, "mquant does not know layers of chunked"),
        ("phi3", {"partial_rotary_factor": 2.0}, "config.json rotates 256 of the 128 numbers"),
        ("olmoe", {"clip_qkv": 8}, "mquant does not know clip_qkv 8, only null."),
        ("deepseek_v2", {"norm_topk_prob": True}, "mquant does not know norm_topk_prob True"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "mquant does not know scoring_func softmax"),
        ("deepseek_v3", {"topk_method": "greedy"}, "mquant does not know topk_method greedy"),
        ("deepseek_v3", {"n_group": None}, "config.json does not say n_group."),
        ("deepseek_v3", {"n_group": 7}, "256 experts cannot be in 7 groups"),
        ("deepseek_v3", {"topk_group": 9}, "256 experts cannot be in 8 groups, of which 9"),
        ("deepseek_v3", {"topk_group": 0}, "256 experts cannot be in 8 groups, of which 0"),
        ("deepseek_v3", {"num_experts_per_tok": 200}, "A token cannot choose 200 of 128 experts"),
        ("deepseek_v3", {"routed_scaling_factor": None}, "config.json does not say routed_scal"),
        ("deepseek_v3", {"v_head_dim": None}, "config.json does not say v_head_dim."),
        ("glm4_moe", {"norm_topk_prob": None}, "config.json does not say norm_topk_prob."),
        ("hy_v3", {"route_norm": False}, "mquant does not know route_norm False, only True."),
    ],
)
def test_an_unknown_configuration_is_refused(
    name: str, config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SourceError) as caught:
        _shape(name, 64, **config)
    assert caught.value.message.startswith(sentence)


def test_what_matters_to_long_windows_only_is_refused_for_these() -> None:
    assert _shape("deepseek_v32", 2048).layers == 61
    with pytest.raises(SourceError, match="looks at 2048 tokens that an indexer chooses"):
        _shape("deepseek_v32", 2049)
    assert _shape("mistral4", 8192).layers == 36
    with pytest.raises(SourceError, match="scores of positions from 8192 on"):
        _shape("mistral4", 8193)
    assert _shape("mistral", 64, sliding_window=32).spans[0] == 32
