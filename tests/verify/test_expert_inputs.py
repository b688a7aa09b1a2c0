"""`verify` compares the scales of FP8 experts' inputs as vLLM does while loading them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from make import Row, make_checkpoint
from mquant.verify.judge import Depth
from mutate import judged, mutated

EXPERT = "model.layers.0.block_sparse_moe.experts.1."
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"g": {"targets": ["Linear"], "weights": FP8, "input_activations": FP8}},
    "ignore": ["lm_head", "model.embed_tokens", "re:.*self_attn.*", r"re:.*\.gate$"],
}


def experts(tmp_path: Path, scales: dict[str, float]) -> Path:
    """Write a checkpoint of static FP8 experts, with other input scales than 0.5 for some."""

    def scale(name: str, value: float) -> Row:
        return name, "F32", (1,), np.float32(value).tobytes()

    def edit(rows: list[Row]) -> list[Row]:
        edited: list[Row] = []
        for name, dtype, shape, raw in rows:
            if ".experts." not in name:
                edited.append((name, dtype, shape, raw))
                continue
            module = name.removesuffix(".weight")
            value = scales.get(module.removeprefix(EXPERT), 0.5) if EXPERT in name else 0.5
            edited.append((name, "F8_E4M3", shape, bytes([0x38]) * (len(raw) // 2)))
            edited.append(scale(f"{module}.weight_scale", 0.5))
            edited.append(scale(f"{module}.input_scale", value))
        return edited

    config: dict[str, Any] = {"quantization_config": CONFIG}
    return make_checkpoint(tmp_path / "src", edit=edit, config=config)


def test_gate_and_up_of_different_scales_are_refused(tmp_path: Path) -> None:
    bad = experts(tmp_path, {"w1": 0.5, "w3": 0.25})
    assert judged(bad) == {}
    findings = judged(bad, depth=Depth.NUMBERS)
    assert findings == {
        "expert-input-scales-differ": f"{EXPERT}w1.input_scale is 0.5 and {EXPERT}w3.input_scale "
        "is 0.25."
    }


@pytest.mark.parametrize(
    "scales",
    [
        {},
        {"w1": 0.5, "w3": 0.500005},  # vLLM takes what differs by 0.00001
        {"w1": 1.0, "w3": 0.25},  # the parameter is 1 at first, so vLLM does not compare a 1
        {"w2": 0.25},  # down reads another input
    ],
)
def test_scales_that_vllm_takes_are_clean(tmp_path: Path, scales: dict[str, float]) -> None:
    assert judged(experts(tmp_path, scales), depth=Depth.NUMBERS) == {}


def test_other_methods_do_not_compare_the_scales(tmp_path: Path) -> None:
    src = experts(tmp_path, {"w1": 0.5, "w3": 0.25})
    config = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "ignored_layers": [
            f"model.layers.{number}.self_attn.{name}_proj"
            for number in range(json.loads((src / "config.json").read_text())["num_hidden_layers"])
            for name in "qkvo"
        ],
    }
    other = mutated(src, tmp_path / "other", config={"quantization_config": config})
    assert "expert-input-scales-differ" not in judged(other, depth=Depth.NUMBERS)
