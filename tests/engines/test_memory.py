"""A model larger than memory: the weights stay on disk, and the limit is real."""

import subprocess
import sys
from pathlib import Path

import pytest

from judges import read_json

pytestmark = pytest.mark.upstream

# The limit counts what is allocated from here on (RLIMIT_DATA: heap and private mappings, which
# also a mapped shard would be); importing torch alone maps more than a small limit allows.
LIMITED = """
import resource, sys
from mquant.engines import oneshot
from mquant.cli import main
status = open("/proc/self/status").read()
used = int(status.partition("VmData:")[2].split()[0]) * 1024
limit = used + int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    main()
finally:
    # Not ru_maxrss, which a process started by a large one begins with.
    status = open("/proc/self/status").read()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(f"peak {peak}", file=sys.stderr)
"""


def test_half_the_models_bytes_are_enough_memory(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    size = {"layers": 2, "experts": 38, "hidden": 3072, "intermediate": 1536}
    options = [word for name, value in size.items() for word in (f"--{name}", str(value))]
    mquant = [sys.executable, "-m", "mquant"]
    subprocess.run([*mquant, "synth", str(src), "--family", "minimax_m2", *options], check=True)
    nbytes = read_json(src / "model.safetensors.index.json")["metadata"]["total_size"]
    assert nbytes > 2e9
    limited = [sys.executable, "-c", LIMITED, str(nbytes // 2)]
    run = subprocess.run(
        [
            *limited,
            "quantize",
            str(src),
            "--recipe",
            "nvfp4",
            "-o",
            str(out),
            "--engine",
            "oneshot",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (out / "config.json").is_file()
    peak = int(run.stderr.rpartition("peak ")[2])
    assert peak < nbytes / 2, "resident memory, torch itself included"
