"""vLLM's NVFP4 and FP8 experts take no bias: plan and verify say so of gpt-oss."""

from pathlib import Path

import pytest

from mquant.checkpoint import Folder
from mquant.family_files import load_families
from mquant.findings import Finding
from mquant.runs.quantize import quantize
from mquant.synth import synth
from mquant.verify.judge import verify
from run import plan_of

FAMILIES = load_families()
ATTENTION = "name: attention\nsuffix: X\nroles: {attention: NVFP4A16}\n"


def biased(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.severity for finding in findings if finding.rule == "expert-bias"]


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return synth(tmp_path / "src", FAMILIES["gpt_oss"]).path


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8-dynamic"])
def test_quantized_experts_with_biases_are_warned_of_and_judged_broken(
    src: Path, tmp_path: Path, recipe: str
) -> None:
    plan = plan_of(src, recipe)
    quantize(plan, tmp_path / "out")

    assert biased(plan.findings) == ["warning"]
    assert biased(verify(Folder(tmp_path / "out"), FAMILIES).findings) == ["error"]


def test_kept_experts_may_have_biases(src: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "attention.yaml"
    recipe.write_text(ATTENTION)
    plan = plan_of(src, str(recipe))
    quantize(plan, tmp_path / "out")

    assert not biased(plan.findings)
    assert not biased(verify(Folder(tmp_path / "out"), FAMILIES).findings)
