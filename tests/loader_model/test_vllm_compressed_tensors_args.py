"""How strictly vLLM 0.32 parses a quantization config of compressed-tensors."""

import pytest

from compressed import (
    CACHE,
    FP8,
    INT4,
    NVFP4,
    O_PROJ,
    QKV,
    below,
    config,
    group,
    nvfp4,
    outcome,
    packed,
    parameters,
    refusal,
)
from mquant.loader_model.vllm.tensors import Loaded, Unknown


@pytest.mark.parametrize(
    "weights",
    [
        None,
        NVFP4 | {"scales": "fp8"},
        NVFP4 | {"group_size": None},
        FP8 | {"group_size": 16},
        FP8 | {"strategy": "block"},
        FP8 | {"strategy": "token"},
        FP8 | {"num_bits": 6},
        FP8 | {"scale_dtype": "torch.float9"},
        FP8 | {"strategy": "channel", "dynamic": True},
        FP8 | {"dynamic": "local"},
        FP8 | {"type": "complex"},
        INT4 | {"actorder": "group"},
        INT4 | {"actorder": "dynamic"},
        INT4 | {"actorder": True},
        INT4 | {"group_size": "32x"},
    ],
    ids=str,
)
def test_arguments_that_compressed_tensors_or_vllm_refuses(weights: object) -> None:
    assert "config.json" in refusal(packed(weights))


@pytest.mark.parametrize(
    "weights",
    [
        INT4 | {"strategy": None},
        INT4 | {"num_bits": "4", "type": "INT", "strategy": "Group"},
        INT4 | {"actorder": "static", "observer": "mse", "observer_kwargs": {"a": 1}},
    ],
    ids=str,
)
def test_arguments_that_are_inferred_and_coerced(weights: object) -> None:
    assert below(QKV, packed(weights)) == below(QKV, packed(INT4))


def test_integers_with_quantized_activations_need_input_activations() -> None:
    assert "without input_activations" in refusal(config(group(INT4, "int-quantized")))


def test_the_groups_format_wins_over_the_global_one() -> None:
    one = group(INT4, "pack-quantized")
    other = {**one, "format": None}

    assert below(QKV, config(one, format="dense")) == below(QKV, packed(INT4))
    assert below(QKV, config(other, format="pack-quantized")) == below(QKV, packed(INT4))
    assert refusal(config(other, format="dense"))


def test_a_group_for_attention_alone_is_passed_over_unread() -> None:
    attention = {"targets": ["SmallAttention"], "weights": "no table"}

    assert below(O_PROJ, config(attention, group(INT4, "pack-quantized"))) == below(
        O_PROJ, packed(INT4)
    )


def test_unknown_keys_of_a_group_and_of_the_config_are_allowed() -> None:
    assert below(O_PROJ, config({**group(INT4, "pack-quantized"), "new": 1}, new=1)) == below(
        O_PROJ, packed(INT4)
    )


def test_sparsity_is_refused_where_it_has_targets() -> None:
    assert "sparsity" in refusal(nvfp4(sparsity_config={"format": "x", "targets": ["Linear"]}))
    assert below(O_PROJ, nvfp4(sparsity_config={"format": "dense"})) == below(O_PROJ, nvfp4())


def test_transforms_of_activations_are_not_judged() -> None:
    apply = [{"targets": "Linear", "location": "input"}]

    with pytest.raises(Unknown):
        parameters(nvfp4(transform_config={"config_groups": {"a": {"type": "x", "apply": apply}}}))


def test_attention_takes_scales_of_the_kv_cache_that_no_checkpoint_needs() -> None:
    scale = Loaded("model.layers.0.attn.k_scale", "F32", (1,))
    plain = outcome(config(), scale)

    assert not plain.dropped
    assert not any("attn" in name for name, _ in plain.unset)


@pytest.mark.parametrize(
    "change", [{"num_bits": 4}, {"type": "int"}, {"strategy": "channel"}, {"symmetric": False}]
)
def test_the_kv_cache_is_symmetric_fp8_per_tensor_or_head(change: dict[str, object]) -> None:
    assert "kv_cache_scheme" in refusal(nvfp4(kv_cache_scheme=CACHE | change))
    assert parameters(nvfp4(kv_cache_scheme=CACHE | {"strategy": "attn_head"}))


def test_per_head_query_scales_are_reduced_to_kv_heads() -> None:
    heads = config(kv_cache_scheme=CACHE | {"strategy": "attn_head"})
    query = Loaded("model.layers.0.attn.q_scale", "F32", (4, 1, 1))
    key = Loaded("model.layers.0.attn.k_scale", "F32", (2, 1, 1))

    assert outcome(heads, query, key).dropped == (query.name,)


def test_an_expression_that_nobody_can_read_is_refused_where_vllm_reaches_it() -> None:
    reached = group(INT4, "pack-quantized", "re:.*o_proj", "re:(")
    unreached = group(INT4, "pack-quantized", "re:.*layers", "re:(")

    assert "expression" in refusal(nvfp4(ignore=["re:("]))
    assert "expression" in refusal(config(reached))
    assert "expression" in refusal(config(group(INT4, "pack-quantized", "re:(", "re:.*")))
    assert below(O_PROJ, config(unreached, ignore=["model.embed", "lm_head"])) == below(
        O_PROJ, packed(INT4)
    )


def test_an_expression_that_only_vllm_reads_is_not_judged() -> None:
    with pytest.raises(Unknown):
        parameters(nvfp4(ignore=["re:[[:alpha:]]+"]))


def test_an_expression_that_never_ends_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mquant.name_patterns.TIME_LIMIT", 0.3)

    with pytest.raises(Unknown):
        parameters(nvfp4(ignore=["re:(([a-z.0-9_]+)+)+$!"]))
