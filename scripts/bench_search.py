"""Compare searched scales with llmcompressor's observers on the same weights: error and time.

    python scripts/bench_search.py tests/fixtures/tiny-minimax-m2
    python scripts/bench_search.py SRC --sets 4 --json search.json    the first sets of a large one

`mquant quantize --recipe nvfp4-opt` runs as a process of its own with one worker, timed whole:
start-up, reading, writing and fsync included. llmcompressor's observers and compressed-tensors'
compressor run in this script, on weights that are in memory already, and are timed alone.

A tensor's error is the error of the decoded weight, fp4 * (scale / global scale) in F32, relative
to the weight (L2). `worst`: the largest quotient of mquant's error and the observer's over all
tensors; at most 1 means that no tensor of mquant is worse than the observer's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor.entrypoints.model_free.lifecycle import initialize_quantized_linear
from llmcompressor.modifiers.quantization.calibration import (
    apply_calibration_status,
    initialize_observer,
    observe,
    update_qparams,
)
from llmcompressor.observers.helpers import fuse_weight_observers

from mquant.checkpoint import Checkpoint, Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.numerics.floats import BF16, E2M1, E4M3, FLOATS, Array
from mquant.plan import WorkUnit, make_plan
from mquant.recipe import find_recipe

OBSERVERS = ("memoryless_minmax", "memoryless_mse", "nvfp4_expanded_mse")
SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale")
Parts = list[Array]
"""A weight's weight_packed, weight_scale and weight_global_scale."""


def values(checkpoint: Checkpoint, name: str) -> Array:
    """Read a tensor; U8 and F8 as bytes."""
    info = checkpoint.tensors[name]
    raw = bytearray(checkpoint.source.read(info.shard, info.start, info.end))
    kind = FLOATS[info.dtype].value if info.dtype in FLOATS else np.dtype(np.uint8)
    return np.frombuffer(raw, np.uint8).view(kind).reshape(info.shape)


def tensor(weight: Array) -> torch.Tensor:
    """Return the same numbers as a torch tensor; torch cannot read numpy's BF16."""
    if weight.dtype == BF16.value:
        return torch.from_numpy(weight.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(weight)


def theirs(unit: WorkUnit, weights: list[torch.Tensor], observer: str) -> tuple[float, list[Parts]]:
    """Quantize a fused set with llmcompressor; return the seconds and each member's tensors."""
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    assert scheme.weights is not None
    scheme.weights.observer = observer
    parent = torch.nn.Module()
    for action, weight in zip(unit.actions, weights, strict=True):
        name = action.module.rpartition(".")[2]
        parent.add_module(name, initialize_quantized_linear(weight, scheme, "cpu"))
    modules: list[Any] = list(parent.children())
    compressor: Any = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    start = time.perf_counter()
    for module in modules:
        initialize_observer(module, "weight")
        apply_calibration_status(module)
    fuse_weight_observers(parent)
    observe(modules, base_name="weight")
    update_qparams(modules, base_name="weight")
    compressed = []
    for module in modules:
        state = {name: p.detach() for name, p in module._parameters.items() if p is not None}
        with torch.no_grad():
            compressed.append(compressor.compress(state, module.quantization_scheme))
    seconds = time.perf_counter() - start
    as_bytes = [[out[suffix] for suffix in SUFFIXES] for out in compressed]
    return seconds, [[p.numpy(), s.view(torch.uint8).numpy(), g.numpy()] for p, s, g in as_bytes]


def error(weight: Array, parts: Parts) -> float:
    """Return the relative L2 error of a quantized weight."""
    weight = weight.astype(np.float32)
    packed, scales, scale = parts
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1, 16)
    decoded = E2M1[codes & 7] * (E4M3[scales] / scale)[..., None]
    decoded = np.where(codes & 8, -decoded, decoded).reshape(weight.shape)
    return float(np.linalg.norm(decoded - weight) / (np.linalg.norm(weight) or 1))


def main() -> None:
    """Run mquant and the observers, print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", type=Path)
    parser.add_argument("--sets", type=int, help="how many fused sets to compare; default: all")
    parser.add_argument("--observers", default=",".join(OBSERVERS))
    parser.add_argument("--json", type=Path, help="file for every tensor's numbers")
    args = parser.parse_args()
    plan = make_plan(open_checkpoint(Folder(args.src)), find_recipe("nvfp4-opt"), load_families())
    units = [unit for shard in plan.shards for unit in shard.units if unit.scheme][: args.sets]
    observers = args.observers.split(",")
    seconds = dict.fromkeys(observers, 0.0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        options = ["--recipe", "nvfp4-opt", "-o", f"{folder}/out", "--format", "quiet"]
        command = [sys.executable, "-m", "mquant", "quantize", str(args.src), *options]
        start = time.perf_counter()
        subprocess.run([*command, "--workers", "1"], check=True)
        whole = time.perf_counter() - start
        quantized = open_checkpoint(Folder(Path(folder, "out")))
        for unit in units:
            weights = [values(plan.survey.checkpoint, a.source.name) for a in unit.actions]
            results: dict[str, list[Parts]] = {}
            for observer in observers:
                set_seconds, results[observer] = theirs(unit, list(map(tensor, weights)), observer)
                seconds[observer] += set_seconds
            for number, (action, weight) in enumerate(zip(unit.actions, weights, strict=True)):
                row = {"tensor": action.source.name, "bytes": action.source.nbytes}
                parts = [values(quantized, output.name) for output in action.outputs]
                row["ours"] = error(weight, parts)
                rows.append(row | {o: error(weight, results[o][number]) for o in observers})
    nbytes = sum(row["bytes"] for row in rows)
    print(f"{len(rows)} tensors, {nbytes / 1e6:.1f} MB")
    mean = np.mean([row["ours"] for row in rows])
    print(f"{'mquant':20} error {mean:.5f}  {plan.source_bytes / 1e6:.1f} MB in {whole:.2f} s")
    for observer in observers:
        mean = np.mean([row[observer] for row in rows])
        worst = max(row["ours"] / row[observer] for row in rows)
        rate = nbytes / seconds[observer]
        faster = plan.source_bytes / whole / rate
        print(
            f"{observer:20} error {mean:.5f}  {nbytes / 1e6:.1f} MB in {seconds[observer]:.2f} s, "
            f"{rate / 1e6:.2f} MB/s; mquant {faster:.0f} x; worst {worst:.4f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
