"""SRC names a folder or a hub repo, and OUT is named after SRC."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from make import make_checkpoint
from mquant.cli.app import app
from mquant.cli.source import default_out, open_source
from mquant.errors import MquantError, UsageError


def test_a_folder_goes_before_a_hub_repo_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_source("org/name", None).identity()["kind"] == "folder"


@pytest.mark.parametrize("src", ["./org/name", "/nowhere/name", "name", "a/b/c"])
def test_a_missing_path_is_an_error(src: str) -> None:
    with pytest.raises(MquantError, match="does not exist"):
        open_source(src, None)


def test_without_src_the_current_folder_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_checkpoint(tmp_path / "model"))
    assert open_source(None, None).name == "model"


@pytest.mark.parametrize("verb", ["inspect", "verify", "verify-ignore", "compare", "card"])
def test_without_src_and_checkpoint_there_is_the_example_of_the_help(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [verb])
    assert result.exit_code == 2
    missing, example = result.stderr.splitlines()
    assert missing == (
        "Error: SRC is missing, and the current folder is no checkpoint (no config.json)."
    )
    assert example.startswith(f"Example: mquant {verb} ")
    shown = CliRunner().invoke(app, [verb, "--help"]).stdout
    assert example in " ".join(shown.split())


def test_a_revision_of_a_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--revision is for hub repos"):
        open_source(str(make_checkpoint(tmp_path / "model")), "main")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_checkpoint(tmp_path / "model")
    assert open_source("~/model", None).name == "model"


def test_out_is_named_after_src_and_is_beside_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(make_checkpoint(tmp_path / "model")), None)
    assert default_out(source, "NVFP4") == Path("model-NVFP4")
    monkeypatch.chdir(tmp_path / "model")
    assert default_out(open_source(None, None), "NVFP4") == Path("../model-NVFP4")
