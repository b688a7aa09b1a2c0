"""Model cards in tests: a quantized checkpoint, `mquant card`, and what is on the card."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from fakehub import FakeHub
from judges import read_json
from mquant.cli.app import app
from run import TRAINED, quantize_nvfp4

PARENT = "org/Parent"
FRONT = """---
license: other
license_name: modified-mit
license_link: https://example.org/licence
language: [en, zh]
pipeline_tag: text-generation
base_model: org/Original
---
# Parent REAP

![badge](https://example.org/REAP.png)
Made of org/Original with REAP (Router-weighted Expert Activation Pruning), 40 % of the experts.
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint in NVFP4, under the name Tiny-NVFP4."""
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("card") / "Tiny-NVFP4")


@pytest.fixture
def src(quantized: Path, tmp_path: Path) -> Path:
    """A copy of the quantized checkpoint, for one test."""
    return Path(shutil.copytree(quantized, tmp_path / quantized.name))


def run_card(*arguments: object, code: int = 0) -> Result:
    """Run `mquant card`, and assert its exit code."""
    result = CliRunner().invoke(app, ["card", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def card_of(src: Path, *arguments: object) -> str:
    """Write the card of a folder, and return its text."""
    run_card(src, *arguments)
    return (src / "README.md").read_text(encoding="utf-8")


def metadata(card: str) -> dict[str, Any]:
    """Return the YAML at the head of a card."""
    data: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return data


def from_hub(src: Path, hub: FakeHub, front: str = FRONT) -> str:
    """Serve a parent with the card `front`, name it in mquant.json, and return its commit."""
    parent = Path(shutil.copytree(TRAINED, src.parent / "parent"))
    (parent / "README.md").write_text(front, encoding="utf-8")
    commit = hub.add(PARENT, parent)
    record = read_json(src / "mquant.json")
    record["source"] = {"kind": "hub", "repo": PARENT, "commit": commit}
    (src / "mquant.json").write_text(json.dumps(record), encoding="utf-8")
    return commit


def edit_json(path: Path, **keys: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**read_json(path), **keys}), encoding="utf-8")


def stored(path: Path, value: object) -> Path:
    """Write a value as JSON, and return the path."""
    path.write_text(json.dumps(value), encoding="utf-8")
    return path
