"""`compare`, `eval` and `report` say if a shard that they read is not the shard in mquant.json."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mquant.checkpoint import Source, hashing
from mquant.cli.app import app
from mutate import flip
from run import FIXTURES

TEXT = ("--text", FIXTURES / "heldout.txt", "--tokens", 64)
VERBS = [("compare", ()), ("eval", TEXT), ("report", TEXT)]
measuring = pytest.mark.parametrize(("verb", "more"), VERBS)


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def changed(trained: Path, tmp_path: Path) -> Path:
    """A quantized checkpoint with a bit flipped; size and mtime are kept."""
    copy = Path(shutil.copytree(trained, tmp_path / "changed"))
    flip(shard_of(copy))
    return copy


def shard_of(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def run(verb: str, src: Path, against: Path, more: tuple[object, ...]) -> Result:
    words = (verb, src, "--against", against, *more, "--format", "json")
    return CliRunner().invoke(app, [*map(str, words)])


@measuring
def test_a_changed_shard_is_measured_and_an_error(
    trained: Path, changed: Path, verb: str, more: tuple[object, ...]
) -> None:
    result = run(verb, changed, trained, more)
    assert result.exit_code == 3, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    (finding,) = (f for f in document["findings"] if f["rule"] == "shard-not-as-recorded")
    assert (finding["severity"], finding["where"]) == ("error", shard_of(changed).name)
    assert document["ok"] is False
    assert {"compared", "perplexity", "tensors"} & document.keys(), "the measurement is there too"


@measuring
def test_a_changed_parent_is_no_measure(
    trained: Path, changed: Path, verb: str, more: tuple[object, ...]
) -> None:
    result = run(verb, trained, changed, more)
    assert result.exit_code == 1
    message = json.loads(result.stdout)["error"]["message"]
    assert message.startswith(f"In changed, {shard_of(changed).name} has changed: its sha256 is ")


def test_a_report_hashes_each_checkpoint_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[tuple[Source, str]] = []
    digests = hashing._digests

    def counted(source: Source, known: Any, emit: Any) -> Any:
        hashed.extend((source, path) for path in known)
        return digests(source, known, emit)

    monkeypatch.setattr(hashing, "_digests", counted)
    parent = Path(shutil.copytree(trained, tmp_path / "parent"))
    assert run("report", trained, parent, TEXT).exit_code in (0, 3)
    assert len(hashed) == len(set(hashed)) > 2
