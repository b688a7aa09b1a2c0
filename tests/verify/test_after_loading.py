"""`verify` finds what goes wrong only after a loader has taken every tensor."""

import json
from pathlib import Path
from typing import Any

import pytest

from judges import read_json
from make import Edit, make_row
from mquant.checkpoint import Folder
from mquant.family_files import load_families
from mquant.synth import synth
from mquant.verify.judge import Depth, verify
from mutate import judged, mutated, scalar

pytestmark = pytest.mark.upstream

ATTENTION = "model.layers.{}.self_attn.attn"
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def with_kv_cache(good: Path, scheme: object = STATIC) -> dict[str, Any]:
    """Return a change of config.json that declares an FP8 KV cache."""
    table = read_json(good / "config.json")["quantization_config"]
    return {"quantization_config": {**table, "kv_cache_scheme": scheme}}


def kv_scales(value: float) -> Edit:
    """Return an edit that adds the scales of every layer's keys and values."""
    raw = bytes(scalar(value)(make_row("x", "F32", ())[3]))  # type: ignore[arg-type]
    names = (f"{ATTENTION.format(n)}.{kind}_scale" for n in range(2) for kind in "kv")
    return lambda rows: [*rows, *((name, "F32", (), raw) for name in names)]


def test_more_experts_per_token_than_experts_are_an_error(parent: Path, tmp_path: Path) -> None:
    assert judged(mutated(parent, tmp_path, config={"num_experts_per_tok": 4})) == {}
    findings = judged(mutated(parent, tmp_path / "5", config={"num_experts_per_tok": 5}))
    assert findings == {
        "top-k-beyond-experts": "config.json says num_experts_per_tok 5, but a layer has 4 experts."
    }


def test_a_default_that_no_release_uses_is_a_warning(tmp_path: Path) -> None:
    plain = synth(tmp_path / "plain", load_families()["qwen3_moe"]).path
    assert judged(plain) == {}
    findings = judged(mutated(plain, tmp_path, config={"rope_theta": ..., "norm_topk_prob": ...}))
    assert findings == {
        "config-default-taken": "config.json lacks norm_topk_prob, rope_theta: vLLM takes False "
        "for norm_topk_prob and 10000 for rope_theta."
    }


def test_a_larger_models_defaults_are_those_of_its_text_model(tmp_path: Path) -> None:
    src = synth(tmp_path / "src", load_families()["kimi_k25"]).path
    config = read_json(src / "config.json")
    text = {key: value for key, value in config["text_config"].items() if key != "scoring_func"}

    def rules(**changes: Any) -> set[str]:
        (src / "config.json").write_text(json.dumps({**config, **changes}))
        report = verify(Folder(src), load_families(), Depth.STRUCTURE)
        return {finding.rule for finding in report.findings}

    assert "config-default-taken" not in rules()
    assert "config-default-taken" in rules(text_config=text)


def test_declared_kv_scales_that_are_missing_are_a_warning(good: Path, tmp_path: Path) -> None:
    bad = mutated(good, tmp_path, config=with_kv_cache(good))
    assert judged(bad, severities=("error",)) == {}
    assert "no shard holds k_scale" in judged(bad)["kv-scales-missing"]
    config = with_kv_cache(good)
    whole = mutated(good, tmp_path / "whole", edit=kv_scales(0.02), config=config)
    assert judged(whole, depth=Depth.NUMBERS) == {}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_kv_scales_are_finite_and_positive(good: Path, tmp_path: Path, value: float) -> None:
    bad = mutated(good, tmp_path, edit=kv_scales(value), config=with_kv_cache(good))
    assert judged(bad) == {}  # headers do not show the fault
    assert f"is {value:g}" in judged(bad, depth=Depth.NUMBERS)["kv-scale-invalid"]
