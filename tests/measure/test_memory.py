"""The memory of `compare` and `eval` does not grow with the number of layers."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from mquant.weights.kernels import add_nvfp4_sums, unpack_bf16, unpack_nvfp4
from run import FIXTURES, MEASURED, TRAINED


def mquant(*arguments: object) -> str:
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stderr


def pair(folder: Path, layers: int) -> tuple[Path, Path, int]:
    """Write a checkpoint with a real tokenizer, and its quantized copy.

    Return both paths and the bytes of both checkpoints together.
    """
    src, out = folder / f"src-{layers}", folder / f"out-{layers}"
    sizes = {"layers": layers, "experts": 12, "hidden": 2048, "intermediate": 1024, "vocab": 2048}
    options = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    mquant("synth", src, "--family", "minimax_m2", *options)
    (src / "tokenizer.json").write_bytes((TRAINED / "tokenizer.json").read_bytes())
    mquant("quantize", src, "--recipe", "nvfp4", "-o", out)
    files = [*src.glob("*.safetensors"), *out.glob("*.safetensors")]
    return src, out, sum(file.stat().st_size for file in files)


def compile_kernels() -> None:
    """Compile the kernels: the first compilation takes memory of its own."""
    words, sums = np.zeros((1, 16), np.uint16), np.zeros(3)
    packed, scales = np.zeros((1, 8), np.uint8), np.zeros((1, 1), np.uint8)
    out = np.empty(16, np.float32)
    add_nvfp4_sums(words, (packed, scales, 1.0), sums, np.empty((1, 1), np.float32))
    unpack_bf16(words[0], out)
    unpack_nvfp4(packed[0], scales[0], 1.0, out)


def test_twice_the_layers_take_no_more_memory(tmp_path: Path) -> None:
    compile_kernels()
    compared, evaluated, sizes = [], [], []
    for layers in (1, 2):
        src, out, nbytes = pair(tmp_path, layers)
        sizes.append(nbytes)
        report = mquant("compare", out, "--against", src)
        compared.append(int(report.rpartition("peak ")[2]))
        text = ("--text", FIXTURES / "heldout.txt", "--tokens", 64, "--context", 32)
        report = mquant("eval", out, "--against", src, *text)
        assert "torch False" in report
        evaluated.append(int(report.rpartition("peak ")[2]))
    grown = sizes[1] - sizes[0]
    assert grown > 190e6
    assert compared[1] - compared[0] < grown / 8
    assert evaluated[1] - evaluated[0] < grown / 8
    assert max(compared) < 300e6
