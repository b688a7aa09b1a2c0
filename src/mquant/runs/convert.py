"""Carry out a plan that stores the same weights in another format: dequantize, export."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Unpack

from mquant.checkpoint import Overlay, Source, reader_of
from mquant.errors import Refused
from mquant.output import ShardSet, calibration_of, side_files
from mquant.plan import Plan
from mquant.runs.checks import check_sizes
from mquant.runs.run import Result, Run, RunOptions
from mquant.runs.run_spec import RunSpec


def convert(
    plan: Plan,
    out: Path,
    stage: str,
    *,
    files: Mapping[str, bytes] | None = None,
    record: Mapping[str, Any] | None = None,
    **options: Unpack[RunOptions],
) -> Result:
    """Write the checkpoint that `plan` describes into `out`, or resume an earlier run.

    `stage` names the progress. `files` are written besides the source's side files; `record` goes
    into mquant.json. Raises Refused for a plan with errors, OutputError for an OUT that
    mquant did not make, that is in use or is too small, SourceError for a source that cannot be
    read or that changes.
    """
    if plan.refusals:
        raise Refused(plan.refusals)
    check_sizes(plan)
    source = plan.survey.checkpoint.source
    identity, extra = source.identity(), dict(files or {})
    sides: dict[str, Source] = dict.fromkeys(side_files(plan.survey.checkpoint), source)
    spec = RunSpec(
        plan=plan,
        source=source,
        parent=identity,
        fingerprint={**identity, "plan": plan.fingerprint, "engine": "stream"},
        side_files=sides | dict.fromkeys(extra, Overlay(source, extra)),
        engine={"name": "stream", "versions": {}},
        stage=stage,
        protected=source.folders,
        extra_record={**calibration_of(source), **(record or {})},
    )
    with Run.claim(out, spec, **options) as run:
        if run.done:
            return run.result(fresh=False)
        from mquant.engines import stream  # numba

        def engine(output: ShardSet) -> None:
            with closing(reader_of(run.source)) as reader:
                stream.run(reader, output, run.threads, emit=run.emit)

        run.write_shards(engine)
        return run.finish(run.judge)
