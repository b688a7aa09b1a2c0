"""Runs on a Ray cluster in tests: slow workers, and the moment to kill a worker."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from mquant.events import Emit, Event, Progress, silent
from mquant.runs.job_spec import JobSpec
from mquant.runs.ray_cluster import quantize_on_ray
from mquant.runs.run import Result
from mquant.runs.shares import Shares
from run import plan_of, shares_of

SHARD_BYTES = 300_000
JOB_SECONDS = 0.05
"""The seconds that each job takes longer in these workers, to leave time to kill a worker."""


def slowness() -> Callable[[], None]:
    """Return the function that every worker runs before its first task, to slow its jobs down."""
    seconds = JOB_SECONDS

    def be_slow() -> None:
        import time
        from typing import Any

        from mquant.engines import stream

        do = stream.Worker.do

        def slowly(self: stream.Worker, unit: Any) -> None:
            do(self, unit)
            time.sleep(seconds)

        stream.Worker.do = slowly  # type: ignore[method-assign]

    return be_slow


def connect(address: str, **options: Any) -> str:
    """Connect this process to a cluster with slow workers, and return the address."""
    context: Any = ray.init(
        address,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        runtime_env={"worker_process_setup_hook": slowness()},
        **options,
    )
    return str(context.address_info["address"])


def on_ray(src: Path, out: Path, emit: Emit = silent) -> Result:
    """Quantize a folder on the connected cluster."""
    plan = plan_of(src, max_shard_bytes=SHARD_BYTES)
    order = JobSpec.of(plan, SHARD_BYTES, allow_unsafe=False, importance=None)
    return quantize_on_ray(plan, order, out, emit=emit)


def run_of(src: Path, out: Path) -> Shares:
    """Return the run that `on_ray` does, with a share for each shard."""
    of = len(plan_of(src, max_shard_bytes=SHARD_BYTES).shards)
    return shares_of(src, out, of, SHARD_BYTES)


def holder(ledger: Path) -> int:
    """Return the id of the process that works on a share, and so has the ledger open."""
    for process in psutil.process_iter():
        try:
            if str(ledger) in {file.path for file in process.open_files()}:
                return int(process.pid)
        except psutil.Error:
            continue
    raise AssertionError(f"no process works on {ledger.name}")


def once_begun(out: Path, units: int, then: Callable[[int], None]) -> Callable[[Event], None]:
    """Return an `emit` that calls `then` once: with a share of `units` jobs and no whole shard."""
    done: list[int] = []

    def emit(event: Event) -> None:
        if done or not isinstance(event, Progress) or not event.workers:
            return
        for path in out.glob("mquant-run.*-of-*.jsonl"):
            number = int(path.name.split(".")[1].split("-")[0])
            text = path.read_text()
            if '"shard"' not in text and len(units_still_valid(text)) >= units:
                done.append(number)
                then(number)
                return

    return emit


def units_still_valid(ledger: str) -> list[int]:
    """Return the jobs that a ledger counts, in the order of the work, without whole shards."""
    entries = [json.loads(line) for line in ledger.splitlines() if line.endswith("}")]
    spans = [span for e in entries if "shard" not in e for span in e.get("jobs", [])]
    return [number for first, last in spans for number in range(first, last + 1)]
