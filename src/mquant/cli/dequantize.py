"""`mquant dequantize`: write a BF16 checkpoint from a quantized checkpoint."""

from typing import TYPE_CHECKING

from rich.text import Text

from mquant.cli.options import (
    DryRun,
    FamilyFile,
    FormatChoice,
    MaxShardSize,
    Out,
    Restart,
    Revision,
    Src,
    Workers,
)
from mquant.cli.output import Format, Output, output
from mquant.cli.plan import show_plan
from mquant.cli.progress import progress
from mquant.cli.source import default_out, example, open_source
from mquant.cli.tables import facts
from mquant.cli.text import parse_size
from mquant.text import both_sizes, plural

if TYPE_CHECKING:
    from mquant.runs.run import Result


def dequantize(
    src: Src = None,
    out_folder: Out = None,
    dry_run: DryRun = False,
    max_shard_size: MaxShardSize = None,
    workers: Workers = None,
    restart: Restart = False,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Write a BF16 checkpoint from a quantized checkpoint, for tools that read only BF16.

    Reads NVFP4, MXFP4, FP8, MXFP8 and integers of compressed-tensors, ModelOpt's NVFP4 and
    FP8, and original releases in FP8 or MXFP4. Tensors that are not quantized are copied bit for
    bit. If interrupted, run the same command again: it resumes.

    Example: mquant dequantize ./MiniMax-M2.7-REAP-NVFP4 -o ./MiniMax-M2.7-REAP-BF16
    """
    with output("dequantize", output_format) as out:
        limit = None if max_shard_size is None else parse_size(max_shard_size)
        source = open_source(src, revision, example(dequantize))
        from mquant.checkpoint import open_checkpoint
        from mquant.family_files import load_families
        from mquant.plan import DEFAULT_SHARD_BYTES, make_bf16_plan

        plan = make_bf16_plan(
            open_checkpoint(source),
            load_families(family),
            max_shard_bytes=DEFAULT_SHARD_BYTES if limit is None else limit,
        )
        if dry_run or plan.refusals:
            show_plan(out, plan, out_folder)
            return
        out.report(plan.findings)
        from mquant.runs.convert import convert

        path = out_folder or default_out(source, plan.recipe.suffix)
        with progress(out) as emit:
            result = convert(plan, path, "dequantize", workers=workers, restart=restart, emit=emit)
        tell_converted(out, result, "Dequantized")


def tell_converted(out: Output, result: "Result", verb: str) -> None:
    """Show what a conversion wrote. `verb` is the past participle, e.g. `Dequantized`."""
    plan = result.plan
    out.put(
        out=str(result.out),
        already_done=not result.fresh,
        fingerprint=plan.fingerprint,
        totals={
            "source": {
                "tensors": len(plan.survey.checkpoint.tensors),
                "bytes": plan.survey.checkpoint.nbytes,
            },
            "output": plan.output_totals,
        },
    )
    tensors, shards = plan.output_tensors, len(plan.shards)
    out.show(
        Text.assemble((verb if result.fresh else "Already done:", "bold green"), f" {result.out}"),
        facts(
            [
                ("Source", both_sizes(plan.survey.checkpoint.nbytes)),
                ("Output", both_sizes(plan.output_bytes)),
                ("Tensors", f"{plural(tensors, 'tensor')} in {plural(shards, 'shard')}"),
            ]
        ),
    )
