"""Helpers that run mquant in tests."""

import shutil
from pathlib import Path

from make import make_checkpoint
from mquant.checkpoint import Folder, open_checkpoint
from mquant.events import Emit, silent
from mquant.family_files import load_families
from mquant.plan import Plan, make_plan
from mquant.recipe import find_recipe
from mquant.runs.job_spec import JobSpec
from mquant.runs.quantize import quantize
from mquant.runs.shares import Shares, in_shares
from mquant.runs.spec import Engine

FIXTURES = Path(__file__).parent / "fixtures"
TRAINED = FIXTURES / "tiny-minimax-m2"
# The command line, in a process that prints its peak memory on stderr.
MEASURED = """
import sys
from mquant.cli import main
try:
    main()
finally:
    # Not ru_maxrss: a child process starts with the ru_maxrss of its parent.
    status = open("/proc/self/status").read()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(f"torch {'torch' in sys.modules} peak {peak}", file=sys.stderr)
"""


def wide(path: Path) -> Path:
    """Write a checkpoint for the trained model's tokenizer, with shapes that 128 divides."""
    make_checkpoint(
        path, hidden=256, intermediate=128, heads=8, kv_heads=4, head_dim=32, vocab=2048
    )
    copy_tokenizer(path)
    return path


def copy_tokenizer(path: Path) -> None:
    """Give a checkpoint the tokenizer of the trained model, which has 2,048 tokens."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TRAINED / name, path / name)


def plan_of(src: Path, recipe: str = "nvfp4", max_shard_bytes: int = 5_000_000_000) -> Plan:
    """Return the plan of a checkpoint folder."""
    checkpoint = open_checkpoint(Folder(src))
    return make_plan(
        checkpoint, find_recipe(recipe), load_families(), max_shard_bytes=max_shard_bytes
    )


def quantize_nvfp4(
    src: Path,
    out: Path,
    emit: Emit = silent,
    shard_bytes: int = 10**9,
    engine: Engine = Engine.AUTO,
    workers: int | None = None,
) -> Path:
    """Quantize a folder with the recipe nvfp4, in this process."""
    plan = plan_of(src, max_shard_bytes=shard_bytes)
    quantize(plan, out, engine=engine, workers=workers, emit=emit)
    return out


def shares_of(src: Path, out: Path, of: int, shard_bytes: int, recipe: str = "nvfp4") -> Shares:
    """Return the run of a folder's plan in `of` shares, before a share is made."""
    plan = plan_of(src, recipe, shard_bytes)
    order = JobSpec.of(plan, shard_bytes, allow_unsafe=False, importance=None)
    return in_shares(plan, order, out, of)
