"""`mquant quantize`: the main job."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from mquant.cli.options import (
    AllowUnsafe,
    Data,
    FormatChoice,
    Importance,
    MaxShardSize,
    Out,
    Public,
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
from mquant.cli.source import default_out, is_repo_id
from mquant.cli.tables import facts
from mquant.cli.text import both_sizes, clean, parse_size, plural
from mquant.errors import UsageError
from mquant.workflows.quantize import Engine, check_data

if TYPE_CHECKING:
    from mquant.plan import Plan
    from mquant.workflows.quantize import Result

EngineChoice = Annotated[
    Engine,
    typer.Option(
        help="What does the arithmetic; `auto`: stream, or oneshot where the recipe needs data."
    ),
]
PushTo = Annotated[
    str | None,
    typer.Option(
        metavar="REPO",
        help="Make it in a hub repo: shards go there when they are made, and from here.",
        show_default=False,
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
    push_to: PushTo = None,
    public: Public = False,
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
        if push_to is not None and not is_repo_id(push_to):
            example = "--push-to org/MiniMax-M2.7-REAP-NVFP4"
            raise UsageError(f"{clean(push_to[:96])!r} is no hub repo id.", f"Example: {example}")
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
        if push_to is not None:
            _ship(
                out,
                plan,
                where,
                push_to,
                public=public,
                engine=engine,
                importance=importance,
                workers=workers,
                scratch=limit,
                restart=restart,
            )
            return
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


def _ship(out: Output, plan: "Plan", where: Path, repo: str, **options: Any) -> None:
    from mquant.workflows.hub_to_hub import quantize_to_hub

    with progress(out) as emit:
        done = quantize_to_hub(plan, where, repo, emit=emit, **options)
    out.put(
        url=done.page,
        already_done=not done.fresh,
        recipe=plan.recipe.name,
        fingerprint=plan.fingerprint,
        ignore=list(plan.ignore),
    )
    verb = "Quantized into" if done.fresh else "Already there:"
    out.show(
        Text.assemble((verb, "bold green"), f" {done.page}"),
        facts(
            [
                ("Source", both_sizes(plan.source_bytes)),
                ("Output", both_sizes(plan.output_bytes)),
            ]
        ),
    )


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
