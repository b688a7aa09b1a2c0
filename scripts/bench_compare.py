"""Time `mquant compare` against only reading the same files.

    python scripts/bench_compare.py PARENT QUANTIZED [--runs 3]

Both are folders, e.g. of `mquant synth x --family minimax_m2 --layers 3 --experts 48 --hidden 3072
--intermediate 1536 --vocab 20000` and `mquant quantize`. The floor is two threads that read all
shards of both folders with `preadv`. Floor and mquant run in turn, with the files in the system's
cache (`warm`) or dropped from the cache (`cold`; a checkpoint larger than memory is always cold).
mquant's time includes the start of its process, and its memory is the peak.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench import chunks, read

PEAK = """
import sys
from mquant.cli import main
try:
    main()
finally:
    status = open("/proc/self/status").read()
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024, file=sys.stderr)
"""


def floor(folders: list[Path]) -> float:
    """Return the seconds to read every shard."""
    work, lock = iter([c for folder in folders for c in chunks(folder)]), threading.Lock()
    start = time.perf_counter()
    threads = [threading.Thread(target=read, args=(work, lock)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def compare(parent: Path, quantized: Path) -> tuple[float, int]:
    """Return the seconds of `mquant compare`, and its peak of resident bytes."""
    command = [sys.executable, "-c", PEAK, "compare", str(quantized), "--against", str(parent)]
    start = time.perf_counter()
    run = subprocess.run([*command, "--format", "quiet"], stderr=subprocess.PIPE, check=True)
    return time.perf_counter() - start, int(run.stderr.split()[-1])


def drop(folders: list[Path]) -> None:
    """Drop the files' pages from the system's cache."""
    for path in (path for folder in folders for path in folder.glob("*.safetensors")):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def main() -> None:
    """Run the floor and `mquant compare` in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parent", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()

    folders = [args.parent, args.quantized]
    size = sum(p.stat().st_size for folder in folders for p in folder.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB in both")
    for state in ("warm", "cold"):
        for _ in range(args.runs):
            if state == "cold":
                drop(folders)
            least = floor(folders)
            if state == "cold":
                drop(folders)
            seconds, peak = compare(args.parent, args.quantized)
            print(
                f"{state}  floor {least:5.2f} s {size / least / 1e9:5.2f} GB/s   compare "
                f"{seconds:5.2f} s {size / seconds / 1e9:5.2f} GB/s ({least / seconds:.0%}), "
                f"{peak / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
