"""Time the cast from MXFP4 to NVFP4, beside quantizing BF16, on a stack of DeepSeek-V4's layers.

    python scripts/bench_cast.py                       1 GB of MXFP4, and as many experts in BF16
    python scripts/bench_cast.py --size 20 --bf16 4 --folder /big/disk/bench

Layers have the real shapes (hidden 4096, intermediate 2048, real attention) and 32 experts each.
Experts become NVFP4A16; the rest stays as the source stores it. Every command is a process of its
own, timed with start-up; the page cache is warm. Rates are in bytes of output, so that the two
sources may differ in size. Peak memory is the process's largest resident set.

    out       bytes of the output's tensors
    rate      of output, in GB/s, of the best run
    ratio     of the cast's rate to BF16's: at least 0.5 is wanted
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from bench import Runs, opened, prepare, run
from mquant.family_files import load_families
from mquant.synth import Precision, Sizes, synth

EXPERTS = 32
PARAMETERS = 4096 * 2048 * 3 * EXPERTS
"""Weights of a layer's experts."""
BITS = {Precision.MXFP4_FP8: 4.25, Precision.BF16: 16}
RECIPE = (
    "{name: experts, suffix: NVFP4, roles: {expert: NVFP4A16, shared_expert: source, "
    "mlp: source, attention: source}}\n"
)


def make_source(path: Path, size: float, precision: Precision) -> None:
    """Write a stack of layers whose experts take about `size` GB, if it is missing."""
    if (path / "config.json").exists():
        return
    family = load_families()["deepseek_v4"]
    layers = max(1, round(size * 8e9 / PARAMETERS / BITS[precision]))
    tiny = {
        "vocab_size": 4096,
        "compress_ratios": [0] * layers,
        "num_hash_layers": 0,
        "num_nextn_predict_layers": 0,
    }
    real = family.synth.model_copy(update={"tiny": tiny, "tiny_in_blocks": {}})
    synth(
        path,
        family.model_copy(update={"synth": real}),
        sizes=Sizes(layers=layers, experts=EXPERTS),
        precision=precision,
        max_shard_bytes=1_500_000_000,
    )


def main() -> None:
    """Parse the command line, time both sources in turn, and print the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=1.0, help="GB of the MXFP4 source")
    parser.add_argument("--bf16", type=float, help="GB in BF16; default: as many weights")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder for all files; keeps the sources")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE)
        bf16 = args.bf16 or args.size * BITS[Precision.BF16] / BITS[Precision.MXFP4_FP8]
        sources = {Precision.MXFP4_FP8: args.size, Precision.BF16: bf16}
        for precision, size in sources.items():
            make_source(folder / precision.value, size, precision)
        timed = {precision: Runs(precision.value, "") for precision in sources}
        made = dict.fromkeys(sources, 0)
        out = folder / "out"
        for _ in range(args.runs):
            for precision, runs in timed.items():
                src = folder / precision.value
                shutil.rmtree(out, ignore_errors=True)
                prepare(src, "warm", 1 << 30)
                words = ["quantize", str(src), "--recipe", str(recipe), "-o", str(out)]
                run(runs, [sys.executable, "-m", "mquant", *words, "--format", "quiet"], out)
                if runs.failed:
                    sys.exit(runs.failed)
                made[precision] = opened(out).nbytes
        shutil.rmtree(out, ignore_errors=True)
        rates = {}
        for precision, runs in timed.items():
            best, read = min(runs.seconds), opened(folder / precision.value).nbytes
            rates[precision] = made[precision] / best / 1e9
            print(
                f"{precision.value}: {read / 1e9:.2f} GB in, {made[precision] / 1e9:.2f} GB out; "
                f"best of {args.runs} {best:.2f} s, processor {runs.cpu:.1f} s; "
                f"{rates[precision]:.2f} GB/s of output, peak {runs.peak / 1e6:.0f} MB"
            )
        print(f"ratio {rates[Precision.MXFP4_FP8] / rates[Precision.BF16]:.2f}")


if __name__ == "__main__":
    main()
