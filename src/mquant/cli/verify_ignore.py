"""`mquant verify-ignore`: judge the ignore list and what is quantized."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mquant.cli.options import FamilyFile, FormatChoice, Revision, Src
from mquant.cli.output import Format, output
from mquant.cli.source import example, open_source
from mquant.cli.tables import table
from mquant.text import clean, plural, size

if TYPE_CHECKING:
    from mquant.verify.ignore_report import IgnoreReport

_ENTRIES_SHOWN = 20


def verify_ignore(
    src: Src = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 for warnings, too.")
    ] = False,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Say whether routers, lm_head and embeddings were kept, and whether ignore names them.

    Only headers and config.json are read. Exit code 3: a loader will refuse the checkpoint, or
    load it wrongly. An unquantized checkpoint is fine.

    Example: mquant verify-ignore MiniMaxAI/MiniMax-M2
    """
    with output("verify-ignore", output_format) as out:
        source = open_source(src, revision, example(verify_ignore))
        from mquant.checkpoint import open_checkpoint
        from mquant.checkpoint.hub import HubRepo
        from mquant.family_files import load_families
        from mquant.loader_model.modules import read_modules
        from mquant.verify.ignore_report import check_ignore
        from mquant.verify.not_judged import in_words

        report = check_ignore(read_modules(open_checkpoint(source), load_families(family)))
        hub = source if isinstance(source, HubRepo) else None
        out.put(
            **report.to_json(),
            bytes_read=hub.bytes_read if hub else None,
            requests=hub.requests if hub else None,
        )
        out.show(render(report))
        if hub:
            amount = f"{size(hub.bytes_read)} in {plural(hub.requests, 'request')}"
            out.show(f"Read {amount} from the hub.", "")
        if words := in_words(report.not_judged):
            out.show(clean(words), "")
        bad = frozenset({"error", "warning"} if strict else {"error"})
        out.report(report.findings, failing=bad)
        if any(finding.severity in bad for finding in report.findings):
            raise typer.Exit(3)
        report.raise_if_undecided()


def render(report: "IgnoreReport") -> RenderableType:
    """Render the report for a person, without the findings."""
    parts: list[RenderableType] = [Text(clean(report.verdict), "bold"), "", _kinds(report), ""]
    if report.entries:
        parts += [_entries(report), ""]
    return Group(*parts)


def _kinds(report: "IgnoreReport") -> Table:
    rows = table(
        ("kind", "left"),
        ("found", "right"),
        ("kept", "right"),
        ("quantized", "right"),
        ("in ignore", "right"),
    )
    for kind in report.kinds:
        bad = kind.quantized and kind.role.refused_by_loaders
        rows.add_row(
            kind.role.value,
            f"{kind.found:,}",
            f"{kind.kept:,}",
            Text(f"{kind.quantized:,}", "red" if bad else ""),
            f"{kind.covered:,}",
        )
    return rows


def _entries(report: "IgnoreReport") -> Table:
    rows = table(("hub", "right"), ("vLLM", "right"), ("names that match", "left"))
    for entry in report.entries[:_ENTRIES_SHOWN]:
        rows.add_row(f"{entry.hub:,}", f"{entry.vllm:,}", Text(clean(entry.entry)))
    more = len(report.entries) - _ENTRIES_SHOWN
    if more > 0:
        rows.add_row("", "", f"... and {more:,} more")
    return rows
