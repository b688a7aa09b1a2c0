"""Write the card of a synthetic checkpoint, push the checkpoint to a hub, and time each step.

    python scripts/bench_publish.py [--layers 6 --experts 16] [--drops 3]

The script runs `mquant quantize`, `card`, `push`, `push` again and `smoke` as a user would, on a
checkpoint of the real shapes (3.2 GB quantized from 5.7 GB, by default). The hub and the server are
the fakes of the tests; the hub breaks off the first uploads.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from fakehub import FakeHub
from fakeserver import FakeServer

REPO = "org/model-NVFP4"
REAL = ["--hidden", "3072", "--intermediate", "1536", "--vocab", "200064"]


def main() -> None:
    """Write the checkpoint, publish the checkpoint, and ask the server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--drops", type=int, default=3, help="number of uploads that break off")
    options = parser.parse_args()
    hub, server = FakeHub(), FakeServer()
    hub.drops = options.drops
    server.answer = lambda _prompt: "!" * 100
    try:
        with tempfile.TemporaryDirectory() as where:
            publish(Path(where), hub, server, options)
    finally:
        hub.close()
        server.close()


def publish(where: Path, hub: FakeHub, server: FakeServer, options: argparse.Namespace) -> None:
    """Run every step in order."""
    environment = hub.environment(where)
    src, out = where / "model", where / "model-NVFP4"
    sizes = ["--layers", str(options.layers), "--experts", str(options.experts), *REAL]
    step(environment, "synth", str(src), "--family", "minimax_m2", *sizes)
    step(environment, "quantize", str(src), "--recipe", "nvfp4", "-o", str(out))
    step(environment, "card", str(out), "--from", str(src))
    result = step(environment, "push", str(out), REPO)
    print(f"    {result['bytes']:,} bytes in {len(result['files'])} files; {result['verdict']}")
    *first, last = hub.commits
    print(f"    {len(first)} commits, then one of {' and '.join(last.added)}")
    result = step(environment, "push", str(out), REPO)
    print(f"    already done: {result['already_done']}")
    result = step(environment, "smoke", server.url, "--checkpoint", str(out), code=3)
    print(f"    {result['passed']} of 5 answers of noise pass")


def step(environment: dict[str, str], *arguments: str, code: int = 0) -> dict[str, Any]:
    """Run a verb, print its time, and return its JSON document."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "mquant", *arguments, "--format", "json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if run.returncode != code:
        sys.exit(run.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{arguments[0]}: {seconds:.1f} s (peak of all so far: {peak:,.0f} MiB)", flush=True)
    document: dict[str, Any] = json.loads(run.stdout)
    return document


if __name__ == "__main__":
    main()
