"""MiniMax-M3 in vLLM: q, k and v in one matrix with those of an index, below a vision tower."""

from typing import Any

import pytest

from mquant.family_files import load_families
from mquant.loader_model.vllm.load import Outcome
from mquant.loader_model.vllm.predict import predict_of
from mquant.loader_model.vllm.tensors import Loaded
from mquant.synth import Precision, Sizes, make_config, make_tensors

FAMILY = load_families()["minimax_m3_vl"]
CONFIG = make_config(FAMILY, Sizes(), Precision.BF16, tiny=True)
TENSORS = [
    Loaded(each.name, each.dtype, each.shape)
    for each in make_tensors(FAMILY, CONFIG, Precision.BF16)
]
INSIDE = "language_model.model.layers.1."


def outcome(*more: Loaded, without: str = "", **changes: Any) -> Outcome:
    """Return what vLLM does with a tiny checkpoint."""
    left = [each for each in TENSORS if each.name != without]
    return predict_of({**CONFIG, **changes}, FAMILY, [*left, *more])


def test_the_index_and_the_tower_are_loaded() -> None:
    assert outcome().loads


@pytest.mark.parametrize(
    "name", [f"{INSIDE}self_attn.index_k_proj.weight", "patch_merge_mlp.linear_1.weight"]
)
def test_a_lost_matrix_stays_unset(name: str) -> None:
    assert len(outcome(without=name).unset) == 1


def test_a_cache_in_nvfp4_is_not_judged() -> None:
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    cache = {"kv_cache_scheme": {"dynamic": False, "num_bits": 4, "type": "float"}}
    assert "NVFP4" in outcome(quantization_config={**config, **cache}).unknown


def test_a_name_that_the_model_lacks_is_passed_over() -> None:
    note = Loaded(f"{INSIDE}self_attn.note.weight", "BF16", (4,))
    assert outcome(note).dropped == (note.name,)


def test_multi_token_prediction_is_left_out() -> None:
    assert outcome(Loaded("language_model.model.mtp.layers.0.note.weight", "BF16", (4,))).loads


def test_a_tower_needs_its_sizes() -> None:
    table = {key: each for key, each in CONFIG["vision_config"].items() if key != "patch_size"}
    assert outcome(vision_config=table).refused == (
        "config.json",
        "has no vision_config.patch_size",
    )


def test_the_index_has_as_many_heads_as_k() -> None:
    sparse = {**CONFIG["text_config"]["sparse_attention_config"], "sparse_num_index_heads": 4}
    text = {**CONFIG["text_config"], "sparse_attention_config": sparse}
    assert outcome(text_config=text).refused


@pytest.mark.parametrize(("method", "loads"), [("fp8", False), ("modelopt", True)])
def test_modelopt_leaves_towers_plain(method: str, loads: bool) -> None:
    ignored = [
        each.name.removesuffix(".weight") for each in TENSORS if "language_model" in each.name
    ]
    ignored = [each for each in ignored if ".experts." not in each]
    ignored += [f"{INSIDE}block_sparse_moe.experts", "language_model.lm_head"]
    found = outcome(
        quantization_config={
            "quant_method": method,
            "quant_algo": "FP8",
            "activation_scheme": "dynamic",
            "ignore": ignored,
            "ignored_layers": ignored,
        }
    )
    assert found.loads is loads
