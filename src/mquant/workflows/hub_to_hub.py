"""Quantize into a hub repo: what is made goes there shard by shard, and never lies here whole."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mquant.checkpoint import Folder, Source
from mquant.errors import OutputError
from mquant.events import Emit, silent
from mquant.output import Ledger, State, discard
from mquant.plan import Plan
from mquant.workflows.making import check_disk, look_again
from mquant.workflows.quantize import Engine, Run, check_engine, prepare
from mquant.workflows.shipping import LAST, Destination, Shipper, complete, find, judge_remote
from mquant.workflows.spooling import check_scratch, least_scratch


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
    `mquant.workflows.quantize.quantize`. Until it returns there is no config.json in the repo.
    """
    run = prepare(
        plan,
        out,
        engine=engine,
        importance=importance,
        data=None,
        workers=workers,
        scratch=scratch,
        emit=emit,
    )
    check_engine(run.engine, "--push-to")
    run, room = _share_out(run)
    to = find(repo, plan, run.fingerprint, public=public)
    claim = run.look(restart=restart)
    if claim.state is State.DONE:
        raise OutputError(
            f"{out} holds the finished checkpoint.", f"Publish it: mquant push {out} {repo}"
        )
    check_disk(out, claim.files, run.file_bytes if scratch is None else scratch)
    run = run.fetched()
    ledger = Ledger(out)
    try:
        claim = run.look(restart=restart)  # again: now nobody else can change it
        if not to.done:
            to.open()
            with Shipper(to, out, run.files, room, emit) as shipper:
                digests = run.make_shards(ledger, claim, shipper)
            _finish(run, to, digests)
            complete(to, out)
        discard(out, run.files)
        ledger.complete()
    finally:
        ledger.release()
    out.rmdir()
    return Shipped(to.writer.page, plan, fresh=not to.done)


def _share_out(run: Run) -> tuple[Run, float]:
    """The run with what its source files may take of the scratch, and what shards may.

    Shards get two of the largest, so that one is made while another is sent, or a quarter, if that
    is more: about that is what NVFP4 makes of BF16. Where source files need more than is left, they
    do with one.
    """
    if run.scratch is None:
        return run, float("inf")
    largest = max(shard.file_bytes for shard in run.plan.shards)
    local = isinstance(run.source, Folder)
    least = 0 if local else least_scratch(run.plan)
    check_scratch(run.scratch, least + largest)
    if local:
        return replace(run, scratch=None), run.scratch
    room = max(2 * largest, run.scratch // 4)
    room = room if run.scratch - room >= least else largest
    return replace(run, scratch=run.scratch - room), room


def _finish(run: Run, to: Destination, digests: dict[str, str]) -> None:
    """Write, send and judge all but index and config.json, then write these."""
    others = [name for name in run.files if name not in LAST and name not in digests]

    def look(made: Source) -> None:
        look_again(made, run.plan)
        run.judge(made)

    run.finish(digests, partial(judge_remote, to, run.out, others, digests, look))


__all__ = ["Shipped", "quantize_to_hub"]
