"""Facts of multimodal families: rotary embeddings by type of layer, keys as values, towers."""

from collections.abc import Mapping
from typing import Any

import pytest

from mquant.family_files import load_families
from mquant.loader_model.vllm.load import Outcome
from mquant.loader_model.vllm.predict import predict_of
from mquant.loader_model.vllm.tensors import Loaded
from mquant.synth import Precision, Sizes, make_config, make_tensors

FULL = "language_model.model.layers.1"


def checkpoint(
    name: str, outer: Mapping[str, Any], inner: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Loaded]]:
    """Return the tiny checkpoint of a family, with changes outside and inside text_config."""
    family = load_families()[name]
    config = make_config(family, Sizes(), Precision.BF16, tiny=True)
    tensors = make_tensors(family, config, Precision.BF16)
    loaded = {each.name: Loaded(each.name, each.dtype, each.shape) for each in tensors}
    return {**config, **outer, "text_config": {**config["text_config"], **inner}}, loaded


def outcome(name: str, outer: Mapping[str, Any] | None = None, **inner: Any) -> Outcome:
    config, tensors = checkpoint(name, outer or {}, inner)
    return predict_of(config, load_families()[name], tensors.values())


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "kimi_k25", "llama4", "qwen3_vl"])
def test_the_tiny_checkpoint_loads(name: str) -> None:
    assert outcome(name).loads


BASE = {"rope_theta": 1e4}
TABLES = {"full_attention": BASE, "sliding_attention": BASE}


@pytest.mark.parametrize(
    ("name", "inner", "says"),
    [
        ("gemma3", {"rope_parameters": TABLES, "rope_scaling": None}, ""),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8}}, "without a point"),
        ("gemma3", {"rope_scaling": 8}, "not a table"),
        ("gemma3", {"rope_parameters": {"sliding_attention": BASE}}, "no full_attention"),
        ("gemma3", {"rope_local_base_freq": "x"}, "not a number"),
        ("gemma4", {"rope_parameters": TABLES}, ""),
        ("gemma4", {"rope_parameters": {**TABLES, "full_attention": {}}}, "not a number"),
        ("gemma4", {"rope_parameters": {**TABLES, "full_attention": 1}}, "not a table"),
    ],
)
def test_each_type_of_layer_has_a_rotary_embedding(
    name: str, inner: Mapping[str, Any], says: str
) -> None:
    found = outcome(name, **inner)
    assert says in found.refused[1] if found.refused else not says and found.loads


def test_a_rotary_embedding_must_be_told_for_each_type() -> None:
    assert "rope_parameters" in outcome("gemma4", rope_parameters={"full_attention": BASE}).unknown


def test_the_last_layer_of_gemma_4_has_full_attention() -> None:
    assert outcome("gemma4", layer_types=["sliding_attention"] * 2).loads


def test_keys_fill_the_values_that_are_not_on_disk() -> None:
    config, tensors = checkpoint("gemma4", {}, {})
    family = load_families()["gemma4"]
    own = "model.language_model.layers.1.self_attn"
    assert f"{own}.v_proj.weight" not in tensors
    lost = {name: each for name, each in tensors.items() if name != f"{own}.k_proj.weight"}
    unset = dict(predict_of(config, family, lost.values()).unset)
    assert unset == {f"{FULL}.self_attn.qkv_proj.weight": 2 * tensors[f"{own}.k_proj.weight"].numel}
    value = Loaded(f"{own}.v_proj.weight", "BF16", tensors[f"{own}.k_proj.weight"].shape)
    assert predict_of(config, family, [*tensors.values(), value]).refused


@pytest.mark.parametrize("key", ["layer_scalar", "std_bias"])
def test_a_buffer_may_be_absent(key: str) -> None:
    config, tensors = checkpoint("gemma4", {}, {})
    kept = [each for name, each in tensors.items() if not name.endswith(key)]
    assert len(kept) < len(tensors)
    assert predict_of(config, load_families()["gemma4"], kept).loads


@pytest.mark.parametrize(
    ("outer", "inner", "gap"),
    [
        ({"audio_config": {"hidden_size": 8}}, {}, "audio_config"),
        ({"vision_config": {"use_clipped_linears": True}}, {}, "use_clipped_linears"),
        ({}, {"num_kv_shared_layers": 1}, "num_kv_shared_layers"),
    ],
)
def test_what_gemma_4_may_have_beside_is_not_judged(
    outer: Mapping[str, Any], inner: Mapping[str, Any], gap: str
) -> None:
    assert gap in outcome("gemma4", outer, **inner).unknown


def test_gemma_4_needs_its_tower() -> None:
    found = outcome("gemma4", {"vision_config": None})
    assert found.refused and "vision_config" in found.refused[1]


def test_rows_that_vllm_reorders_are_pairs_in_every_head() -> None:
    config, tensors = checkpoint("llama4", {}, {})
    name = f"{FULL}.self_attn.k_proj.weight"
    rows, columns = tensors[name].shape
    for shape in ((rows - 1, columns), (rows, columns, 1), ()):
        tensors[name] = Loaded(name, "BF16", shape)
        found = predict_of(config, load_families()["llama4"], tensors.values())
        assert found.refused and "pairs of rows" in found.refused[1]


@pytest.mark.parametrize("ties", [True, False])
def test_embeddings_are_tied_without_a_word(ties: bool) -> None:
    config, tensors = checkpoint("gemma3", {} if ties else {"tie_word_embeddings": False}, {})
    family = load_families()["gemma3"]
    assert predict_of(config, family, tensors.values()).loads is ties
    assert family.tied_heads(config) == (("lm_head",) if ties else ())


@pytest.mark.parametrize(
    ("model_type", "known"), [("deepseek_v3", True), ("zeta", False), (7, False)]
)
def test_a_text_model_that_kimi_k25_does_not_have_is_not_judged(
    model_type: object, *, known: bool
) -> None:
    family = load_families()["kimi_k25"]
    config = make_config(family, Sizes(), Precision.BF16, tiny=True)
    config = {**config, "text_config": {**config["text_config"], "model_type": model_type}}
    outcome = predict_of(config, family, [])
    assert ("text_config of model_type" not in outcome.unknown) is known
