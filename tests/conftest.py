"""For all tests, before any of them imports numpy; and what many of them read."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# As the command line does: else every product of matrices waits for threads that spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The small trained model in NVFP4. Tests copy it to change it."""
    from judges import hashes
    from run import TRAINED, quantize_nvfp4

    out = quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("trained") / "out")
    before = hashes(out)
    yield out
    assert hashes(out) == before, "a test changed what other tests read"
