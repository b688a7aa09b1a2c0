"""A source in MXFP4 on the command line: what the run says, what --exact refuses, and the card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import mx_sources
from cards import card_of
from mquant.cli.app import app
from mx_sources import Scales, in_mxfp4

pytestmark = pytest.mark.upstream

W3 = "model.layers.1.block_sparse_moe.experts.2.w3"


def ran(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def wide(module: str, scales: Scales) -> Scales:
    """Give one row of one expert scales far below the others."""
    scales = scales.copy()
    if module == W3:
        scales[0] = 60
    return scales


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)
    return lambda **options: mx_sources.source(tmp_path, in_mxfp4(**options)).name


def test_a_run_says_how_many_blocks_are_lossless(source: Callable[..., str]) -> None:
    result = ran("quantize", source(), "--recipe", "nvfp4", "-o", "out", "--exact")
    assert "lossless: 92,160 of 92,160 blocks" in result.stdout
    again = ran("quantize", "bad", "--recipe", "nvfp4", "-o", "out", "--format", "json")
    report: dict[str, Any] = json.loads(again.stdout)
    assert report["already_done"]
    assert report["cast"] == {
        "blocks": 92160,
        "lossless": 92160,
        "requantized": {},
        "unsafe_for_marlin": [],
    }


@pytest.mark.parametrize("verb", ["plan", "quantize"])
def test_exact_refuses_where_a_block_would_be_rounded_again(
    source: Callable[..., str], verb: str
) -> None:
    result = ran(verb, source(shift=wide), "--recipe", "nvfp4", "-o", "out", "--exact", code=1)
    words = " ".join(result.output.split())
    assert f"16 blocks of {W3} are rounded again" in words
    assert "unsafe for FP4 Marlin" in words
    assert not Path("out").exists()


def test_the_card_says_what_the_cast_kept(source: Callable[..., str]) -> None:
    ran("quantize", source(shift=wide), "--recipe", "nvfp4", "-o", "out")
    assert (
        "Weights that the parent stores in MXFP4 became NVFP4 with the same codes, lossless: "
        "92,144 of 92,160 blocks of 16 weights are equal to the parent's. Rounded again: 16 blocks."
    ) in card_of(Path("out"))


def test_a_run_says_what_it_starts_from_and_what_a_second_rounding_costs(
    source: Callable[..., str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{name: x, suffix: X, roles: {expert: FP8_DYNAMIC}}")
    result = ran("quantize", source(), "--recipe", recipe, "-o", "out")
    words = " ".join(result.output.split())
    assert "bad is quantized (compressed-tensors MXFP4): 90 weights are dequantized" in words
    assert "a BF16 parent of bad would be better to start from" in words
    assert "compressed-tensors MXFP4 to FP8_DYNAMIC: a relative error of " in words
    assert " of 90 weights." in words
