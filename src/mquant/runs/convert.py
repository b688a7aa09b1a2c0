"""Carry out a plan that stores the same weights otherwise: claim OUT, convert, finish, verify."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mquant.checkpoint import Folder, Overlay, Reader, Source
from mquant.errors import EngineError, Refused
from mquant.events import Emit, Note, silent
from mquant.output import Ledger, State, examine, file_names, finish, index_json, side_files
from mquant.plan import Plan
from mquant.runs.run import Making, check_disk, default_workers, materialize, provenance
from mquant.verify.judge import Depth, verify


@dataclass(frozen=True)
class Converted:
    """A finished output folder. `fresh` is False where an earlier run had made it already."""

    out: Path
    plan: Plan
    fresh: bool


def convert(
    plan: Plan,
    out: Path,
    stage: str,
    *,
    files: Mapping[str, bytes] | None = None,
    record: Mapping[str, Any] | None = None,
    workers: int | None = None,
    restart: bool = False,
    emit: Emit = silent,
) -> Converted:
    """Write the checkpoint that `plan` describes into `out`, or go on with what is there of it.

    `stage` is what progress is called; `files` are written besides the source's side files, and
    `record` into mquant.json. Raises Refused for a plan with errors, OutputError for an OUT that is
    not ours, in use or too small, SourceError for a source that cannot be read or changes.
    """
    if plan.refusals:
        raise Refused(plan.refusals)
    source = plan.survey.checkpoint.source
    local = [source.root] if isinstance(source, Folder) else []
    identity = source.identity()
    fingerprint = {**identity, "plan": plan.fingerprint, "engine": "stream"}
    look = partial(examine, out, local, fingerprint)
    claim = look(restart=restart)
    if claim.state is State.DONE:
        return Converted(out, plan, fresh=False)
    check_disk(out, claim.files, plan.file_bytes)
    folder = materialize(source, emit)
    extra = dict(files or {})
    sides: dict[str, Source] = dict.fromkeys(side_files(plan.survey.checkpoint), folder)
    sides |= dict.fromkeys(extra, Overlay(folder, extra))
    ledger = Ledger(out)
    try:
        claim = look(restart=restart)  # again: now nobody else can change it
        if claim.state is State.DONE:
            return Converted(out, plan, fresh=False)
        from mquant.engines import stream  # numba

        stamps = {name: folder.stamps[name] for name in plan.survey.checkpoint.shards}
        making = Making(plan, out, file_names(plan, sides), stamps, emit, stage)
        with closing(Reader(folder)) as reader:
            digests = making.shards(
                ledger,
                claim,
                fingerprint,
                lambda output: stream.run(reader, output, workers or default_workers()),
            )
        shards = {
            shard.name: {"bytes": shard.file_bytes, "sha256": digests[shard.name]}
            for shard in plan.shards
        }
        made_by = {"name": "stream", "versions": {}}
        more = {**provenance(plan, identity, made_by, fingerprint), **(record or {})}
        judge = partial(_judge, plan=plan, emit=emit)
        finish(out, plan.reading_from(folder), index_json(plan), shards, sides, more, judge, emit)
        ledger.complete()
    finally:
        ledger.release()
    return Converted(out, plan, fresh=True)


def _judge(result: Source, plan: Plan, emit: Emit) -> None:
    """Judge the structure of what was made; what the source lacks does not count."""
    families = {plan.family.name: plan.family}
    for finding in verify(result, families, Depth.STRUCTURE).findings:
        if finding.severity == "error" and finding.rule != "config-key-missing":
            raise EngineError(
                f"What was made is wrong ({finding.rule}): {finding.message}",
                "Please report this; OUT has no config.json, so nothing will load it.",
            )
        if finding.severity == "warning":
            emit(Note("warning", finding.message))


__all__ = ["Converted", "convert"]
