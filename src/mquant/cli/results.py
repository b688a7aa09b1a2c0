"""Show what `mquant quantize` and `mquant finish` wrote."""

from typing import TYPE_CHECKING

from rich.text import Text

from mquant.cli.output import Output
from mquant.cli.tables import facts
from mquant.text import both_sizes, clean, plural, size

if TYPE_CHECKING:
    from mquant.runs.run import Result
    from mquant.runs.shares import Shares


def tell_result(out: Output, result: "Result") -> None:
    """Show the checkpoint that a run wrote."""
    plan = result.plan
    if result.page:
        _tell_pushed(out, result)
        return
    out.put(
        out=str(result.out),
        already_done=not result.fresh,
        engine=result.engine,
        recipe=plan.recipe.name,
        fingerprint=plan.fingerprint,
        totals={
            "source": {"tensors": len(plan.survey.members), "bytes": plan.source_bytes},
            "output": plan.output_totals,
        },
        ignore=list(plan.ignore),
        **({"cast": dict(result.cast)} if result.cast else {}),
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
                *_cast(result),
                ("Kept", f"{plural(len(plan.ignore), 'module')} in ignore, named in config.json"),
            ]
        ),
    )


def _cast(result: "Result") -> list[tuple[str, str]]:
    """Return the line on the cast from MXFP4 to NVFP4; none if nothing was cast."""
    if not result.cast:
        return []
    blocks, lossless = result.cast.get("blocks"), result.cast.get("lossless")
    if not isinstance(blocks, int) or not isinstance(lossless, int):
        return []
    return [("Cast", f"lossless: {lossless:,} of {blocks:,} blocks")]


def tell_share(out: Output, run: "Shares", number: int, *, fresh: bool) -> None:
    """Show which share of the work was done."""
    from mquant.output import SHARES

    part, of = run.parts[number - 1], run.shared.of
    out.put(
        out=str(run.out),
        already_done=not fresh,
        recipe=part.recipe.name,
        fingerprint=run.spec.plan.fingerprint,
        share={
            "number": number,
            "of": of,
            "shards": [shard.name for shard in part.shards],
            "source_bytes": part.source_bytes,
            "file_bytes": part.file_bytes,
        },
    )
    verb = "Wrote" if fresh else "Already done:"
    folder, next_step = clean(str(run.out)), []
    if (run.out / SHARES).exists():
        next_step = [("Then", f"mquant finish {folder}, when all shares are done")]
    out.show(
        Text.assemble((verb, "bold green"), f" share {number:,} of {of:,} in {folder}"),
        facts(
            [
                ("Source", f"{size(part.source_bytes)} of {size(run.spec.plan.source_bytes)}"),
                ("Shards", f"{len(part.shards):,} of {len(run.spec.plan.shards):,}"),
                *next_step,
            ]
        ),
    )


def _tell_pushed(out: Output, result: "Result") -> None:
    """Show the hub repo that a run wrote the checkpoint into."""
    plan = result.plan
    out.put(
        url=result.page,
        already_done=not result.fresh,
        recipe=plan.recipe.name,
        fingerprint=plan.fingerprint,
        ignore=list(plan.ignore),
    )
    verb = "Quantized into" if result.fresh else "Already there:"
    out.show(
        Text.assemble((verb, "bold green"), f" {result.page}"),
        facts(
            [("Source", both_sizes(plan.source_bytes)), ("Output", both_sizes(plan.output_bytes))]
        ),
    )
