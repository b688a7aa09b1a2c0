"""`mquant quantize --share`, `mquant finish` and `--cluster` split one run into shares."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from typer.testing import CliRunner, Result

from judges import hashes
from make import make_checkpoint
from mquant.cli.app import app
from mquant.output import SHARES


def mquant(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def quantize(*arguments: str | Path) -> Result:
    command = ("quantize", "model", "--recipe", "nvfp4", "--max-shard-size", "20kB")
    return mquant(*command, *arguments)


def document(result: Result) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(result.stdout)
    return value


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in the current folder."""
    monkeypatch.chdir(tmp_path)
    return make_checkpoint(tmp_path / "model")


def test_shares_and_finish_give_what_one_command_gives() -> None:
    assert quantize("-o", "whole").exit_code == 0
    for number in (1, 2, 3):
        result = quantize("-o", "out", "--share", f"{number}/3")
        assert result.exit_code == 0, result.output
        assert f"Wrote share {number} of 3 in out\n" in result.stdout
        assert "mquant finish out, when all shares are done" in result.stdout
    finished = mquant("finish", "out")
    assert finished.exit_code == 0, finished.output
    assert "Quantized out\n" in finished.stdout
    assert hashes(Path("out")) == hashes(Path("whole"))


def test_json_has_the_number_and_the_shards_of_the_share() -> None:
    report = document(quantize("-o", "out", "--share", "2/3", "--format", "json"))
    assert (report["schema"], report["ok"], report["already_done"]) == (
        "mquant.quantize/1",
        True,
        False,
    )
    share = report["share"]
    assert (share["number"], share["of"]) == (2, 3)
    assert share["file_bytes"] == sum((Path("out") / n).stat().st_size for n in share["shards"])
    again = document(quantize("-o", "out", "--share", "2/3", "--format", "json"))
    assert again["already_done"] is True


def test_finish_reports_totals_in_json_and_then_already_done() -> None:
    quantize("-o", "out", "--share", "1/1")
    facts = document(mquant("finish", "out", "--format", "json"))
    assert (facts["schema"], facts["ok"], facts["already_done"]) == ("mquant.finish/1", True, False)
    assert facts["totals"]["output"]["shards"] == len(list(Path("out").glob("*.safetensors")))
    again = mquant("finish", "out")
    assert (again.exit_code, again.stdout) == (0, "Already done: out\n")
    assert "mquant finish" not in quantize("-o", "out", "--share", "1/1").stdout


def test_finish_names_the_share_that_is_missing() -> None:
    quantize("-o", "out", "--share", "1/2")
    result = mquant("finish", "out")
    assert (result.exit_code, result.stdout) == (1, "")
    first, second = result.stderr.splitlines()
    assert first.startswith("Error: Share 2 of 2 is not done: ")
    assert second.startswith("Run the same mquant quantize with --share 2/2, ")


def test_finish_of_a_folder_without_shares_is_one_sentence() -> None:
    result = mquant("finish", "nowhere")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: nowhere holds no shares to finish.\n")


@pytest.mark.parametrize(
    "share", ["0/3", "4/3", "3", "1/0", "-1/3", "1/2/3", "a/b", "1/10001", "²"]
)
def test_a_wrong_share_is_a_usage_error(share: str) -> None:
    result = quantize("-o", "out", "--share", share)
    assert result.exit_code == 2
    assert result.stderr.endswith("Write a share like 1/16, the first of 16.\n")


@pytest.mark.parametrize(
    "options",
    [
        ("--share", "1/2", "--cluster", "ray"),
        ("--share", "1/2", "--engine", "oneshot"),
        ("--cluster", "ray", "--engine", "oneshot"),
        ("--share", "1/2", "--restart"),
        ("--cluster", "ray", "--restart"),
    ],
)
def test_options_that_exclude_each_other_are_a_usage_error(options: tuple[str, ...]) -> None:
    result = quantize("-o", "out", *options)
    assert result.exit_code == 2, result.output
    assert not Path("out").exists()


@pytest.mark.parametrize("options", [("--share", "1/2"), ("--cluster", "ray")])
def test_calibrated_recipes_take_no_shares(options: tuple[str, str]) -> None:
    Path("text.txt").write_text("words")
    command = ("quantize", "model", "--recipe", "nvfp4-gptq", "--data", "text.txt", "-o", "out")
    result = mquant(*command, *options)
    assert result.exit_code == 2
    assert "sends data through the whole model, so there are no shares of it" in result.stderr
    assert not Path("out").exists()


def test_data_without_effect_is_refused_in_shares_too() -> None:
    result = quantize("-o", "out", "--share", "1/2", "--data", "text.txt")
    assert result.exit_code == 2
    assert "needs no data, so --data has no effect" in result.stderr


def test_one_sentence_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = quantize("-o", "out", "--cluster", "ray")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: --cluster ray needs packages that are not installed.\n"
        "Run: pip install 'mquant[ray]'\n"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:9", "ray://127.0.0.1:10001"])
def test_a_cluster_that_does_not_answer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    result = quantize("-o", "out", "--cluster", "ray")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: There is no Ray cluster at {address}: ")
    assert len(result.stderr.splitlines()) == 2
    assert capfd.readouterr() == ("", "")
    assert not (Path("out") / SHARES).exists()


# --- docs/scale-out.md

PAGE = (Path(__file__).parents[2] / "docs/scale-out.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_slurm_script_writes_the_share_that_slurm_counts() -> None:
    script = blocks("bash")[0]
    for number in (1, 2):
        slurm = {"SLURM_ARRAY_TASK_ID": f"{number}", "SLURM_ARRAY_TASK_COUNT": "2"}
        environment = {**os.environ, "SRC": "model", "OUT": "out", **slurm}
        subprocess.run(["bash", "-c", script], check=True, env=environment, capture_output=True)
    assert mquant("finish", "out").exit_code == 0


def test_the_shell_commands_are_shell() -> None:
    for block in blocks("bash"):
        subprocess.run(["bash", "-n", "-c", block], check=True)


def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load(blocks("yaml")[0])
    validate_config({**cluster, "cluster_synced_files": []})
    filled = prepare_config(cluster)  # with Ray's own defaults, as Ray starts a cluster
    validate_config(filled)
    assert filled["available_node_types"]["local.cluster.node"]["min_workers"] == 3
    with pytest.raises(ValidationError):
        validate_config({**cluster, "workers": 3})
