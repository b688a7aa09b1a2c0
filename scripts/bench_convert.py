"""Time the verbs that read quantized checkpoints, quantizing BF16, and plain reading and writing.

    python scripts/bench_convert.py                     3 GB of BF16 in the real shapes, and its FP8
    python scripts/bench_convert.py --size 9 --runs 3 --folder /big/disk/bench

Every command is a process of its own, timed with start-up; the page cache is warm unless `--cache
cold`. `floor` is one thread that reads as many bytes as the command, then writes as many. GB/s are
of the bytes read, and of BF16: two bytes for each element of the weights.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from bench import LAYER_BYTES, Runs, command_of, opened, prepare, run
from mquant.family_files import load_families
from mquant.synth import Precision, Sizes, synth

# Title, verb with options, source folder, and the folder name to keep the output for later steps.
STEPS = (
    ("quantize BF16", "quantize --recipe nvfp4", "bf16", "nvfp4"),
    ("quantize FP8 in blocks", "quantize --recipe nvfp4", "fp8", ""),
    ("dequantize FP8 in blocks", "dequantize", "fp8", ""),
    ("dequantize NVFP4A16", "dequantize", "nvfp4", ""),
    ("export to ModelOpt", "export --to modelopt", "nvfp4", "modelopt"),
    ("export to compressed-tensors", "export --to compressed-tensors", "modelopt", ""),
)


def make_source(path: Path, size: float, precision: Precision) -> None:
    """Write a checkpoint of the real shapes, which takes `size` GB in BF16, if it is missing."""
    if (path / "config.json").exists():
        return
    family = load_families()["minimax_m2"]
    real = family.synth.model_copy(update={"tiny": {"vocab_size": 4096}})
    sizes = Sizes(max(1, round(size * 1e9 / LAYER_BYTES)), 48, None, None, None)
    real_family = family.model_copy(update={"synth": real})
    synth(path, real_family, sizes=sizes, precision=precision, max_shard_bytes=1_500_000_000)


def main() -> None:
    """Parse the command line, run every step, and print its numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=3.0, help="GB of the BF16 source")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument("--folder", type=Path, help="folder for all files; keeps the sources")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for precision, name in ((Precision.BF16, "bf16"), (Precision.FP8_BLOCK, "fp8")):
            make_source(folder / name, args.size, precision)
        elements = sum(t.nbytes for t in opened(folder / "bf16").tensors.values())
        for title, verb, source, keep in STEPS:
            shutil.rmtree(folder / "out", ignore_errors=True)
            src, out = folder / source, folder / "out"
            words = [verb.split()[0], str(src), *verb.split()[1:]]
            command = [sys.executable, "-m", "mquant", *words, "-o", str(out), "--format", "quiet"]
            step, floor = Runs(title, ""), Runs("floor", "")
            for _ in range(args.runs):
                shutil.rmtree(out, ignore_errors=True)
                prepare(src, args.cache, 1 << 30)
                run(step, command, out)
                if step.failed:
                    sys.exit(step.failed)
                nbytes = opened(out).nbytes
                if keep:
                    shutil.rmtree(folder / keep, ignore_errors=True)
                    out.rename(folder / keep)
                shutil.rmtree(out, ignore_errors=True)
                prepare(src, args.cache, 1 << 30)
                run(floor, command_of("floor", src, out, nbytes, None), out)
            read, best = opened(src).nbytes, min(step.seconds)
            print(
                f"{title}: {read / 1e9:.2f} GB in, {nbytes / 1e9:.2f} GB out; best of {args.runs} "
                f"{best:.2f} s, floor {min(floor.seconds):.2f} s; {read / best / 1e9:.2f} GB/s, "
                f"{elements / best / 1e9:.2f} of BF16; {step.cpu:.1f} s of CPU, "
                f"{step.peak / 1e6:,.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
