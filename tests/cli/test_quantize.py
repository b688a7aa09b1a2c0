"""`mquant quantize` writes a checkpoint, refuses unsafe work, and resumes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fakehub import FakeHub, hub
from judges import differences, opened, read_json
from make import make_checkpoint, write_json
from mquant.cli.app import app
from mquant.output import LEDGER
from run import TRAINED

__all__ = ["hub"]

pytestmark = pytest.mark.upstream


def quantize(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def document(result: Result) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(result.stdout)
    assert value["schema"] == "mquant.quantize/1"
    return value


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in the current folder."""
    monkeypatch.chdir(tmp_path)
    return make_checkpoint(tmp_path / "model")


def test_the_output_names_the_quantized_checkpoint(model: Path) -> None:
    result = quantize("model", "--recipe", "nvfp4", "-o", "out")
    assert result.exit_code == 0, result.output
    assert "Quantized out\n" in result.stdout
    assert opened(Path("out")).findings == ()


def test_json_has_totals_and_the_ignore_list(model: Path) -> None:
    report = document(quantize("model", "--recipe", "nvfp4", "-o", "out", "--format", "json"))
    assert (report["ok"], report["already_done"], report["out"]) == (True, False, "out")
    assert report["totals"]["output"]["bytes"] == opened(Path("out")).nbytes
    config = read_json(Path("out/config.json"))
    assert report["ignore"] == config["quantization_config"]["ignore"]


def test_quiet_prints_nothing(model: Path) -> None:
    result = quantize("model", "--recipe", "nvfp4", "-o", "out", "--format", "quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_out_is_named_after_source_and_recipe(model: Path) -> None:
    assert quantize("model", "--recipe", "nvfp4").exit_code == 0
    assert Path("model-NVFP4/config.json").is_file()


def test_inside_a_checkpoint_src_may_be_left_out(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    assert quantize("--recipe", "nvfp4").exit_code == 0
    assert (model.parent / "model-NVFP4/config.json").is_file()
    assert not (model / "model-NVFP4").exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(model: Path) -> None:
    result = quantize("model", "--recipe", "nvfp4", "--dry-run")
    assert result.exit_code == 0
    assert "loaders may refuse a" in result.stdout
    assert sorted(path.name for path in model.parent.iterdir()) == ["model"]


def test_a_refused_plan_is_shown_and_nothing_is_written(model: Path) -> None:
    recipe = Path("bad.yaml")
    recipe.write_text("name: bad\nsuffix: BAD\nroles: {router: NVFP4A16, expert: NVFP4A16}\n")
    result = quantize("model", "--recipe", recipe)
    assert result.exit_code == 1
    assert "would quantize 2 routers" in result.stderr
    assert not Path("model-BAD").exists()


def test_an_output_that_cannot_be_judged_is_written_and_said_at_both_ends(model: Path) -> None:
    write_json(model / "config.json", {**read_json(model / "config.json"), "max_model_len": 4096})

    result = quantize("model", "--recipe", "nvfp4", "-o", "out")

    assert result.exit_code == 0
    unknown = "what vLLM 0.32 makes of max_model_len of config.json is not known."
    assert f"recipe nvfp4 is not judged: {unknown}" in result.output
    assert "Whether vLLM takes out could not be judged" in result.output
    assert Path("out/config.json").is_file()


def test_running_again_says_already_done(model: Path) -> None:
    quantize("model", "--recipe", "nvfp4", "-o", "out")
    again = quantize("model", "--recipe", "nvfp4", "-o", "out")
    assert (again.exit_code, again.stdout.split("\n")[0]) == (0, "Already done: out")


def test_another_recipe_into_the_same_out_is_refused(model: Path) -> None:
    quantize("model", "--recipe", "nvfp4", "-o", "out")
    Path("experts.yaml").write_text("name: experts\nsuffix: E\nroles: {expert: NVFP4A16}\n")
    refused = quantize("model", "--recipe", "experts.yaml", "-o", "out")
    assert refused.exit_code == 1
    assert "out was made from something else: plan was" in refused.stderr
    again = quantize("model", "--recipe", "experts.yaml", "-o", "out", "--restart")
    assert again.exit_code == 0
    ignore = read_json(Path("out/config.json"))["quantization_config"]["ignore"]
    assert "model.layers.0.self_attn.q_proj" in ignore


def test_a_folder_that_mquant_did_not_write_is_refused(model: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years of work")
    refused = quantize("model", "--recipe", "nvfp4", "-o", "out", "--restart")
    assert refused.exit_code == 1
    assert refused.stderr == (
        "Error: out is not empty, and mquant did not make it.\n"
        "Give another folder with -o, or empty this one.\n"
    )


def test_an_unsafe_recipe_is_carried_out_on_request(model: Path) -> None:
    Path("bad.yaml").write_text("name: bad\nsuffix: B\nroles: {head: NVFP4A16}\n")
    result = quantize("model", "--recipe", "bad.yaml", "--allow-unsafe", "-o", "out")
    assert result.exit_code == 0, result.output
    assert "lm_head.weight_packed" in opened(Path("out")).tensors


def test_a_hub_repo_is_downloaded_and_quantized(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add("org/tiny", TRAINED)
    result = quantize("org/tiny", "--recipe", "nvfp4")
    assert result.exit_code == 0, result.output
    local = quantize(TRAINED, "--recipe", "nvfp4", "-o", "local")
    assert local.exit_code == 0, local.output
    assert differences(Path("tiny-NVFP4"), Path("local"), set(opened(Path("local")).tensors)) == []
    assert read_json(Path("tiny-NVFP4/mquant.json"))["source"]["repo"] == "org/tiny"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_no_checkpoint_and_can_be_run_again(
    tmp_path: Path, signum: signal.Signals
) -> None:
    src = make_checkpoint(tmp_path / "src", layers=8, experts=32, hidden=256, intermediate=256)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mquant", "quantize", str(src), "--recipe", "nvfp4"]
    command += ["-o", str(out), "--max-shard-size", "1MB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
    if signum is not signal.SIGKILL:
        assert process.returncode == 130
        assert errors.endswith("Interrupted; it is safe to run the same command again.\n")
    assert not (out / "config.json").exists()
    assert (out / LEDGER).exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    fresh = tmp_path / "fresh"
    subprocess.run(
        [str(fresh) if part == str(out) else part for part in command],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for path in fresh.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert len(list(out.iterdir())) == len(list(fresh.iterdir()))


def test_one_sentence_names_the_missing_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("mquant.runs.spec.version", absent)
    result = quantize("model", "--recipe", "nvfp4", "-o", "out", "--engine", "oneshot")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: The oneshot engine needs packages that are not installed.\n"
        "Run: pip install 'mquant[oneshot]'\n"
    )
    assert not Path("out").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(model: Path) -> None:
    Path("file").write_text("")
    result = quantize("model", "--recipe", "nvfp4", "-o", "file/out")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: file/out cannot be written")


def test_the_wheel_carries_recipes_and_families(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    source = tmp_path / "source"
    shutil.copytree(
        root, source, ignore=shutil.ignore_patterns(".venv*", ".git", "out", "tests", ".*_cache")
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", str(source), "--no-deps", "--wheel-dir", str(tmp_path)], check=True
    )
    (wheel,) = tmp_path.glob("mquant-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    shown = subprocess.run(
        [sys.executable, "-m", "mquant", "recipes", "show", "nvfp4"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert shown.stdout == (root / "recipes/nvfp4.yaml").read_text()
    assert (site / "mquant/configs/minimax_m2.yaml").is_file()
