"""Time `mquant verify` on a repo of the real model's size, on a hub with a latency of 40 ms.

    python scripts/bench_hub.py [--latency 0.04] [--runs 3] [--loader vllm]

The repo is the output of `mquant quantize --recipe nvfp4` for 62 layers of 154 experts: real
headers, index and config, with shards as sparse files (87,051 tensors, 80 GB). The hub is the fake
hub of the tests, which delays every answer by the latency.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mquant.family_files import load_families
from mquant.output.finish import index_json
from mquant.plan import config_json
from mquant.synth import Sizes, synth

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from fakehub import FakeHub
from run import plan_of


def main() -> None:
    """Write the repo, serve the repo, and verify the repo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latency", type=float, default=0.04, help="seconds before each answer")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--loader", choices=["vllm"], help="also ask this loader")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        repo = make_repo(Path(where))
        hub = FakeHub()
        hub.latency = options.latency
        hub.add("org/model", repo)
        total = sum(path.stat().st_size for path in repo.glob("*.safetensors"))
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": f"{where}/home"}
        environment.pop("HF_TOKEN", None)
        command = [sys.executable, "-m", "mquant", "verify", "org/model", "--format", "json"]
        command += ["--loader", options.loader] if options.loader else []
        try:
            for _ in range(options.runs):
                start = time.perf_counter()
                run = subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=False
                )
                seconds = time.perf_counter() - start
                result = json.loads(run.stdout)
                print(
                    f"{seconds:.1f} s, {result['requests']} requests, "
                    f"{result['bytes_read']:,} bytes ({result['bytes_read'] / total:.3%}), "
                    f"{result['tensors']:,} tensors, "
                    f"exit {run.returncode}; loader: {(result['loader'] or {}).get('verdict')}"
                )
        finally:
            hub.close()


def make_repo(where: Path) -> Path:
    """Write the quantized checkpoint's headers, index and config, over sparse files."""
    family = load_families()["minimax_m2"]
    parent = synth(where / "parent", family, sizes=Sizes(62, 154), shapes_only=True).path
    plan = plan_of(parent)
    repo = where / "repo"
    repo.mkdir()
    for shard in plan.shards:
        header, _ = shard.layout
        with (repo / shard.name).open("wb") as file:
            file.write(header)
            file.truncate(shard.file_bytes)
    (repo / "model.safetensors.index.json").write_text(json.dumps(index_json(plan), indent=2))
    (repo / "config.json").write_text(json.dumps(config_json(plan), indent=2))
    return repo


if __name__ == "__main__":
    main()
