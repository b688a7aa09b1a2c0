"""Repair a checkpoint of the real model's size whose routers are quantized, and time the repair.

    python scripts/bench_repair.py [--folder DIR] [--layers 62] [--experts 154] [--in-place]
        [--sparse]

Parent and broken checkpoint have real headers, indexes and configs over sparse files (62 layers,
154 experts: 278 GB and 80 GB, of which megabytes are on the disk). The parent's routers have random
bytes. All routers of the broken checkpoint are quantized. The repair judges structure only, because
the numbers of a sparse file are all zero. The result needs 81 GB in DIR; with `--sparse`, zeros are
not written.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.family_rows import Role
from mquant.output import config_json, index_json
from mquant.plan import OutputTensor, Plan, ShardPlan
from mquant.schemes import NVFP4A16
from mquant.synth import Sizes, synth
from mquant.text import size

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from run import plan_of

_ROUTER = ".block_sparse_moe.gate.weight"
_SPARSE = """
import os
import numpy as np
from mquant.output import disk, writer
from mquant.cli import main

def pwrite(file, data, at):
    return write(file, data, at) if np.frombuffer(data, np.uint8).any() else len(data)

write, writer.pwrite = writer.pwrite, pwrite
writer.preallocate = os.ftruncate
disk.free_disk = lambda out: 1 << 50
main()
"""


def main() -> None:
    """Write parent and broken checkpoint, repair, and print the cost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="work folder; default: the system's temporary folder")
    parser.add_argument("--layers", type=int, default=62)
    parser.add_argument("--experts", type=int, default=154)
    parser.add_argument("--in-place", action="store_true")
    parser.add_argument("--sparse", action="store_true", help="do not write zeros")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as where:
        family = load_families()["minimax_m2"]
        sizes = Sizes(options.layers, options.experts)
        parent = synth(Path(where) / "parent", family, sizes=sizes, shapes_only=True).path
        fill_routers(parent)
        bad = broken(plan_of(parent), Path(where) / "bad")
        place = ["--in-place"] if options.in_place else ["-o", f"{where}/out"]
        mquant = ["-c", _SPARSE] if options.sparse else ["-m", "mquant"]
        command = [sys.executable, *mquant, "repair", str(bad), "--from", str(parent)]
        command += [*place, "--depth", "structure", "--format", "json"]
        start = time.perf_counter()
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        report = json.loads(run.stdout)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        shards = report["shards"]
        print(
            f"{seconds:.1f} s, exit {run.returncode}; {len(report['replaced'])} tensors replaced, "
            f"{size(report['read_of_parent'])} of the parent read; {len(shards['kept'])} shards "
            f"kept, {len(shards['rewritten'])} written ({size(shards['bytes'])}); peak {size(peak)}"
        )
        print("routers are the parent's:", routers(Path(report["out"])) == routers(parent))
        judged = [sys.executable, "-m", "mquant", "verify", report["out"], "--depth", "structure"]
        subprocess.run(judged, check=False)


def fill_routers(folder: Path) -> None:
    """Write random bytes into every router of a sparse checkpoint."""
    for info in open_checkpoint(Folder(folder)).tensors.values():
        if info.name.endswith(_ROUTER):
            with (folder / info.shard).open("r+b") as file:
                file.seek(info.start)
                file.write(os.urandom(info.nbytes))


def routers(folder: Path) -> dict[str, bytes]:
    """Return every router's bytes, by name."""
    source = Folder(folder)
    return {
        info.name: source.read(info.shard, info.start, info.end)
        for info in open_checkpoint(source).tensors.values()
        if info.name.endswith(_ROUTER)
    }


def broken(plan: Plan, folder: Path) -> Path:
    """Write the output of the plan as sparse files, but with quantized routers."""
    folder.mkdir()
    wrong = replace(plan, shards=tuple(map(_with_quantized_routers, plan.shards)))
    for shard in wrong.shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.layout[0])
            file.truncate(shard.file_bytes)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json(wrong)))
    config = config_json(plan)
    config["quantization_config"]["ignore"] = ["lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _with_quantized_routers(shard: ShardPlan) -> ShardPlan:
    units = []
    for unit in shard.units:
        actions = tuple(
            replace(
                action,
                made=tuple(
                    OutputTensor(*output)
                    for output in NVFP4A16.outputs(
                        action.module, action.source.shape, action.source.dtype
                    )
                ),
            )
            if action.role is Role.ROUTER
            else action
            for action in unit.actions
        )
        units.append(replace(unit, actions=actions))
    return replace(shard, units=tuple(units))


if __name__ == "__main__":
    main()
