"""Synthetic checkpoints for tests, and functions that read checkpoints."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mquant.checkpoint import Checkpoint, Folder, open_checkpoint
from mquant.family import Family
from mquant.family_files import load_families
from mquant.synth import synth


@pytest.fixture(scope="module")
def family() -> Family:
    return load_families()["minimax_m2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, family: Family) -> Path:
    path = tmp_path_factory.mktemp("synth") / "tiny"
    synth(path, family)
    return path


def opened(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(Folder(path))
    assert checkpoint.findings == ()
    return checkpoint


def numbers(path: Path, name: str) -> "np.ndarray[Any, np.dtype[Any]]":
    """Return a tensor's values, read with mquant's own headers."""
    dtypes = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
    dtypes["F8_E4M3"] = ml_dtypes.float8_e4m3fn
    checkpoint = opened(path)
    info = checkpoint.tensors[name]
    raw = checkpoint.source.read(info.shard, info.start, info.end)
    return np.frombuffer(raw, dtypes[info.dtype]).reshape(info.shape).astype(np.float32)


def content(path: Path) -> dict[str, bytes]:
    folder = Folder(path)
    return {name: folder.read(name) for name in folder.files}


__all__ = ["content", "family", "numbers", "opened", "tiny"]
