"""`mquant quantize`: the main job."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mquant.cli.options import (
    AllowUnsafe,
    Data,
    FormatChoice,
    Importance,
    MaxShardSize,
    Out,
    RecipeName,
    Restart,
    Revision,
    Src,
    Workers,
)
from mquant.cli.output import Format, Output, output
from mquant.cli.plan import make, show_plan
from mquant.cli.progress import progress
from mquant.cli.source import default_out
from mquant.cli.tables import facts
from mquant.cli.text import both_sizes, clean, parse_share, parse_size, plural, size
from mquant.errors import UsageError
from mquant.workflows.quantize import Engine, check_data

if TYPE_CHECKING:
    from mquant.plan import Plan
    from mquant.workflows.order import Order
    from mquant.workflows.quantize import Result
    from mquant.workflows.shares import Shares


class Cluster(StrEnum):
    """What can share out the work."""

    RAY = "ray"


EngineChoice = Annotated[
    Engine,
    typer.Option(
        help="What does the arithmetic; `auto`: stream, or oneshot where the recipe needs data."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show the plan, as `mquant plan`.")]
Job = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Make share I of N, and leave the rest to other processes; then: mquant finish OUT.",
        show_default=False,
    ),
]
OnCluster = Annotated[
    Cluster | None,
    typer.Option(help="Share the work out over this cluster, and finish it.", show_default=False),
]


def quantize(
    src: Src = None,
    recipe: RecipeName = None,
    out_folder: Out = None,
    engine: EngineChoice = Engine.AUTO,
    importance: Importance = None,
    data: Data = None,
    dry_run: DryRun = False,
    max_shard_size: MaxShardSize = None,
    workers: Workers = None,
    job: Job = None,
    cluster: OnCluster = None,
    restart: Restart = False,
    allow_unsafe: AllowUnsafe = False,
    revision: Revision = None,
    form: FormatChoice = Format.HUMAN,
) -> None:
    """Quantize a checkpoint into a folder that loads.

    What would give a broken checkpoint is refused before any weight is read. Running the same
    command again is safe: a finished folder is left alone, an unfinished one is
    gone on with.

    Many machines: run it with --job 1/N to --job N/N, whatever starts these, into an OUT that all
    of them see, then `mquant finish OUT`; or once with --cluster ray, on the cluster at
    RAY_ADDRESS, the one that runs here, or else one of this machine alone. The result is the same,
    byte for byte.

    Example: mquant quantize ./MiniMax-M2.7-REAP --recipe nvfp4 -o ./MiniMax-M2.7-REAP-NVFP4
    """
    with output("quantize", form) as out:
        share = None if job is None else parse_share(job)
        _check_options(share, cluster, engine, restart=restart)
        plan = make(
            "quantize",
            src,
            recipe,
            revision=revision,
            max_shard_size=max_shard_size,
            allow_unsafe=allow_unsafe,
        )
        if dry_run or plan.refusals:
            show_plan(out, plan, out_folder)
            check_data(plan.recipe, data)
            return
        out.report(plan.findings)
        from mquant.workflows.quantize import quantize as carry_out

        where = out_folder or default_out(plan.survey.checkpoint.source, plan.recipe.suffix)
        if share is None and cluster is None:
            with progress(out) as emit:
                result = carry_out(
                    plan,
                    where,
                    engine=engine,
                    importance=importance,
                    data=data,
                    workers=workers,
                    restart=restart,
                    emit=emit,
                )
            tell_result(out, result)
            return
        if not plan.recipe.needs_data:  # which there are no shares of, whatever the data
            check_data(plan.recipe, data)
        order = _order(plan, max_shard_size, importance, allow_unsafe=allow_unsafe)
        if share is not None:
            _make_share(out, plan, order, where, share, workers)
        else:
            from mquant.workflows.cluster import quantize_on_ray

            with progress(out) as emit:
                result = quantize_on_ray(plan, order, where, workers=workers, emit=emit)
            tell_result(out, result)


def _check_options(
    share: tuple[int, int] | None, cluster: Cluster | None, engine: Engine, *, restart: bool
) -> None:
    """Raise UsageError for options that do not go together."""
    if share is None and cluster is None:
        return
    if share is not None and cluster is not None:
        raise UsageError(
            "--job is one share of the work, --cluster all of it.", "Leave one of them out."
        )
    if engine is Engine.ONESHOT:
        raise UsageError(
            "The oneshot engine takes a model as a whole: there are no shares of it.",
            "Leave out --engine oneshot, or --job and --cluster.",
        )
    if restart:
        raise UsageError(
            "--restart would delete what other processes have made.",
            "Delete OUT yourself, or give another folder with -o.",
        )


def _order(
    plan: "Plan", max_shard_size: str | None, importance: Path | None, *, allow_unsafe: bool
) -> "Order":
    from mquant.plan import DEFAULT_SHARD_BYTES
    from mquant.workflows.order import Order

    limit = DEFAULT_SHARD_BYTES if max_shard_size is None else parse_size(max_shard_size)
    return Order.of(plan, limit, allow_unsafe=allow_unsafe, importance=importance)


def _make_share(
    out: Output,
    plan: "Plan",
    order: "Order",
    where: Path,
    share: tuple[int, int],
    workers: int | None,
) -> None:
    from mquant.workflows.shares import in_shares

    number, of = share
    run = in_shares(plan, order, where, of)
    with progress(out) as emit:
        fresh = run.make(number, workers=workers, emit=emit)
    _tell_share(out, run, number, fresh=fresh)


def _tell_share(out: Output, run: "Shares", number: int, *, fresh: bool) -> None:
    from mquant.output import SHARES

    part, of = run.parts[number - 1], run.joint.of
    out.put(
        out=str(run.out),
        already_done=not fresh,
        recipe=part.recipe.name,
        fingerprint=run.intent.plan.fingerprint,
        share={
            "number": number,
            "of": of,
            "shards": [shard.name for shard in part.shards],
            "source_bytes": part.source_bytes,
            "file_bytes": part.file_bytes,
        },
    )
    verb = "Made" if fresh else "Already done:"
    where, then = clean(str(run.out)), []
    if (run.out / SHARES).exists():
        then = [("Then", f"mquant finish {where}, when all shares are done")]
    out.show(
        Text.assemble((verb, "bold green"), f" share {number:,} of {of:,} in {where}"),
        facts(
            [
                ("Source", f"{size(part.source_bytes)} of {size(run.intent.plan.source_bytes)}"),
                ("Shards", f"{len(part.shards):,} of {len(run.intent.plan.shards):,}"),
                *then,
            ]
        ),
    )


def tell_result(out: Output, result: "Result") -> None:
    """Show what was quantized."""
    plan = result.plan
    out.put(
        out=str(result.out),
        already_done=not result.fresh,
        engine=result.engine.value,
        recipe=plan.recipe.name,
        fingerprint=plan.fingerprint,
        totals={
            "source": {"tensors": len(plan.survey.members), "bytes": plan.source_bytes},
            "output": {
                "tensors": plan.output_tensors,
                "bytes": plan.output_bytes,
                "file_bytes": plan.file_bytes,
                "shards": len(plan.shards),
            },
        },
        ignore=list(plan.ignore),
    )
    verb = "Quantized" if result.fresh else "Already done:"
    tensors = plan.output_tensors
    out.show(
        Text.assemble((verb, "bold green"), f" {clean(str(result.out))}"),
        facts(
            [
                ("Source", both_sizes(plan.source_bytes)),
                ("Output", both_sizes(plan.output_bytes)),
                ("Tensors", f"{plural(tensors, 'tensor')} in {plural(len(plan.shards), 'shard')}"),
                ("Kept", f"{plural(len(plan.ignore), 'module')} in ignore, named in config.json"),
            ]
        ),
    )


__all__ = ["quantize", "tell_result"]
