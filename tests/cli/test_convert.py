"""`mquant dequantize` and `mquant export` convert checkpoints at the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from judges import hashes
from make import make_checkpoint
from mquant.cli.app import app
from run import quantize_nvfp4


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("q")
    return quantize_nvfp4(make_checkpoint(folder / "src"), folder / "nvfp4")


def run(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def document(*words: object, code: int = 0) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(run(*words, "--format", "json", code=code).stdout)
    return table


def test_dequantize_reports_the_checkpoint(nvfp4: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = document("dequantize", nvfp4, "-o", out)
    assert report["schema"] == "mquant.dequantize/1"
    assert (report["ok"], report["already_done"], report["out"]) == (True, False, str(out))
    assert [finding["rule"] for finding in report["findings"]] == ["source-dequantized"]
    assert report["totals"]["output"]["tensors"] == 47
    assert report["totals"]["source"]["tensors"] == 47 + 2 * 32
    assert document("dequantize", nvfp4, "-o", out)["already_done"]


def test_a_dry_run_of_dequantize_shows_the_plan_only(nvfp4: Path, tmp_path: Path) -> None:
    shown = run("dequantize", nvfp4, "-o", tmp_path / "out", "--dry-run").stdout
    assert "dequantized from" in shown
    assert not (tmp_path / "out").exists()


def test_out_is_named_after_the_source(
    nvfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("dequantize", nvfp4)
    run("export", nvfp4, "--to", "modelopt")
    run("export", "nvfp4-ModelOpt", "--to", "compressed-tensors")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"nvfp4-BF16", "nvfp4-ModelOpt", "nvfp4-ModelOpt-CT"}
    exported, original = hashes(tmp_path / "nvfp4-ModelOpt-CT"), hashes(nvfp4)
    assert {name: exported[name] for name in original if name != "mquant.json"} == {
        name: digest for name, digest in original.items() if name != "mquant.json"
    }


def test_an_unquantized_checkpoint_is_refused_with_the_plan(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src")
    result = run("dequantize", src, "-o", tmp_path / "out", code=1)
    assert "src has no quantized weights." in result.stdout
    report = document("export", src, "--to", "modelopt", "-o", tmp_path / "out", code=1)
    assert [finding["rule"] for finding in report["findings"]] == ["nothing-to-export"]
    assert not (tmp_path / "out").exists()


def test_export_asks_for_a_layout(nvfp4: Path) -> None:
    result = run("export", nvfp4, code=2)
    assert "--to is missing: modelopt or compressed-tensors." in result.stderr
    run("export", nvfp4, "--to", "gguf", code=2)
