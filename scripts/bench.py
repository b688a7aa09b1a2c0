"""Time mquant, upstream's tools, and plain reading and writing on the same files.

    python scripts/bench.py                                 4.5 GB, every tool, both cache states
    python scripts/bench.py --size 9 --tools mquant,floor --runs 5 --json bench.json
    python scripts/bench.py --folder /big/disk/bench        keep the checkpoint for the next time

The checkpoint is synthetic and has the real model's shapes (hidden 3072, intermediate 1536, real
attention, 48 experts a layer). Every tool runs as a process of its own, timed with start-up; each
round runs all tools in turn, so that a busy minute affects all tools. Before every run, the script
deletes the previous output, touches and frees as much memory as a tool may use (a virtual machine
is slow to provide memory the first time), and either reads the source's files once (`warm`) or
drops the files from the system's cache (`cold`; a checkpoint larger than memory is always cold).

    mquant          mquant quantize --engine stream
    model_free_1    llmcompressor's model_free_ptq, max_workers 1; model_free_2: 2
    oneshot         llmcompressor's oneshot: transformers loads, quantizes, saves
    mquant_oneshot  mquant quantize --engine oneshot (not in the default list)
    floor           one thread reads all input, then writes as many bytes as mquant does, and fsyncs
    floor_parallel  the same with two reading threads and a writing one at once: the strictest floor

Every tool's quantized tensors are compared with mquant's, and mquant's other tensors with the
source, byte for byte.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The floors run this script too, and their time must not include imports.
if TYPE_CHECKING:
    from mquant.checkpoint import Checkpoint

TOOLS = ("floor", "floor_parallel", "mquant", "model_free_1", "model_free_2", "oneshot")
SLOW = ("model_free_1", "model_free_2", "oneshot", "mquant_oneshot")
IGNORE = ["lm_head", "model.embed_tokens", r"re:.*block_sparse_moe\.gate$", r"re:.*norm$"]
QUANTIZED = (".weight_packed", ".weight_scale", ".weight_global_scale")
CHUNK = 8 << 20
LAYER_BYTES = 1_460_000_000  # a layer of 48 experts and attention, in BF16


@dataclass
class Runs:
    """The runs of one tool: seconds of each run, the most CPU seconds, the most peak bytes."""

    tool: str
    command: str
    seconds: list[float] = field(default_factory=list)
    cpu: float = 0.0
    peak: int = 0
    agrees: str = ""
    failed: str = ""


# ------------------------------------------------------------------- commands and child processes


def command_of(tool: str, src: Path, out: Path, nbytes: int, workers: int | None) -> list[str]:
    """Return the command line of a tool. `nbytes`: the bytes that a floor writes."""
    child_command = [sys.executable, __file__, "--child", tool, str(src), str(out), str(nbytes)]
    if not tool.startswith("mquant"):
        return child_command
    engine = "oneshot" if tool == "mquant_oneshot" else "stream"
    extra = ["--workers", str(workers)] if workers and engine == "stream" else []
    options = ["--recipe", "nvfp4", "-o", str(out), "--engine", engine, "--format", "quiet"]
    return [sys.executable, "-m", "mquant", "quantize", str(src), *options, *extra]


def child(tool: str, src: Path, out: Path, nbytes: int) -> None:
    """Run one of the tools that have no command of their own."""
    if tool == "touch":
        block = bytearray(nbytes)
        for place in range(0, nbytes, 4096):
            block[place] = 1
    elif tool == "floor":
        read(iter(chunks(src)))
        write(out, nbytes)
    elif tool == "floor_parallel":
        work, lock = iter(chunks(src)), threading.Lock()
        threads = [threading.Thread(target=read, args=(work, lock)) for _ in range(2)]
        threads.append(threading.Thread(target=write, args=(out, nbytes)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    elif tool.startswith("model_free"):
        from llmcompressor import model_free_ptq

        workers = int(tool[-1])
        model_free_ptq(
            str(src), str(out), scheme="NVFP4A16", ignore=IGNORE, device="cpu", max_workers=workers
        )
    else:
        plain_oneshot(src, out)


def plain_oneshot(src: Path, out: Path) -> None:
    """Quantize as users do: transformers loads, then `oneshot`, then `save_pretrained`."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(src, dtype="auto")
    ignore = ["lm_head", r"re:.*block_sparse_moe\.gate$"]
    recipe = QuantizationModifier(targets="Linear", scheme="NVFP4A16", ignore=ignore)
    oneshot(model=model, recipe=recipe, processor=object())
    model.save_pretrained(out, save_compressed=True)


def chunks(src: Path) -> list[tuple[str, int]]:
    """Return the path and the start of every piece of every shard."""
    return [
        (str(path), start)
        for path in sorted(src.glob("*.safetensors"))
        for start in range(0, path.stat().st_size, CHUNK)
    ]


def read(work: Any, lock: Any = None) -> None:
    """Read all pieces into one buffer."""
    buffer = memoryview(bytearray(CHUNK))
    files: dict[str, int] = {}
    lock = lock or threading.Lock()
    while True:
        with lock:
            path, start = next(work, ("", 0))
        if not path:
            return
        if path not in files:
            files[path] = os.open(path, os.O_RDONLY)
        os.preadv(files[path], [buffer], start)


def write(out: Path, nbytes: int) -> None:
    """Write `nbytes` of noise into a preallocated file, and fsync the file."""
    out.mkdir()
    noise = memoryview(os.urandom(CHUNK))
    file = os.open(out / "noise", os.O_CREAT | os.O_RDWR)
    os.posix_fallocate(file, 0, nbytes)
    for start in range(0, nbytes, CHUNK):
        os.pwrite(file, noise[: min(CHUNK, nbytes - start)], start)
    os.fsync(file)
    os.close(file)


# ----------------------------------------------------------------------------------- one timed run


def run(runs: Runs, command: list[str], out: Path) -> None:
    """Run a tool once, in a process of its own, and add its time and memory to `runs`."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        # A child's peak starts at its parent's, but this script's peak is below every tool's.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    if process.returncode or not out.is_dir():
        runs.failed = lines[-1] if lines else f"exit code {process.returncode}"
        return
    runs.seconds.append(seconds)
    runs.cpu = max(runs.cpu, usage.ru_utime + usage.ru_stime)
    runs.peak = max(runs.peak, usage.ru_maxrss * 1024)


def prepare(src: Path, cache: str, touched: int) -> None:
    """Put files and memory into the same state before every run."""
    touch = [sys.executable, __file__, "--child", "touch", ".", ".", str(touched)]
    subprocess.run(touch, check=True)
    for path in sorted(src.iterdir()):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        if cache == "cold":
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    if cache == "warm":
        read(iter(chunks(src)))


# ------------------------------------------------------------------------------------- comparisons


def name_here(name: str) -> str:
    """Return mquant's name of a tensor that plain `oneshot` saved."""
    for upstream, own in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        name = name.replace(f".{upstream}.", f".{own}.")
    return name.replace(".mlp.", ".block_sparse_moe.")


def opened(path: Path) -> "Checkpoint":
    """Open a checkpoint folder and read its headers."""
    from mquant.checkpoint import Folder, open_checkpoint

    return open_checkpoint(Folder(path))


def compare(mquant: "Checkpoint", other: "Checkpoint", *, quantized: bool) -> str:
    """Compare all quantized tensors of two checkpoints, or all other tensors; return the result."""
    names = {name_here(n): n for n in other.tensors if n.endswith(QUANTIZED) is quantized}
    expected = [n for n in mquant.tensors if n.endswith(QUANTIZED) is quantized]
    if missing := [name for name in expected if name not in names]:
        return f"lacks {len(missing):,} tensors, e.g. {missing[0]}"
    for name in expected:
        a, b = mquant.tensors[name], other.tensors[names[name]]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name}: {a.dtype} {a.shape}, {b.dtype} {b.shape}"
        for offset in range(0, a.nbytes, CHUNK):
            end = min(offset + CHUNK, a.nbytes)
            data = mquant.source.read(a.shard, a.start + offset, a.start + end)
            if data != other.source.read(b.shard, b.start + offset, b.start + end):
                return f"{name} differs"
    return f"{len(expected):,} tensors equal"


# --------------------------------------------------------------------------------------- the bench


def make_source(path: Path, size: float) -> "Checkpoint":
    """Open a checkpoint of about `size` GB with the real model's shapes; write it if missing."""
    if not (path / "config.json").exists():
        from mquant.family_files import load_families
        from mquant.synth import Sizes, synth

        family = load_families()["minimax_m2"]
        # The real dimensions, except for the vocabulary; `sizes` sets the layers and experts.
        real = family.synth.model_copy(update={"tiny": {"vocab_size": 4096}})
        layers = max(1, round(size * 1e9 / LAYER_BYTES))
        synth(
            path,
            family.model_copy(update={"synth": real}),
            sizes=Sizes(layers, 48, None, None, None),
            max_shard_bytes=1_500_000_000,
        )
    return opened(path)


def bench(args: argparse.Namespace, folder: Path, size: float, cache: str) -> dict[str, Any]:
    """Run all tools on a checkpoint of one size, in one state of the cache."""
    source = make_source(folder / f"source-{size:g}GB", size)
    root, first, out = folder / f"source-{size:g}GB", folder / "first", folder / "out"
    shutil.rmtree(first, ignore_errors=True)
    table = {tool: Runs(tool, "") for tool in args.tools}
    nbytes = 0
    order = sorted(args.tools, key=lambda tool: tool != "mquant")  # floors need its size
    for number in range(args.runs):
        for tool in order:
            runs = table[tool]
            if runs.failed or (tool in SLOW and number >= args.upstream_runs):
                continue
            shutil.rmtree(out, ignore_errors=True)
            command = command_of(tool, root, out, nbytes or 1, args.workers)
            runs.command = " ".join(command).replace(str(folder), "").replace(sys.executable, "")
            prepare(root, cache, args.touch)
            run(runs, command, out)
            if runs.failed or runs.agrees or tool.startswith("floor"):
                continue
            if tool == "mquant":
                out.rename(first)
                nbytes = sum(path.stat().st_size for path in first.glob("*.safetensors"))
                runs.agrees = compare(opened(first), source, quantized=False)
            elif first.exists():
                runs.agrees = compare(opened(first), opened(out), quantized=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(first, ignore_errors=True)
    return {"input_bytes": source.nbytes, "output_bytes": nbytes, "cache": cache, "tools": table}


def show(result: dict[str, Any]) -> None:
    """Print one result as a table."""
    from rich.console import Console
    from rich.table import Table

    tools: dict[str, Runs] = result["tools"]
    best = {tool: min(runs.seconds) for tool, runs in tools.items() if runs.seconds}
    free = min((best[tool] for tool in best if tool.startswith("model_free")), default=None)
    title = f"{result['input_bytes'] / 1e9:.2f} GB in, {result['output_bytes'] / 1e9:.2f} GB out"
    table = Table(title=f"{title}, {result['cache']} cache")
    for column in ("tool", "best", "median", "CPU", "peak MB", "GB/s", "x model_free", "x floor"):
        table.add_column(column, justify="left" if column == "tool" else "right")
    table.add_column("x floor_parallel", justify="right")
    table.add_column("bytes")
    for tool, runs in tools.items():
        if not runs.seconds:
            table.add_row(tool, "failed" if runs.failed else "not run", *[""] * 7, runs.failed)
            continue
        ratios = [
            f"{other / best[tool] if faster else best[tool] / other:.2f}" if other else ""
            for other, faster in (
                (free, True),
                (best.get("floor"), False),
                (best.get("floor_parallel"), False),
            )
        ]
        table.add_row(
            tool,
            f"{best[tool]:.2f} s",
            f"{statistics.median(runs.seconds):.2f} s",
            f"{runs.cpu:.1f} s",
            f"{runs.peak / 1e6:,.0f}",
            f"{result['input_bytes'] / best[tool] / 1e9:.2f}",
            *ratios,
            runs.agrees,
        )
    Console(width=150).print(table)


def machine() -> dict[str, Any]:
    """Return the processor, the kernel and the versions."""
    versions = {}
    for package in ("mquant", "numba", "numpy", "llmcompressor", "compressed-tensors", "torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": model[0] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
    }


def main() -> None:
    """Parse the command line, run the tools, print a table, and write JSON."""
    if sys.argv[1:2] == ["--child"]:
        tool, src, out, nbytes = sys.argv[2:]
        child(tool, Path(src), Path(out), int(nbytes))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="4.5", help="GB of input; separate several by commas")
    parser.add_argument("--tools", default=",".join(TOOLS), help="tools, separated by commas")
    parser.add_argument("--cache", default="warm,cold", help="warm, cold, or warm,cold")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--upstream-runs", type=int, default=1, help="runs of the slow tools")
    parser.add_argument("--workers", type=int, help="mquant's --workers")
    parser.add_argument("--touch", type=int, default=3 << 30, help="bytes of memory to touch")
    parser.add_argument("--folder", type=Path, help="folder for all files; keeps the checkpoint")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args()
    args.tools = args.tools.split(",")
    document: dict[str, Any] = {"schema": "mquant.bench/1", "machine": machine(), "results": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for size in map(float, args.size.split(",")):
            for cache in args.cache.split(","):
                result = bench(args, folder, size, cache)
                show(result)
                tools = [asdict(runs) for runs in result["tools"].values()]
                document["results"].append({**result, "tools": tools})
    if args.json:
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
