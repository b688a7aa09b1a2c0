"""Repairs in tests: broken checkpoints, their diagnosis, and the repaired folder."""

from pathlib import Path

import pytest

from corpus import OF_NVFP4A16, Case
from judges import data, opened
from mquant.checkpoint import Folder
from mquant.errors import Refused
from mquant.family_files import load_families
from mquant.findings import Finding
from mquant.repair.diagnose import Diagnosis, diagnose
from mquant.repair.repair import repair
from mquant.verify.judge import Depth, verify
from run import TRAINED, quantize_nvfp4

FAMILIES = load_families()
UNKNOWN = "a prefix before every name"
"""The name of a case whose recipe only mquant.json can tell."""


@pytest.fixture(scope="session")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint in NVFP4, in several shards."""
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("right") / "good", shard_bytes=10**6)


def case_of(name: str) -> Case:
    """Return the case of a broken checkpoint by name."""
    return next(case for case in OF_NVFP4A16 if case.name == name)


def diagnosis_of(bad: Path, parent: Path = TRAINED) -> Diagnosis:
    """Return the diagnosis of a folder."""
    return diagnose(Folder(bad), Folder(parent), FAMILIES)


def repaired(bad: Path, out: Path, parent: Path = TRAINED) -> Path:
    """Repair a folder into `out`, and return `out`."""
    return repair(diagnosis_of(bad, parent), out).out


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return the dtype, shape and bytes of every tensor."""
    checkpoint = opened(folder)
    return {
        name: (info.dtype, info.shape, data(checkpoint, name))
        for name, info in checkpoint.tensors.items()
    }


def problems(folder: Path) -> list[Finding]:
    """Return the warnings and errors that verify finds in a folder."""
    findings = verify(Folder(folder), FAMILIES, Depth.NUMBERS).findings
    return [finding for finding in findings if finding.severity != "info"]


def refusal(bad: Path, parent: Path = TRAINED) -> Finding:
    """Return the first finding of a diagnosis that is refused."""
    with pytest.raises(Refused) as caught:
        diagnosis_of(bad, parent)
    return caught.value.findings[0]
