"""The entries of a recipe match module names, and an entry without a match is reported."""

from pathlib import Path

import pytest

from make import make_checkpoint
from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.family_rows import Role
from mquant.findings import Finding
from mquant.plan import Plan, make_plan
from mquant.recipe import Recipe
from recipe_files import OURS, foreign, loaded

UNMATCHED = (
    "'model.layers.0.typo' in ignore of recipe mine matches no module of src.",
    "Correct the entry, or remove it. Names are those of the hub or of transformers; `re:` "
    "entries match from the start of a name.",
)


def planned(tmp_path: Path, recipe: Recipe) -> Plan:
    checkpoint = open_checkpoint(Folder(make_checkpoint(tmp_path / "src")))
    return make_plan(checkpoint, recipe, load_families())


def findings(tmp_path: Path, recipe: Recipe, rule: str) -> list[Finding]:
    return [finding for finding in planned(tmp_path, recipe).findings if finding.rule == rule]


@pytest.mark.parametrize(
    "gates",
    ["re:.*block_sparse_moe\\.gate$", "re:.*mlp\\.gate$", "re:model.layers.\\d+.mlp.gate"],
)
def test_ignore_takes_names_of_the_hub_or_of_the_model_in_memory(
    tmp_path: Path, gates: str
) -> None:
    plan = planned(
        tmp_path, foreign(tmp_path, f"{{scheme: NVFP4A16, ignore: [lm_head, '{gates}']}}")
    )

    assert plan.findings == ()
    assert [a.role for a in plan.actions if a.scheme and a.role is Role.ROUTER] == []


def test_an_entry_that_matches_nothing_is_an_error_in_a_recipe_of_ours(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, OURS + "ignore: [model.layers.0.typo]\n")

    (finding,) = findings(tmp_path, recipe, "entry-unmatched")

    assert (finding.severity, finding.where) == ("error", "model.layers.0.typo")
    assert (finding.message, finding.fix) == UNMATCHED


def test_an_entry_that_matches_nothing_is_a_warning_in_a_recipe_of_llmcompressors(
    tmp_path: Path,
) -> None:
    recipe = foreign(tmp_path, "{scheme: NVFP4A16, ignore: [lm_head, model.layers.0.typo]}")

    (finding,) = findings(tmp_path, recipe, "entry-unmatched")

    assert finding.severity == "warning"
    assert (finding.message, finding.fix) == UNMATCHED


def test_a_target_that_matches_nothing_is_reported(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, OURS + "targets: ['re:.*experts.*', 're:experts']\n")

    (finding,) = findings(tmp_path, recipe, "entry-unmatched")

    assert finding.message == "'re:experts' in targets of recipe mine matches no module of src."
