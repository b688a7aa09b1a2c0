"""`mquant plan`: what would happen to every tensor, before any weight is read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mquant.cli.options import (
    AllowUnsafe,
    Exact,
    FamilyFile,
    FormatChoice,
    MaxShardSize,
    Out,
    RecipeName,
    Revision,
)
from mquant.cli.options import Src as SrcArgument
from mquant.cli.output import Format, Output, output
from mquant.cli.source import default_out, example, open_source
from mquant.cli.tables import facts, table
from mquant.cli.text import parse_size
from mquant.errors import Refused, UsageError
from mquant.text import both_sizes, clean, compress, plural, size

if TYPE_CHECKING:
    from mquant.plan import Plan
    from mquant.recipe import Recipe

_SHARDS_SHOWN = 8


def plan(
    src: SrcArgument = None,
    recipe: RecipeName = None,
    out_folder: Out = None,
    max_shard_size: MaxShardSize = None,
    allow_unsafe: AllowUnsafe = False,
    exact: Exact = False,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Show what a recipe would do to every tensor, and the disk and memory that the run needs.

    No weight is read (--exact: the scales are), nothing is written. Exit code 1: `quantize` would
    refuse.

    Example: mquant plan MiniMaxAI/MiniMax-M2 --recipe nvfp4
    """
    with output("plan", output_format) as out:
        checks = {"allow_unsafe": allow_unsafe, "exact": exact}
        chosen = chosen_recipe(plan, recipe)
        planned = make(plan, src, chosen, revision, max_shard_size, family, **checks)
        show_plan(out, planned, out_folder)


def chosen_recipe(
    verb: Callable[..., None],
    name: str | None,
    samples: int | None = None,
    length: int | None = None,
) -> "Recipe":
    """Return the recipe typed after `verb`, with this number and length of samples.

    None: as the recipe says. Raises UsageError for a missing or unknown recipe, DataFileError for a
    wrong file.
    """
    if name is None:
        raise UsageError("--recipe is missing.", f"{example(verb)}  (mquant recipes lists them)")
    from mquant.recipe import find_recipe

    return find_recipe(name).sampled(samples, length)


def make(
    verb: Callable[..., None],
    src: str | None,
    recipe: "Recipe",
    revision: str | None,
    max_shard_size: str | None,
    family: Path | None,
    *,
    allow_unsafe: bool,
    exact: bool = False,
) -> "Plan":
    """Return the plan for the arguments typed after `verb`. The plan may hold refusals.

    If `exact`, a block of MXFP4 that would be rounded again is a refusal. Raises UsageError, before
    SRC is read, if an argument is missing or wrong.
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    from mquant.checkpoint import open_checkpoint
    from mquant.family_files import load_families
    from mquant.plan import DEFAULT_SHARD_BYTES, make_plan

    planned = make_plan(
        open_checkpoint(open_source(src, revision, example(verb))),
        recipe,
        load_families(family),
        max_shard_bytes=DEFAULT_SHARD_BYTES if limit is None else limit,
        allow_unsafe=allow_unsafe,
    )
    if not exact:
        return planned
    from mquant.runs.casts import exact as checked

    return checked(planned)


def show_plan(out: Output, plan: "Plan", out_folder: Path | None) -> None:
    """Show a plan, its findings and its forecast in the chosen format.

    Raises Refused, after everything is shown, if the plan has refusals.
    """
    from mquant.runs.forecast import forecast, plan_report, resource_findings

    folder = out_folder or default_out(plan.survey.checkpoint.source, plan.recipe.suffix)
    resources = forecast(plan, folder)
    report = plan_report(plan, resources)
    out.put(**report)
    out.show(render_plan(report, folder))
    out.report(plan.findings)
    out.report(resource_findings(plan, resources))
    if plan.refusals:
        raise Refused(plan.refusals)


def render_plan(report: Mapping[str, Any], out_folder: Path) -> RenderableType:
    """Render a plan's report for a person, without the findings."""
    before, after = report["totals"]["source"], report["totals"]["output"]
    resources = report["resources"]
    ratio = f", {after['bytes'] / before['bytes']:.1%}" if before["bytes"] else ""
    title = Text.assemble(
        (clean(report["source"]), "bold"),
        f"  family {clean(report['family'])}, recipe ",
        (clean(report["recipe"]), "bold"),
    )
    return Group(
        title,
        "",
        _roles(report["roles"]),
        "",
        facts(
            [
                ("Source", f"{plural(before['tensors'], 'tensor')}, {both_sizes(before['bytes'])}"),
                (
                    "Output",
                    f"{plural(after['tensors'], 'tensor')}, {both_sizes(after['bytes'])}{ratio}",
                ),
                *_shards(report["shards"]),
                *_ignore(report["ignore"]),
                *_data(report["calibration"]),
                (
                    "Disk",
                    f"{both_sizes(resources['disk_needed'])} needed, "
                    f"{size(resources['disk_available'])} free for {out_folder}",
                ),
                (
                    "Memory",
                    f"{both_sizes(resources['memory_needed'])} needed, "
                    f"{size(resources['memory_available'])} free",
                ),
            ]
        ),
        "",
    )


def _roles(roles: list[dict[str, Any]]) -> Table:
    rows = table(
        ("role", "left"),
        ("tensors", "right"),
        ("before", "right"),
        ("after", "right"),
        ("bits", "right"),
        ("scheme, or why it stays", "left"),
    )
    for role in roles:
        bits = role["bits_per_weight"]
        rows.add_row(
            role["role"],
            f"{role['tensors']:,}",
            size(role["bytes_before"]),
            size(role["bytes_after"]),
            "-" if bits is None else f"{bits:.2f}",
            _what(role),
        )
    return rows


def _what(role: dict[str, Any]) -> Text:
    from mquant.family_rows import Role

    if role["scheme"] is None:
        return Text(clean(role["reason"]))
    if role["bits_per_weight"] is None:
        return Text(f"{role['scheme']}: {clean(role['reason'])}", "red")
    return Text(role["scheme"], "red" if Role(role["role"]).refused_by_loaders else "green")


def _shards(shards: list[dict[str, Any]]) -> list[tuple[str, str]]:
    lines = [
        f"{shard['name']}  {size(shard['bytes'])}, {plural(shard['tensors'], 'tensor')}"
        for shard in shards
    ]
    if len(lines) > _SHARDS_SHOWN:
        lines = [*lines[:3], f"... {len(lines) - 4} more ...", lines[-1]]
    return [("Shards" if number == 0 else "", line) for number, line in enumerate(lines)]


def _data(calibration: dict[str, int] | None) -> list[tuple[str, str]]:
    if calibration is None:
        return []
    amount = f"{calibration['samples']:,} samples of {calibration['length']:,} tokens"
    return [("Data", f"{amount} at most, from --data")]


def _ignore(ignore: list[str]) -> list[tuple[str, str]]:
    entries = [
        pattern if count == 1 else f"{pattern} ({count:,})" for pattern, count in compress(ignore)
    ]
    return [("Ignore" if n == 0 else "", entry) for n, entry in enumerate(entries or ["nothing"])]
