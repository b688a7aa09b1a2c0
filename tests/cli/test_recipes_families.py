"""`mquant recipes` and `mquant families` list and show the shipped files."""

import json

import pytest
import yaml
from typer.testing import CliRunner, Result

from mquant.cli.app import app
from mquant.data_files import folder


def mquant(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_recipes_are_listed_with_title_and_description() -> None:
    result = mquant("recipes")
    assert result.exit_code == 0
    assert "\nnvfp4  NVFP4A16, min-max scales\n  Experts and attention in" in result.stdout


def test_recipes_as_json() -> None:
    document = json.loads(mquant("recipes", "--format", "json").stdout)
    assert (document["schema"], document["ok"]) == ("mquant.recipes/1", True)
    names = [recipe["name"] for recipe in document["recipes"]]
    assert names == sorted(path.stem for path in folder("recipes").glob("*.yaml"))
    assert set(document["recipes"][0]) == {"name", "title", "description"}


def test_families_are_listed_with_their_model_types() -> None:
    result = mquant("families")
    assert result.exit_code == 0
    assert "minimax_m2  MiniMax-M2 (model_type minimax_m2)\n" in result.stdout


def test_families_as_json() -> None:
    document = json.loads(mquant("families", "--format", "json").stdout)
    assert document["schema"] == "mquant.families/1"
    listed = {"name": "minimax_m2", "title": "MiniMax-M2", "model_types": ["minimax_m2"]}
    assert listed in document["families"]


FAMILIES = ", ".join(sorted(path.stem for path in folder("configs").glob("*.yaml")))
RECIPES = ", ".join(sorted(path.stem for path in folder("recipes").glob("*.yaml")))
SHOWN = [("recipes", "nvfp4", "recipes"), ("families", "minimax_m2", "configs")]


@pytest.mark.parametrize(("verb", "name", "kind"), SHOWN)
def test_show_prints_the_file_itself(verb: str, name: str, kind: str) -> None:
    text = (folder("recipes" if kind == "recipes" else "configs") / f"{name}.yaml").read_text()
    assert mquant(verb, "show", name).stdout == text


@pytest.mark.parametrize(("verb", "name", "kind"), SHOWN)
def test_show_gives_the_content_as_json(verb: str, name: str, kind: str) -> None:
    text = (folder("recipes" if kind == "recipes" else "configs") / f"{name}.yaml").read_text()
    document = json.loads(mquant(verb, "show", name, "--format", "json").stdout)
    assert document["schema"] == f"mquant.{verb}.show/1"
    assert document["name"] == name
    assert document["content"] == yaml.safe_load(text)


def test_show_prints_nothing_in_quiet() -> None:
    assert mquant("recipes", "show", "nvfp4", "--format", "quiet").stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("recipes", "show", "nvpf4"),
            "Error: There is no recipe 'nvpf4'.\n"
            f"Take one of: {RECIPES}. Example: mquant recipes show fp8-block\n",
        ),
        (
            ("families", "show", "../recipes/nvfp4"),
            "Error: There is no family '../recipes/nvfp4'.\n"
            f"Take one of: {FAMILIES}. Example: mquant families show afmoe\n",
        ),
        (
            ("recipes", "show"),
            f"Error: NAME is missing.\nTake one of: {RECIPES}. "
            "Example: mquant recipes show fp8-block\n",
        ),
    ],
)
def test_a_wrong_name_is_a_usage_error_with_an_example(
    arguments: tuple[str, ...], message: str
) -> None:
    result = mquant(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)
