"""Carry out a plan: check the options, claim OUT, run the engine, complete the checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from mquant.checkpoint import Source, reader_of
from mquant.findings import RULES
from mquant.output import CALIBRATION, ShardObserver, ShardSet
from mquant.plan import Plan
from mquant.plan.loadable import OUTPUT_NOT_LOADABLE
from mquant.runs.checks import check_sizes
from mquant.runs.run import Result, Run, RunOptions
from mquant.runs.scratch import check_scratch, check_side_files, least_scratch, spooled
from mquant.runs.spec import Engine, QuantizeSpec, check_engine, prepare
from mquant.runs.unchanged import digests_now
from mquant.tokens.samples import load_samples
from mquant.tokens.tokenizer import Integers

if TYPE_CHECKING:
    from mquant.engines.stream import Reader


def quantize(
    plan: Plan,
    out: Path,
    *,
    engine: Engine = Engine.AUTO,
    importance: Path | None = None,
    data: str | None = None,
    **options: Unpack[RunOptions],
) -> Result:
    """Write the checkpoint that `plan` describes into `out`, or resume an earlier run.

    `importance` is a file with the weight of an error in each input channel, for a search of scales
    (see `engines.importance`). `data` is the calibration data of a recipe that needs data (see
    `tokens.samples`). Raises Refused for a plan with errors, UsageError and DataFileError for
    options that do not go with the plan, MissingExtra without the engine's packages, OutputError
    for an OUT that mquant did not make, that is in use or is too small, and what the engine raises.
    """
    spec, scratch = prepare(plan, engine, importance, data), options.get("scratch")
    check_sizes(plan)
    if scratch is not None:
        check_engine(spec.kind, "--scratch")
        check_scratch(scratch, least_scratch(plan))
    room = spec.file_bytes + (scratch or 0)
    fetch = (lambda: spec.source) if scratch else None
    with Run.claim(out, spec, room=room, fetch=fetch, **options) as run:
        if run.done:
            return run.result(fresh=False)
        run_engine(run, spec, scratch)
        return run.finish(partial(judge, run, spec))


def run_engine(
    run: Run,
    spec: QuantizeSpec,
    scratch: int | None = None,
    ship: Callable[[], AbstractContextManager[ShardObserver]] | None = None,
    away: Callable[[], Mapping[str, str]] | None = None,
    files: tuple[str, ...] | None = None,
) -> None:
    """Write all shards of a claimed run.

    `scratch` is the most bytes of a hub's files that are in OUT at a time. `ship` returns an
    observer of the shards, which is left when all shards are complete; `away` and `files` are as
    for `Run.write_shards`.
    """

    def engines(output: ShardSet) -> None:
        from mquant.engines import stream  # numba
        from mquant.engines.importance import weigher

        input_scale = None
        if spec.kind is Engine.ONESHOT:
            from mquant.engines import oneshot  # torch and transformers: seconds, and optional

            _know_digests(run, spec)
            oneshot.run(run.plan, run.source, output.write, run.emit, _samples(run, spec))
            run.accept_touched()
        elif spec.kind is Engine.CALIBRATED:
            from mquant.runs.calibrated import run_calibrated

            _know_digests(run, spec)
            input_scale = run_calibrated(run, _samples(run, spec) or [], output)
            run.accept_touched()
        # After oneshot and GPTQ only the copied tensors are left to write.
        weigh = weigher(run.plan.recipe, spec.importance)
        with ship() if ship else nullcontext() as observer:
            if observer is not None:
                output.observe(observer)
            with _reading(run, output, scratch) as reader:
                stream.run(reader, output, run.threads, weigh, run.emit, input_scale)
            output.finish()

    run.write_shards(engines, away, files)


def _know_digests(run: Run, spec: QuantizeSpec) -> None:
    """Hash the source: what is made of a weight depends on all files, and cannot be made again.

    A read of all shards is short beside the engine.
    """
    run.source_digests = digests_now(run.source, spec.read, run.emit)


def judge(run: Run, spec: QuantizeSpec, made: Source) -> None:
    """Judge the checkpoint `made` as `mquant verify OUT --against SRC` does.

    If the stream engine ran, judge the structure only: reading the numbers back would take longer
    than the quantization. Errors of rules that the plan's findings name already, such as those that
    --allow-unsafe allows, do not count; nor do errors that say why vLLM does not load the output,
    if the plan says that it does not. Raises SourceError for a side file that is not the hub's,
    EngineError for any other error.
    """
    check_side_files(run)
    rules = {finding.rule for finding in spec.plan.findings}
    if OUTPUT_NOT_LOADABLE.id in rules:
        rules |= {r.id for r in RULES.values() if r.if_loads or r.needs == "loader"}
    run.judge(made, ignoring=rules, parent=None if spec.kind is Engine.STREAM else run.source)


@contextmanager
def _reading(run: Run, output: ShardSet, scratch: int | None) -> "Iterator[Reader]":
    """Yield the reader of the stream engine."""
    if scratch is None:
        with closing(reader_of(run.source)) as reader:
            yield reader
    else:
        with spooled(run, output, scratch) as spool:
            yield spool


def _samples(run: Run, spec: QuantizeSpec) -> list[Integers] | None:
    """Return the samples of a calibrated run, if it is one, and note them for mquant.json."""
    if spec.data is None:
        return None
    samples = load_samples(spec.data, run.source, run.plan.recipe.calibration, run.emit)
    run.used[CALIBRATION] = samples.record
    run.emit(samples.note)
    return samples.ids
