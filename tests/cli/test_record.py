"""Verbs that need mquant.json refuse a hostile file in one sentence; other verbs ignore it."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mquant.cli.app import app
from run import TRAINED

NESTED = "[" * 100_000
MANY = "[" + "{}," * 300_000 + "{}]"


@pytest.fixture
def src(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, "src"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [(NESTED, "is not valid JSON"), (MANY, "is too large to be what it says")],
    ids=["nested", "many"],
)
@pytest.mark.parametrize("verb", ["report src", "card src", "push src org/name --dry-run"])
def test_a_verb_that_needs_the_record_refuses(src: Path, verb: str, text: str, fault: str) -> None:
    (src / "mquant.json").write_text(text)
    result = CliRunner().invoke(app, verb.split())
    assert result.exit_code == 1
    assert result.stderr == f"Error: mquant.json {fault}.\nGet the file again.\n"


@pytest.mark.parametrize(
    "verb",
    [
        "inspect src",
        "verify src",
        f"repair src --from {TRAINED} -o mended",
        "export src --to modelopt -o exported",
    ],
)
def test_a_verb_that_does_not_need_the_record_ignores_the_file(src: Path, verb: str) -> None:
    (src / "mquant.json").write_text(NESTED)
    assert CliRunner().invoke(app, verb.split()).exit_code == 0


def test_quantize_does_not_resume_with_a_hostile_record(src: Path) -> None:
    (src / "mquant.json").write_text(NESTED)
    command = ["quantize", str(TRAINED), "--recipe", "nvfp4", "-o", "src"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "src was made from something else" in result.stderr
    assert (src / "mquant.json").read_text() == NESTED
