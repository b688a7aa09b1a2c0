"""Compare the simulation of scaling out (scripts/simulate.py) with small real runs.

    python scripts/bench_scale.py [--runs 3] [--rate 40]

The script quantizes a synthetic checkpoint of the real shapes (one layer of 48 experts, 1.4 GB in 3
files, output shards of 100 MB) on this machine's cores in three ways: whole; in two shares at once,
each with half of the cores; and, from the tests' hub, which sends `--rate` MB a second, through a
scratch folder that two of the files fill. The script prints the simulated time beside each measured
time. The start of a process is measured first, on a checkpoint of 9 MB; all other figures of the
simulation are fixed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.plan import Plan, make_plan, shares
from mquant.recipe import find_recipe
from mquant.synth import Sizes, synth
from simulation import Phase, Rates, makespan, pieces_of, pipeline, work_of
from simulation_cases import CORE, DIGEST

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from fakehub import FakeHub

TRAINED = Path(__file__).parent.parent / "tests/fixtures/tiny-minimax-m2"
SHARD = 100_000_000
SCRATCH = 1_010_000_000


def main() -> None:
    """Write the checkpoint, run, and print measured (best of all runs) and simulated seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=40, help="MB/s of the hub")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        src, out = Path(where) / "src", Path(where) / "out"
        family = load_families()["minimax_m2"]
        real = family.synth.model_copy(update={"tiny": {"vocab_size": 4096}})
        family = family.model_copy(update={"synth": real})
        synth(src, family, sizes=Sizes(1, 48, 3072, 1536), max_shard_bytes=500_000_000)
        cores, hub = len(os.sched_getaffinity(0)), FakeHub()
        hub.add("org/model", src)
        hub.bytes_per_second = options.rate * 1e6
        started = best(options.runs, out, [quantize(TRAINED, out)])
        expected = predict(src, cores, options.rate * 1e6)
        half = ["--workers", str(cores // 2 + 1)]
        runs = {
            "whole": [quantize(src, out)],
            "two shares": [[*quantize(src, out), *half, "--share", f"{i}/2"] for i in (1, 2)],
            "scratch": [[*quantize("org/model", out), "--scratch", str(SCRATCH)]],
        }
        try:
            for name, commands in runs.items():
                measured = best(options.runs, out, commands, HF_ENDPOINT=hub.url, HF_HOME=where)
                simulated = started + expected[name]
                ratio = measured / simulated - 1
                print(f"{name}: {measured:.1f} s, simulated {simulated:.1f} s ({ratio:+.0%})")
        finally:
            hub.close()
        print(f"(the start of a process: {started:.1f} s; load {os.getloadavg()[0]:.1f})")


def quantize(src: Path | str, out: Path) -> list[str]:
    """Return the command line of a run."""
    tail = ["--recipe", "nvfp4", "--max-shard-size", str(SHARD), "--format", "quiet"]
    return [sys.executable, "-m", "mquant", "quantize", str(src), "-o", str(out), *tail]


def best(runs: int, out: Path, commands: list[list[str]], **environment: str) -> float:
    """Return the seconds until commands started together have all codes, the least of all runs."""
    seconds = []
    for _ in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        begin = time.perf_counter()
        processes = [subprocess.Popen(line, env=os.environ | environment) for line in commands]
        codes = [process.wait() for process in processes]
        assert not any(codes)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def predict(src: Path, cores: int, rate: float) -> dict[str, float]:
    """Return the simulated seconds of each run, without the start of its processes."""
    plan = plan_of(src)
    halves = [(Phase(work_of(part).read, cores / 2 * CORE),) for part in shares(plan, 2)]
    sizes, rates = plan.survey.checkpoint.source.files, Rates(rate, cores * CORE, digest=DIGEST)
    spooled = pipeline(pieces_of(plan), sizes, rates, SCRATCH)
    return {
        "whole": plan.source_bytes / (cores * CORE),
        "two shares": makespan(halves, 2, 2, float("inf")),
        "scratch": spooled.seconds,
    }


def plan_of(src: Path) -> Plan:
    """Return the plan that the runs carry out."""
    checkpoint = open_checkpoint(Folder(src))
    return make_plan(checkpoint, find_recipe("nvfp4"), load_families(), max_shard_bytes=SHARD)


if __name__ == "__main__":
    main()
