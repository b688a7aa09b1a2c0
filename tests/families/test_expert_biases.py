"""vLLM's NVFP4 and FP8 experts take no bias: plan refuses gpt-oss, and verify calls it broken."""

from pathlib import Path

import pytest

from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.findings import Finding
from mquant.plan import make_plan
from mquant.recipe import find_recipe
from mquant.runs.quantize import quantize
from mquant.synth import Precision, synth
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


@pytest.fixture
def released(tmp_path: Path) -> Path:
    return synth(tmp_path / "gpt", FAMILIES["gpt_oss"], precision=Precision.MXFP4_BLOCKS).path


@pytest.mark.parametrize(
    ("wish", "does"),
    [("source", "keeps {} as MXFP4A16"), ("NVFP4A16", "quantizes {}")],
)
def test_experts_of_a_release_in_mxfp4_are_refused_with_advice_that_says_what_it_does(
    released: Path, tmp_path: Path, wish: str, does: str
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: mine\nsuffix: X\nroles: {{attention: NVFP4A16, expert: {wish}}}\n")
    (refusal,) = plan_of(released, str(recipe)).refusals
    experts = "model.layers.0.mlp.experts"
    named = ", ".join(f"{experts}.{number}.down_proj" for number in range(3))

    assert refusal.message == (
        f"Recipe mine {does.format(f'{named} and 45 more')}, in the layout of compressed-tensors. "
        "They have biases, and vLLM takes no bias of such experts."
    )
    assert refusal.fix == (
        "Use the source as it is; or leave expert out of the recipe's roles, or ignore them, and "
        "the experts become BF16 (or --allow-unsafe to do so anyway)."
    )


def test_the_advice_on_a_release_in_mxfp4_can_be_followed(released: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "attention.yaml"
    recipe.write_text(ATTENTION)
    plan = plan_of(released, str(recipe))
    experts = [action for action in plan.actions if ".mlp.experts." in action.source.name]

    assert not plan.refusals
    assert {each.dtype for action in experts for each in action.outputs} == {"BF16"}
