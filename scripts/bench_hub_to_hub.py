"""Quantize a synthetic checkpoint from hub to hub, kill the run repeatedly, and count the bytes.

    python scripts/bench_hub_to_hub.py [--layers 3 --experts 48] [--kills 5] [--rate 200]

The checkpoint has the real shapes except for a small vocabulary, 4.4 GB by default. The hub is the
tests' fake hub; `--rate` limits its MB/s, downloads and uploads together. The scratch is a quarter
of the checkpoint. The script kills the process with SIGKILL at random moments, and then compares
the repo with the output of a run without scratch. The script prints the most bytes that were ever
on the disk, the bytes downloaded and uploaded, and the least possible number of these bytes: every
shard downloaded once and uploaded once. The first run is not killed, to measure the time.
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from fakehub import FakeHub

PARENT, PLAIN, KILLED = "org/model", "org/model-NVFP4", "org/model-NVFP4-killed"
REAL = ["--hidden", "3072", "--intermediate", "1536", "--vocab", "8192"]
SOURCE_SHARD, SHARD = "250MB", "50MB"


def main() -> None:
    """Write the checkpoint; quantize without kills, then with kills; compare the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=48)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--rate", type=float, default=200, help="MB/s, in and out together")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    hub = FakeHub()
    try:
        with tempfile.TemporaryDirectory() as where:
            Bench(hub, Path(where), options).run()
    finally:
        hub.close()


class Bench:
    """The hub, the work folder, and the environment of all processes."""

    def __init__(self, hub: FakeHub, where: Path, options: argparse.Namespace) -> None:
        self.hub, self.where, self.options = hub, where, options
        self.environment = hub.environment(where)
        self.most = 0

    def run(self) -> None:
        """Run the whole benchmark and print its results."""
        src = self.where / "model"
        sizes = ["--layers", str(self.options.layers), "--experts", str(self.options.experts)]
        sizes += [*REAL, "--max-shard-size", SOURCE_SHARD]
        subprocess.run(
            [*MQUANT, "synth", str(src), "--family", "minimax_m2", *sizes],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self.hub.add(PARENT, src)
        total = bytes_of(src)
        scratch = total // 4
        quantize = [*MQUANT, "quantize", PARENT, "--recipe", "nvfp4", "--max-shard-size", SHARD]
        self.quietly([*quantize, "-o", str(self.where / "kept")])  # also compiles the kernels
        expected = digests(self.where / "kept")
        least = total + bytes_of(self.where / "kept")
        print(
            f"{total / 1e9:.2f} GB to {(least - total) / 1e9:.2f} GB, scratch {scratch / 1e9:.3f}"
        )
        self.hub.bytes_per_second = self.options.rate * 1e6
        floor = least / self.hub.bytes_per_second
        for repo, kills in ((PLAIN, 0), (KILLED, self.options.kills)):
            self.hub.forget()
            self.hub.stored.clear()  # else the hub skips files that it already stores
            self.most = 0
            out = self.where / "out"
            command = [*quantize, "--scratch", str(scratch), "--push-to", repo, "-o", str(out)]
            start = time.perf_counter()
            self.disturbed(command, out, kills, least)
            seconds = time.perf_counter() - start
            moved = self.hub.bytes_served + self.hub.bytes_received
            pushed = self.hub.repos[repo]
            same = digests(pushed.folders[pushed.revisions["main"]]) == expected
            print(
                f"killed {kills} times: {'the same bytes' if same else 'OTHER BYTES'}; "
                f"most on disk {self.most / 1e9:.3f} GB, {self.most / scratch:.1%} of the scratch; "
                f"moved {moved / 1e9:.3f} GB, {moved / least:.4f} of the least; "
                f"{seconds:.1f} s, the bandwidth alone {floor:.1f} s",
                flush=True,
            )

    def disturbed(self, command: list[str], out: Path, kills: int, least: int) -> None:
        """Run a command to the end after `kills` kills, each at a random number of bytes moved."""
        chance = random.Random(self.options.seed)  # noqa: S311 -- not a secret
        moments = sorted(chance.uniform(0, 0.95) * least for _ in range(kills))
        for moment in (*moments, float("inf")):
            with subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL) as run:
                while run.poll() is None:
                    self.most = max(self.most, held(out))
                    if self.hub.bytes_served + self.hub.bytes_received >= moment:
                        run.kill()
                        break
                    time.sleep(0.01)
        if run.returncode:
            raise RuntimeError(f"exit code {run.returncode}")

    def quietly(self, command: list[str]) -> None:
        """Run a command to the end without output."""
        subprocess.run(command, check=True, env=self.environment, stdout=subprocess.DEVNULL)


MQUANT = [sys.executable, "-m", "mquant"]


def bytes_of(folder: Path) -> int:
    """Return the bytes of the shards in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def held(out: Path) -> int:
    """Return the bytes that OUT takes on the disk, including reserved bytes."""
    total = 0
    for folder, _, names in os.walk(out):
        for name in names:
            with suppress(FileNotFoundError):  # the run has just deleted the file
                stat = Path(folder, name).stat()
                total += max(stat.st_size, stat.st_blocks * 512)
    return total


def digests(folder: Path) -> Mapping[str, str]:
    """Return the sha256 of every file except the hub's own .gitattributes."""
    by_name = {}
    for path in sorted(folder.iterdir()):
        if path.name != ".gitattributes":
            with path.open("rb") as file:
                by_name[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return by_name


if __name__ == "__main__":
    main()
