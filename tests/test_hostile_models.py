"""`mquant eval` of a damaged model ends in one sentence, and in JSON without NaN."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hostile_inputs import WORDS, is_json, tokenizer_json
from make import Row
from mutate import mutated
from test_hostile_inputs import KEY, run, src, told

__all__ = ["src"]


def spoiled(src: Path, where: Path, name: str, value: float, dtype: str = "F32") -> Path:
    """Write a copy of a checkpoint with one element of one tensor changed."""

    def edit(rows: list[Row]) -> list[Row]:
        for number, (row, _, shape, _) in enumerate(rows):
            if row == name:
                values = np.ones(shape, "<f4")
                values.reshape(-1)[0] = value
                rows[number] = (row, dtype, shape, values.tobytes())
        return rows

    return mutated(src, where, edit=edit)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.embed_tokens.weight", "the embeddings"),
        (KEY, "layer 0"),
        ("lm_head.weight", "the logits"),
    ],
)
def test_a_model_that_computes_no_number_is_not_evaluated(
    src: Path, tmp_path: Path, name: str, where: str, value: float
) -> None:
    bad = spoiled(src, tmp_path, name, value)
    (bad / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "text").write_text(" ".join(WORDS))

    result = run("eval", bad, "--text", tmp_path / "text", "--format", "json")

    assert is_json(result.stdout)
    document = json.loads(result.stdout)
    if np.isfinite(value) and document["ok"]:
        return  # a large number need not overflow
    assert result.exit_code == 1
    assert not document["ok"]
    assert "cannot be evaluated" in document["error"]["message"]
    assert where in document["error"]["message"] or not np.isfinite(value)
    assert "RuntimeWarning" not in result.stderr


@pytest.mark.parametrize(
    "config",
    [
        {"rms_norm_eps": "x"},
        {"num_attention_heads": 0},
        {"head_dim": 2**40},
        {"rotary_dim": 2**40},
        {"num_hidden_layers": 10**9},
        {"num_experts_per_tok": 100},
        {"rope_scaling": [1]},
        {"rope_theta": {}},
        {"hidden_size": 63},
    ],
)
def test_a_config_that_the_weights_do_not_fit_is_one_sentence(
    src: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    bad = mutated(src, tmp_path, config=config)
    (bad / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "text").write_text(" ".join(WORDS))

    result = run("eval", bad, "--text", tmp_path / "text")

    if result.exit_code:
        assert told(result)
