"""Settings of all tests, set before a test imports numpy, and a fixture that many tests share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# The command line sets the same number: more threads spin and delay every matrix product.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A shell starts background commands with SIGINT ignored, and mquant then ignores SIGINT, too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the folder of the small trained model in NVFP4. Tests change copies only."""
    from judges import hashes
    from run import TRAINED, quantize_nvfp4

    out = quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("trained") / "out")
    before = hashes(out)
    yield out
    assert hashes(out) == before, "a test changed what other tests read"
