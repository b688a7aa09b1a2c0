"""Quantize into a hub repo: what is made goes there shard by shard, and never lies here whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from mquant.checkpoint import Folder, Overlay, Source
from mquant.errors import OutputError
from mquant.events import Emit, silent
from mquant.output import Ledger, State, discard, examine
from mquant.plan import Plan
from mquant.runs.quantize import Run, complete
from mquant.runs.run import check_disk, check_headers_as_planned, materialize
from mquant.runs.scratch import check_scratch, least_scratch
from mquant.runs.ship_shards import LAST, Destination, Shipper, open_destination, seal, send_others
from mquant.runs.spec import Engine, RunSpec, check_engine, choose_engine, prepare

_LEDGER_BYTES: Final = 100
"""What a job, or a file of the source, takes in the ledger at most, on average."""


@dataclass(frozen=True)
class Shipped:
    """A repo that holds the whole checkpoint. `fresh` is False where it did before."""

    page: str
    plan: Plan
    fresh: bool


def quantize_to_hub(
    plan: Plan,
    out: Path,
    repo: str,
    *,
    public: bool = False,
    engine: Engine = Engine.AUTO,
    importance: Path | None = None,
    workers: int | None = None,
    scratch: int | None = None,
    restart: bool = False,
    emit: Emit = silent,
) -> Shipped:
    """Make the checkpoint that `plan` describes in a hub repo, or go on with what is there of it.

    `out` is a folder for what is on its way, gone in the end. At most `scratch` bytes lie in it:
    source files, where the source is a hub repo, and shards; None: no limit. The rest is as for
    `mquant.runs.quantize.quantize`. Until it returns there is no config.json in the repo.
    """
    check_engine(choose_engine(engine, plan.recipe), "--push-to")
    spec = prepare(plan, engine, importance)
    files, shards = _share_out(plan, scratch)
    to = open_destination(repo, plan, spec.fingerprint, public=public)
    look = partial(examine, out, spec.local, spec.fingerprint)
    claim = look(restart=restart)
    if claim.state is State.DONE:
        raise OutputError(
            f"{out} holds the finished checkpoint.", f"Publish it: mquant push {out} {repo}"
        )
    check_disk(out, claim.files, spec.file_bytes if scratch is None else scratch)
    source = spec.source if files else materialize(spec.source, emit)
    ledger = Ledger(out)
    try:
        claim = look(restart=restart)  # again: now nobody else can change it
        if not to.done:
            to.open()
            with Shipper(to, out, spec.files, shards, emit) as shipper:
                run = Run(spec, plan.reading_from(source), out, workers, emit, files, shipper)
                digests = run.make_shards(ledger, claim, spec.files)
            complete(spec, out, source, digests, emit, partial(_there, spec, to, out, digests))
            seal(to, out)
        discard(out, spec.files)
        ledger.complete()
    finally:
        ledger.release()
    out.rmdir()
    return Shipped(to.writer.page, plan, fresh=not to.done)


def _share_out(plan: Plan, scratch: int | None) -> tuple[int | None, float]:
    """What source files and what shards may take of the scratch; None where the source is here.

    Shards get two of the largest, so that one is made while another is sent, or a quarter, if that
    is more: about that is what NVFP4 makes of BF16. Where source files need more than is left, they
    do with one.
    """
    if scratch is None:
        return None, float("inf")
    largest = max(shard.file_bytes for shard in plan.shards)
    local = isinstance(plan.survey.checkpoint.source, Folder)
    least = 0 if local else least_scratch(plan)
    units = sum(len(shard.units) for shard in plan.shards)
    ledger = _LEDGER_BYTES * (units + len(plan.survey.checkpoint.shards))
    check_scratch(scratch, least + largest + ledger)
    free = scratch - ledger
    if local:
        return None, free
    room = max(2 * largest, free // 4)
    room = room if free - room >= least else largest
    return free - room, room


def _there(
    spec: RunSpec, to: Destination, out: Path, digests: Mapping[str, str], local: Source
) -> Source:
    """The repo as it will be with index and config.json, when all else was sent and is there."""
    others = [name for name in spec.files if name not in LAST and name not in digests]
    repo = send_others(to, out, others, digests)
    check_headers_as_planned(repo, spec.plan)
    return Overlay(repo, {name: local.read(name) for name in LAST})


__all__ = ["Shipped", "quantize_to_hub"]
