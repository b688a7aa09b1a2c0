"""A stranger's mquant.json: a verb that needs it says one sentence, the others do without."""

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
    ("text", "what"),
    [(NESTED, "is not valid JSON"), (MANY, "is too large to be what it says")],
    ids=["nested", "many"],
)
@pytest.mark.parametrize("verb", ["report src", "card src", "push src org/name --dry-run"])
def test_what_needs_it_says_one_sentence(src: Path, verb: str, text: str, what: str) -> None:
    (src / "mquant.json").write_text(text)
    result = CliRunner().invoke(app, verb.split())
    assert result.exit_code == 1
    assert result.stderr == f"Error: mquant.json {what}.\nGet the file again.\n"


@pytest.mark.parametrize(
    "verb",
    [
        "inspect src",
        "verify src",
        f"repair src --from {TRAINED} -o mended",
        "export src --to modelopt -o exported",
    ],
)
def test_what_does_not_need_it_does_without(src: Path, verb: str) -> None:
    (src / "mquant.json").write_text(NESTED)
    assert CliRunner().invoke(app, verb.split()).exit_code == 0


def test_quantize_does_not_go_on_in_such_a_folder(src: Path) -> None:
    (src / "mquant.json").write_text(NESTED)
    again = ["quantize", str(TRAINED), "--recipe", "nvfp4", "-o", "src"]
    result = CliRunner().invoke(app, again)
    assert result.exit_code == 1
    assert "src was made from something else" in result.stderr
    assert (src / "mquant.json").read_text() == NESTED
