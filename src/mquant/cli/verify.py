"""`mquant verify`: whether a checkpoint is whole, sane, and made from its parent."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from mquant.cli.junit import write_junit
from mquant.cli.options import FamilyFile, FormatChoice, Revision, Src
from mquant.cli.output import Format, output
from mquant.cli.progress import progress
from mquant.cli.source import open_source
from mquant.text import clean, plural, size

_EXAMPLE = "mquant verify ./MiniMax-M2.7-REAP-NVFP4 --against ./MiniMax-M2.7-REAP"

Against = Annotated[
    str | None,
    typer.Option(
        metavar="PARENT",
        help="The folder or hub repo it was made from: what must be equal, and near, is compared.",
        show_default=False,
    ),
]
DepthChoice = Annotated[
    Literal["structure", "numbers", "full"] | None,
    typer.Option(
        help="What is read: headers and JSON; all data too; with --against, all of the parent "
        "too, instead of a sample. Left out: numbers for a folder, structure for a hub repo.",
        show_default=False,
    ),
]
LoaderChoice = Annotated[
    Literal["vllm"] | None,
    typer.Option(
        help="Also have this loader's own code load the headers, without a GPU "
        "(see: mquant loader install).",
        show_default=False,
    ),
]
JUnit = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Also write the result as JUnit XML, for CI.", show_default=False
    ),
]
FailOn = Annotated[
    Literal["error", "warning"], typer.Option(help="The least severity that exits with 3.")
]


def verify(
    src: Src = None,
    against: Against = None,
    depth: DepthChoice = None,
    loader: LoaderChoice = None,
    fail_on: FailOn = "error",
    junit: JUnit = None,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Judge a checkpoint: is it whole, are its numbers sane, is it made from its parent.

    docs/verify-rules.md has every rule. Of a hub repo only headers are read, unless --depth says
    more. Exit code 3: it was read and found wrong.

    Example: mquant verify ./MiniMax-M2.7-REAP-NVFP4 --against ./MiniMax-M2.7-REAP
    """
    with output("verify", output_format) as out:
        source = open_source(src, revision, _EXAMPLE)
        parent = None if against is None else open_source(against, None, _EXAMPLE)
        from mquant.family import load_families
        from mquant.verify.judge import Depth
        from mquant.verify.judge import verify as judge

        with progress(out) as emit:
            wanted = None if depth is None else Depth(depth)
            report = judge(
                source, load_families(family), wanted, parent, emit, ask_vllm=loader == "vllm"
            )
        out.put(verdict=report.verdict, **report.to_json())
        bad = bool(report.count("error"))
        out.show(Text(clean(report.verdict), "bold red" if bad else "bold green"))
        if report.loader is not None:
            out.show(clean(f"vLLM {report.loader.version}: {report.loader.verdict}."))
        if report.bytes_read is not None:
            read = size(report.bytes_read)
            out.show(f"Read {read} in {plural(report.requests or 0, 'request')} from the hub.")
        failing = frozenset({"error", fail_on})
        if junit is not None:
            write_junit(junit, report, failing)
        out.report(report.findings, failing=failing)
        if any(found.severity in failing for found in report.findings):
            raise typer.Exit(3)
