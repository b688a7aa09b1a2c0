"""The folder of a repo on the fake hub, and fast retries: fixtures to import."""

from pathlib import Path

import pytest

from mquant.family_files import load_families
from mquant.synth import Sizes, synth

REPO = "org/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of 22 MB in 5 shards, with other files that repos have."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    sizes = Sizes(hidden=512, intermediate=512)
    synth(path, load_families()["minimax_m2"], sizes=sizes, max_shard_bytes=6_000_000)
    (path / "README.md").write_text("# A model\n")
    (path / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (path / "pytorch_model.bin").write_bytes(bytes(1_000_000))
    (path / "original").mkdir()
    (path / "original/consolidated.safetensors").write_bytes(bytes(1_000_000))
    (path / "odd [name]").mkdir()
    (path / "odd [name]/vocab*.txt").write_text("a\nb\n")
    return path


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mquant.checkpoint.retry.BACKOFF_SECONDS", 0.001)
