"""Quantize into a hub repo: each complete shard is uploaded, and its local file deleted."""

from functools import partial
from pathlib import Path
from typing import Final, Unpack

from mquant.checkpoint import Overlay, Source
from mquant.errors import OutputError
from mquant.events import silent
from mquant.output import LAST, discard
from mquant.plan import Plan
from mquant.runs.checks import check_headers_as_planned
from mquant.runs.quantize import judge, run_engine
from mquant.runs.run import Result, Run, RunOptions
from mquant.runs.scratch import check_scratch, least_scratch
from mquant.runs.ship_shards import Destination, Shipper, open_destination, seal, send_others
from mquant.runs.spec import Engine, QuantizeSpec, check_engine, choose_engine, prepare
from mquant.runs.unchanged import tell_unread
from mquant.verify.digests import check_digests

_LEDGER_BYTES: Final = 250
"""Upper bound on the mean ledger bytes of a work unit, or of a source file."""


def quantize_to_hub(
    plan: Plan,
    out: Path,
    repo: str,
    *,
    public: bool = False,
    engine: Engine = Engine.AUTO,
    importance: Path | None = None,
    **options: Unpack[RunOptions],
) -> Result:
    """Write the checkpoint that `plan` describes into a hub repo, or resume an earlier run.

    `out` is a temporary folder, which is deleted in the end. At most `scratch` bytes are in `out`
    at a time: source files, if the source is a hub repo, and shards; None: no limit. The rest is as
    for `mquant.runs.quantize.quantize`. The last commit brings index and config.json to the repo.
    """
    check_engine(choose_engine(engine, plan), "--push-to")
    spec, scratch = prepare(plan, engine, importance), options.get("scratch")
    files, shards = _share_out(plan, scratch)
    to = open_destination(repo, spec, public=public, emit=options.get("emit", silent))
    if to.done:
        _refuse_changed(to)
        tell_unread(spec.source, spec.stamps, options.get("emit", silent))
    room = spec.file_bytes if scratch is None else scratch
    fetch = (lambda: spec.source) if files else None
    with Run.claim(out, spec, room=room, fetch=fetch, **options) as run:
        if run.done:
            raise OutputError(
                f"{out} holds the finished checkpoint.", f"Publish it: mquant push {out} {repo}"
            )
        if not to.done:
            to.open()
            run_engine(run, spec, files, partial(Shipper, to, run, shards), to.current)
            run.assemble(partial(_judge, run, spec, to))
            seal(to, run)
        discard(out, spec.files)
        run.claimed.complete()
    out.rmdir()
    return run.result(fresh=not to.done, page=to.writer.page)


def _share_out(plan: Plan, scratch: int | None) -> tuple[int | None, float]:
    """Return the bytes of scratch for source files (None: no limit, or local), and for shards.

    The shards get room for two of the largest shards, so that one is written while another is
    uploaded, or a quarter of the scratch if a quarter is more: NVFP4 is about a quarter of BF16. If
    the source files need more than the rest, the shards get room for one shard only.
    """
    if scratch is None:
        return None, float("inf")
    largest = max(shard.file_bytes for shard in plan.shards)
    local = bool(plan.survey.checkpoint.source.folders)
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


def _refuse_changed(to: Destination) -> None:
    """Raise OutputError if a file of a complete repo is not the file in the repo's mquant.json."""
    for finding in check_digests(to.writer.made, silent, data=False).findings:
        raise OutputError(
            f"In {to.writer.repo_id}, {finding.message}.",
            "Give another repo, or delete config.json there and run the same command again.",
        )


def _judge(run: Run, spec: QuantizeSpec, to: Destination, local: Source) -> None:
    """Upload all but index and config.json; judge the repo with these two files added."""
    others = [name for name in spec.files if name not in LAST and name not in run.digests]
    repo = send_others(to, run, others)
    check_headers_as_planned(repo, spec.plan)
    judge(run, spec, Overlay(repo, {name: local.read(name) for name in LAST}))
