"""`mquant quantize`: the main job."""

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
    Scratch,
    Src,
    Workers,
)
from mquant.cli.output import Format, Output, output
from mquant.cli.plan import make, show_plan
from mquant.cli.progress import progress
from mquant.cli.source import default_out
from mquant.cli.tables import facts
from mquant.cli.text import both_sizes, clean, parse_size, plural
from mquant.workflows.quantize import Engine, check_data

if TYPE_CHECKING:
    from mquant.workflows.quantize import Result

EngineChoice = Annotated[
    Engine,
    typer.Option(
        help="What does the arithmetic; `auto`: stream, or oneshot where the recipe needs data."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show the plan, as `mquant plan`.")]


def quantize(
    src: Src = None,
    recipe: RecipeName = None,
    out_folder: Out = None,
    engine: EngineChoice = Engine.AUTO,
    importance: Importance = None,
    data: Data = None,
    dry_run: DryRun = False,
    max_shard_size: MaxShardSize = None,
    scratch: Scratch = None,
    workers: Workers = None,
    restart: Restart = False,
    allow_unsafe: AllowUnsafe = False,
    revision: Revision = None,
    form: FormatChoice = Format.HUMAN,
) -> None:
    """Quantize a checkpoint into a folder that loads.

    What would give a broken checkpoint is refused before any weight is read. Running the same
    command again is safe: a finished folder is left alone, an unfinished one is
    gone on with.

    Example: mquant quantize ./MiniMax-M2.7-REAP --recipe nvfp4 -o ./MiniMax-M2.7-REAP-NVFP4
    """
    with output("quantize", form) as out:
        limit = None if scratch is None else parse_size(scratch)
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
        with progress(out) as emit:
            result = carry_out(
                plan,
                where,
                engine=engine,
                importance=importance,
                data=data,
                workers=workers,
                scratch=limit,
                restart=restart,
                emit=emit,
            )
        _tell(out, result)


def _tell(out: Output, result: "Result") -> None:
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


__all__ = ["quantize"]
