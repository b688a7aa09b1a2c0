"""`--family FILE` and `mquant families check` take a family that does not ship with mquant."""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from judges import hashes
from make import make_checkpoint
from mquant.cli.app import app
from mquant.data_files import folder
from mquant.output import SHARES

Edit = Callable[[dict[str, Any]], None]


def mquant(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def quantize(*arguments: str | Path) -> Result:
    options = ("quantize", "model", "--recipe", "nvfp4", "--max-shard-size", "20kB")
    return mquant(*options, *arguments)


def family_file(name: str, edit: Edit = lambda data: None) -> Path:
    """Write the family of MiniMax-M2 as a user's own file, for model_type `unheard_of`."""
    data = yaml.safe_load((folder("configs") / "minimax_m2.yaml").read_text())
    data |= {"name": "mine", "title": "My Model", "model_types": ["unheard_of"]}
    data["synth"]["config"]["model_type"] = "unheard_of"
    edit(data)
    path = Path(name)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@pytest.fixture(autouse=True)
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of an unknown model_type in the current folder, and a family file for it."""
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "model", config={"model_type": "unheard_of"})
    return family_file("mine.yaml")


def test_every_verb_that_takes_src_takes_a_family_file() -> None:
    root: Any = typer.main.get_command(app)
    takers = {
        name: {option for param in command.params for option in param.opts}
        for name, command in root.commands.items()
        if any(p.metavar == "SRC" and p.param_type_name == "argument" for p in command.params)
    }
    assert {"inspect", "quantize", "push", "calibrate"} < set(takers)
    assert [name for name, options in takers.items() if "--family" not in options] == []


def test_inspect_names_the_family_of_the_file(user_file: Path) -> None:
    assert json.loads(mquant("inspect", "model", "--format", "json").stdout)["family"] is None
    facts = json.loads(mquant("inspect", "model", "--family", user_file, "--format", "json").stdout)
    assert facts["family"] == "mine"


def test_an_unknown_family_is_refused_and_the_fix_names_the_option() -> None:
    result = quantize("-o", "out")
    assert result.exit_code == 1
    assert "given with --family FILE: see docs/adding-a-family.md" in result.stderr


def test_a_checkpoint_of_a_family_file_is_judged_with_that_file(user_file: Path) -> None:
    quantized = quantize("-o", "out", "--family", user_file)
    assert quantized.exit_code == 0, quantized.output
    own = ("--family", user_file)
    for verb in (("verify", "out", "--against", "model"), ("verify-ignore", "out")):
        result = mquant(*verb, *own)
        assert result.exit_code == 0, result.output
        assert "unheard_of" not in result.output
    compared = mquant("compare", "out", "--against", "model", *own, "--format", "json")
    roles = {row["role"] for row in json.loads(compared.stdout)["roles"]}
    assert {"expert", "attention", "router"} <= roles
    dequantized = mquant("dequantize", "out", "-o", "back", *own)
    assert dequantized.exit_code == 0, dequantized.output


def test_a_family_file_comes_before_the_family_that_ships(tmp_path: Path) -> None:
    def without_head(data: dict[str, Any]) -> None:
        data["model_types"] = ["minimax_m2"]
        data["synth"]["config"]["model_type"] = "minimax_m2"
        data["tensors"] = [row for row in data["tensors"] if row["role"] != "head"]

    src = make_checkpoint(tmp_path / "known")
    assert mquant("plan", src, "--recipe", "nvfp4").exit_code == 0
    result = mquant("plan", src, "--recipe", "nvfp4", "--family", family_file("b", without_head))
    assert result.exit_code == 1
    assert "My Model has no such tensor as lm_head.weight" in result.output


def test_shares_carry_the_family_to_finish(user_file: Path) -> None:
    assert quantize("-o", "whole", "--family", user_file).exit_code == 0
    for number in (1, 2):
        share = quantize("-o", "out", "--family", user_file, "--share", f"{number}/2")
        assert share.exit_code == 0, share.output
    user_file.unlink()
    finished = mquant("finish", "out")
    assert finished.exit_code == 0, finished.output
    assert hashes(Path("out")) == hashes(Path("whole"))


def test_shares_of_a_shipped_family_do_not_record_the_family(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "known")
    mquant("quantize", "known", "--recipe", "nvfp4", "-o", "out", "--share", "1/2")
    assert "family" not in json.loads((Path("out") / SHARES).read_bytes())["order"]


def test_another_family_file_is_another_run(user_file: Path) -> None:
    assert quantize("-o", "out", "--family", user_file, "--share", "1/2").exit_code == 0
    other = quantize(
        "-o",
        "out",
        "--family",
        family_file("b", lambda data: data.update(title="Mine")),
        "--share",
        "2/2",
    )
    assert other.exit_code == 1
    assert "plan was " in other.stderr


def test_a_missing_family_file_is_one_sentence() -> None:
    result = mquant("inspect", "model", "--family", "nowhere.yaml")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: nowhere.yaml cannot be read: No such file")


# --- mquant families check


def test_check_says_what_the_family_is(user_file: Path) -> None:
    result = mquant("families", "check", user_file)
    assert result.exit_code == 0, result.output
    assert "My Model  family mine\n" in result.stdout
    assert "model_type  unheard_of\n" in result.stdout
    assert "Fused sets  qkv: q_proj, k_proj, v_proj\n" in result.stdout


def test_check_plans_every_recipe_that_needs_no_data(user_file: Path) -> None:
    report = json.loads(mquant("families", "check", user_file, "--format", "json").stdout)
    assert (report["schema"], report["ok"]) == ("mquant.families.check/1", True)
    plans = {recipe["name"]: recipe["plans"] for recipe in report["recipes"]}
    assert plans["nvfp4"] is plans["nvfp4-opt"] is True
    assert "nvfp4-gptq" not in plans
    assert (report["name"], report["model_types"]) == ("mine", ["unheard_of"])
    assert report["roles"]["router"] == 1
    assert report["checkpoint"]["tensors"] > report["rows"]


def bad_role(data: dict[str, Any]) -> None:
    data["tensors"][0]["role"] = "emdebbing"


def no_experts(data: dict[str, Any]) -> None:
    del data["synth"]["config"]["num_local_experts"]
    data["synth"]["tiny"].pop("num_local_experts", None)


def other_type(data: dict[str, Any]) -> None:
    data["synth"]["config"]["model_type"] = "llama"


def not_tiny(data: dict[str, Any]) -> None:
    data["synth"]["tiny"] = {}


def no_such_size(data: dict[str, Any]) -> None:
    data["tensors"][0]["shape"] = ["vocab", "hidden_size"]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (bad_role, "b: tensors.0.role (model.embed_tokens.weight): Input should be 'expert', "),
        (no_experts, "b: synth: config has no integer num_local_experts from 1 to "),
        (other_type, "b: synth: config.model_type is none of model_types."),
        (not_tiny, "mine: the checkpoint of synth.tiny has more than 1.00 GB, or more than "),
        (no_such_size, "mine.yaml: synth.config does not give the shape of model.embed_tokens"),
    ],
)
def test_check_says_what_is_wrong(edit: Edit, sentence: str) -> None:
    result = mquant("families", "check", family_file("b", edit))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {sentence}")


def setting(*keys: str | int, value: Any) -> Edit:
    """Return an edit that sets one value of the file."""

    def edit(data: Any) -> None:
        *path, last = keys
        for key in path:
            data = data[key]
        data[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (setting("config", "layers", value=""), "config.layers: String should have at least 1"),
        (setting("tensors", 0, "dtype", value="F99"), "tensors.0.dtype"),
        (setting("tensors", 0, "name", value="model.{x}.weight"), "tensors.0.name"),
        (setting("tensors", 0, "name", value="a.{layer}.b.{layer}.weight"), "tensors.0.name"),
        (setting("tensors", 0, "shape", value=["9" * 6000]), "tensors.0.shape.0"),
        (
            setting("synth", "tiny", "num_hidden_layers", value=10**12),
            "num_hidden_layers from 1 to",
        ),
        (setting("synth", "tiny", "hidden_size", value=-5), "does not give the shape"),
        (setting("synth", "per_layer", value={"num_hidden_layers": 1}), "per_layer holds the size"),
        (
            setting("synth", "config", "x", value=date(2001, 1, 1)),
            "a value that JSON cannot hold",
        ),
        (setting("synth", "config", "x", value=b"x"), "a value that JSON cannot hold"),
        (setting("synth", "config", "x", value={"x"}), "a value that JSON cannot hold"),
    ],
)
def test_check_says_what_a_hostile_file_holds(edit: Edit, words: str) -> None:
    result = mquant("families", "check", family_file("b", edit))
    assert result.exit_code == 1
    assert words in result.stderr
    assert "unexpectedly" not in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n"
            for n in range(9)
        ), "aliases"),
        ("self: &s {a: *s}", "Circular reference"),
        ('name: "\\ud800"', "surrogates not allowed"),
    ],
)  # fmt: skip
def test_yaml_that_json_cannot_hold_is_one_sentence(text: str, words: str) -> None:
    Path("b").write_text(text)
    result = mquant("families", "check", "b")
    assert result.exit_code == 1
    assert words in result.stderr


@pytest.mark.parametrize("key", ["in_memory", "in_vllm"])
@pytest.mark.parametrize("pair", [[".", ".."], ["", "aa"]])
def test_names_do_not_grow_without_end(key: str, pair: list[str]) -> None:
    file = family_file("b", setting(key, value=[pair] * 40))
    result = mquant("plan", "model", "--recipe", "nvfp4", "--family", file)
    assert "unexpectedly" not in result.stderr


def test_check_fails_if_nvfp4_refuses() -> None:
    def odd_columns(data: dict[str, Any]) -> None:
        data["synth"]["tiny"]["intermediate_size"] = 20

    result = mquant("families", "check", family_file("b", odd_columns), "--format", "json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"]) == (1, False)
    assert [recipe["plans"] for recipe in report["recipes"] if recipe["name"] == "nvfp4"] == [False]


def test_synth_takes_a_family_file(user_file: Path) -> None:
    assert mquant("synth", "tiny", "--family", user_file).exit_code == 0
    planned = mquant("plan", "tiny", "--recipe", "nvfp4", "--family", user_file)
    assert planned.exit_code == 0, planned.output
