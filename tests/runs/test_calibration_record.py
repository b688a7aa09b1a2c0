"""A calibrated checkpoint says what it was calibrated on, and `eval` warns of the same text."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fakehub import FakeHub, hub
from mquant.checkpoint import Folder
from mquant.cli.app import app
from mquant.recipe import Calibration, find_recipe
from mquant.runs.spec import prepare
from mquant.tokens.samples import load_samples
from run import FIXTURES, TRAINED, plan_of

__all__ = ["hub"]

TEXT = FIXTURES / "heldout.txt"
RECIPE = "nvfp4-w4a4"


def mquant(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def quantize(out: Path, *arguments: object, data: Path) -> Result:
    return mquant("quantize", TRAINED, "--recipe", RECIPE, "--data", data, "-o", out, *arguments)


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "mquant.json").read_text())
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("private") / "part.txt"
    path.write_text(TEXT.read_text("utf-8")[:6000], "utf-8")
    return path


@pytest.fixture(scope="module")
def calibrated(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "out"
    result = quantize(out, "--samples", 6, "--length", 48, data=text)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.upstream
def test_mquant_json_says_what_was_used(calibrated: Path, text: Path) -> None:
    samples = load_samples(str(text), Folder(TRAINED), Calibration(samples=6, length=48))

    assert record(calibrated)["calibration"] == samples.record
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert samples.record["data"]["sha256"] == record(calibrated)["fingerprint"]["data"] == digest
    stated = record(calibrated)["recipe"]["calibration"]
    assert (stated["samples"], stated["length"]) == (6, 48)
    assert str(text.parent) not in (calibrated / "mquant.json").read_text()


@pytest.mark.upstream
def test_another_number_of_samples_is_another_run(calibrated: Path, text: Path) -> None:
    again = quantize(calibrated, "--samples", 6, "--length", 48, data=text)
    other = quantize(calibrated, "--samples", 7, "--length", 48, data=text)

    assert again.exit_code == 0, again.output
    assert other.exit_code == 1
    assert "samples was 6 of 48 tokens at most, is 7 of 48 tokens at most" in other.stderr


def test_samples_length_and_data_are_in_the_fingerprint(text: Path) -> None:
    recipe = find_recipe(RECIPE)
    plan = plan_of(TRAINED, RECIPE)
    prints = [
        plan.fingerprint,
        *(
            plan_with(recipe.sampled(samples, length))
            for samples, length in [(7, None), (None, 48), (7, 48)]
        ),
    ]
    assert len(set(prints)) == 4
    assert plan_with(recipe.sampled(256, 2048)) == plan.fingerprint


def plan_with(recipe: Any) -> str:
    from mquant.checkpoint import open_checkpoint
    from mquant.family_files import load_families
    from mquant.plan import make_plan

    return make_plan(open_checkpoint(Folder(TRAINED)), recipe, load_families()).fingerprint


def test_a_dataset_is_in_the_fingerprint_by_its_commit(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "Not far."}\n')
    commit = hub.add("datasets/org/texts", tmp_path)
    spec = prepare(plan_of(TRAINED, RECIPE), data="org/texts")
    assert spec.fingerprint["data"] == f"org/texts@{commit}:"


@pytest.mark.parametrize("option", ["--samples", "--length"])
def test_samples_of_a_recipe_without_data_are_a_usage_error(option: str, tmp_path: Path) -> None:
    arguments = ["quantize", TRAINED, "--recipe", "nvfp4", "-o", tmp_path / "out", option, 9]
    result = mquant(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"Error: Recipe nvfp4 needs no data, so {option} has no effect.\n"
    )


def warnings(out: Path, text: Path) -> list[str]:
    result = mquant("eval", out, "--text", text, "--tokens", 400, "--format", "json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    rule = "calibrated-on-text"
    return [f["message"] for f in document["findings"] if f["rule"] == rule]


@pytest.mark.upstream
def test_eval_warns_of_the_calibrated_text_under_any_name(
    calibrated: Path, text: Path, tmp_path: Path
) -> None:
    renamed, within = tmp_path / "renamed.txt", tmp_path / "within.txt"
    whole = text.read_text("utf-8")
    renamed.write_text(whole, "utf-8")
    within.write_text("Some other words before. " * 9 + whole, "utf-8")
    other = tmp_path / "other.txt"
    other.write_text(TEXT.read_text("utf-8")[20_000:26_000], "utf-8")

    assert warnings(calibrated, renamed) == [
        "renamed.txt is the file that the checkpoint was calibrated on."
    ]
    (share,) = warnings(calibrated, within)
    assert share.endswith(
        "of the evaluated tokens are in the data that the checkpoint was calibrated on (part.txt)."
    )
    assert warnings(calibrated, other) == []


@pytest.mark.upstream
def test_what_is_made_of_a_calibrated_checkpoint_says_so_too(
    calibrated: Path, text: Path, tmp_path: Path
) -> None:
    result = mquant("dequantize", calibrated, "-o", tmp_path / "bf16")
    assert result.exit_code == 0, result.output

    assert record(tmp_path / "bf16")["calibration"] == record(calibrated)["calibration"]
    assert len(warnings(tmp_path / "bf16", text)) == 1


@pytest.mark.parametrize(
    "hostile",
    [5, {"data": 5, "sketch": {}}, {"data": {"bytes": "x", "name": 3}, "sketch": "?"}, [[]]],
)
def test_a_hostile_record_of_calibration_is_no_finding(
    tmp_path: Path, text: Path, hostile: Any
) -> None:
    from mquant.measure.calibrated_on import calibrated_on
    from mquant.tokens.text_tokens import read_tokens

    (tmp_path / "mquant.json").write_text(json.dumps({"calibration": hostile}))
    ids = read_tokens(text, [Folder(TRAINED)], 200).ids

    assert list(calibrated_on(Folder(tmp_path), text, ids)) == []
