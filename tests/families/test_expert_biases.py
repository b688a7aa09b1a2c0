"""vLLM's NVFP4 and FP8 experts take no bias: plan refuses gpt-oss, and verify calls it broken."""

from pathlib import Path

import pytest

from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.findings import Finding
from mquant.plan import make_plan
from mquant.recipe import find_recipe
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
def test_quantized_experts_with_biases_are_refused_and_judged_broken(
    src: Path, tmp_path: Path, recipe: str
) -> None:
    refused = plan_of(src, recipe)
    plan = make_plan(open_checkpoint(Folder(src)), find_recipe(recipe), FAMILIES, allow_unsafe=True)
    quantize(plan, tmp_path / "out")

    assert biased(refused.findings) == ["error"]
    assert biased(plan.findings) == ["warning"]
    assert biased(verify(Folder(tmp_path / "out"), FAMILIES).findings) == ["error"]


def test_kept_experts_may_have_biases(src: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "attention.yaml"
    recipe.write_text(ATTENTION)
    plan = plan_of(src, str(recipe))
    quantize(plan, tmp_path / "out")
    report = verify(Folder(tmp_path / "out"), FAMILIES)

    assert r"re:model\.layers\.0\.mlp\.experts\.0\.down_proj$" in plan.ignore
    assert not plan.findings
    assert not report.undecided
    assert not [finding for finding in report.findings if finding.severity == "error"]
