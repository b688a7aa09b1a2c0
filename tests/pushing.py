"""A quantized checkpoint to push, and `mquant push` in this process: helpers and fixtures."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fakehub import FakeHub
from judges import hashes
from mquant.cli.app import app
from run import TRAINED, quantize_nvfp4

REPO = "org/Tiny-NVFP4"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("push") / "Q", shard_bytes=900_000)


@pytest.fixture
def src(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / quantized.name))


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["push", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def document(*arguments: object, code: int = 0) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(run(*arguments, "--format", "json", code=code).stdout)
    assert (value["schema"], value["ok"]) == ("mquant.push/1", code == 0)
    return value


def on_the_hub(hub: FakeHub) -> dict[str, str]:
    repo = hub.repos[REPO]
    digests = hashes(repo.folders[repo.revisions["main"]])
    digests.pop(".gitattributes", None)
    return digests
