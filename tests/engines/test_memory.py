"""Neither engine needs memory for the whole model."""

import subprocess
import sys
from pathlib import Path

import pytest

from judges import read_json
from mquant.data_files import folder
from mquant.numerics.floats import FLOATS
from mquant.numerics.kernels import prepare
from run import MEASURED

# The limit counts only memory that is allocated after the imports: the import of torch alone maps
# more than a small limit allows. RLIMIT_DATA limits the heap and private mappings; a mapped shard
# would be a private mapping too.
LIMIT = """
import resource
from mquant.cli import main
from mquant.engines import oneshot
status = open("/proc/self/status").read()
used = int(status.partition("VmData:")[2].split()[0]) * 1024
limit = used + HALF
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
"""


def synth(src: Path, layers: int, experts: int) -> int:
    """Write a checkpoint of real shapes; return its size in bytes."""
    size = {"layers": layers, "experts": experts, "hidden": 3072, "intermediate": 1536}
    options = [word for name, value in size.items() for word in (f"--{name}", str(value))]
    mquant = [sys.executable, "-m", "mquant"]
    subprocess.run([*mquant, "synth", str(src), "--family", "minimax_m2", *options], check=True)
    nbytes = read_json(src / "model.safetensors.index.json")["metadata"]["total_size"]
    assert isinstance(nbytes, int)
    return nbytes


def quantize(program: str, src: Path, out: Path, *options: str) -> str:
    """Quantize in another process; return its stderr, which reports the peak memory."""
    arguments = ["quantize", str(src), "--recipe", "nvfp4", "-o", str(out), *options]
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (out / "config.json").is_file()
    return run.stderr


@pytest.mark.upstream
def test_oneshot_runs_in_half_the_models_bytes(tmp_path: Path) -> None:
    nbytes = synth(tmp_path / "src", layers=7, experts=8)
    assert nbytes > 1.4e9
    # The engine loads and saves the whole model; its arithmetic is slow, so one layer suffices.
    recipe = tmp_path / "last_layer.yaml"
    nvfp4 = (folder("recipes") / "nvfp4.yaml").read_text("utf-8")
    recipe.write_text(f"{nvfp4}keep_layers: {{first: 6}}\n")
    limited = LIMIT.replace("HALF", str(nbytes // 2)) + MEASURED
    options = ("--engine", "oneshot", "--recipe", str(recipe))
    report = quantize(limited, tmp_path / "src", tmp_path / "out", *options)
    peak = int(report.rpartition("peak ")[2])
    assert peak < nbytes / 2, "resident memory, torch itself included"


def test_the_stream_engine_needs_the_same_memory_for_a_model_of_twice_the_size(
    tmp_path: Path,
) -> None:
    prepare(FLOATS["BF16"])  # the first compilation takes memory of its own
    peaks, sizes = [], []
    for layers in (1, 2):
        src = tmp_path / f"src-{layers}"
        sizes.append(synth(src, layers, experts=10))
        report = quantize(MEASURED, src, tmp_path / f"out-{layers}", "--workers", "3")
        assert "torch False" in report
        peaks.append(int(report.rpartition("peak ")[2]))
    assert sizes[1] > 1.9 * sizes[0]
    assert abs(peaks[1] - peaks[0]) < 0.1 * peaks[0]
    assert max(peaks) < 450e6
