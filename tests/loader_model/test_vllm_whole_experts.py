"""The loader of models that take all experts of a layer in one tensor: what vLLM 0.32 does."""

from typing import Any

import pytest

from mquant.family_files import load_families
from mquant.loader_model.vllm.load import Outcome
from mquant.loader_model.vllm.names import rename
from mquant.loader_model.vllm.predict import predict_of
from mquant.loader_model.vllm.tensors import Loaded
from mquant.synth import Precision, Sizes, make_config, make_tensors

FAMILY = load_families()["gpt_oss"]
CONFIG = make_config(FAMILY, Sizes(), Precision.BF16, tiny=True)
EXPERTS = "model.layers.0.mlp.experts"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def outcome(changes: dict[str, Loaded | None], **more: Any) -> Outcome:
    """Return what vLLM does with a tiny checkpoint of which some tensors are changed or lost."""
    made = make_tensors(FAMILY, CONFIG, Precision.BF16)
    tensors = {each.name: Loaded(each.name, each.dtype, each.shape) for each in made}
    left = {**tensors, **changes}
    return predict_of({**CONFIG, **more}, FAMILY, [each for each in left.values() if each])


def test_the_tensors_of_all_experts_are_loaded() -> None:
    assert outcome({}).loads


def test_a_quantization_config_of_null_stops_the_model() -> None:
    refused = ("config.json", "says quantization_config None, not a table")
    assert outcome({}, quantization_config=None).refused == refused


@pytest.mark.parametrize("last", ["gate_up_proj", "down_proj", "gate_up_proj_bias"])
def test_a_lost_tensor_stays_unset(last: str) -> None:
    assert len(outcome({f"{EXPERTS}.{last}": None}).unset) == 1


def test_a_tensor_with_rows_before_columns_is_refused() -> None:
    name = f"{EXPERTS}.gate_up_proj"
    assert outcome({name: Loaded(name, "BF16", (8, 100, 128))}).refused


def test_experts_in_fp8_have_biases_and_lack_their_scales() -> None:
    found = outcome({}, quantization_config=FP8)
    assert not found.refused
    assert {name for name, *_ in found.converted} >= {f"{EXPERTS}.gate_up_proj"}
    assert {name.rpartition("_")[2] for name, _ in found.unset} == {"scale"}


def test_the_bias_of_one_expert_is_loaded_and_its_gate_is_passed_over() -> None:
    bias = Loaded(f"{EXPERTS}.0.down_proj.bias", "BF16", (128,))
    gate = Loaded(f"{EXPERTS}.0.gate_proj.weight", "BF16", (64, 128))
    found = outcome({each.name: each for each in (bias, gate)})
    assert found.dropped == (gate.name,)


def test_a_rotary_embedding_without_the_keys_of_yarn_is_refused() -> None:
    assert outcome({}, rope_scaling=None).loads
    assert outcome({}, rope_scaling={"rope_type": "default"}).refused


def test_the_end_of_a_name_is_renamed() -> None:
    renames = (("a$", "b"),)
    assert rename("a.a", renames) == "a.b"
    assert rename("a.c", renames) == "a.c"
