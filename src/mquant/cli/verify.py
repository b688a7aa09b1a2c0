"""`mquant verify`: judge a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from mquant.cli.junit import forget, junit
from mquant.cli.options import Against, FamilyFile, FormatChoice, LoaderChoice, Revision, Src
from mquant.cli.output import Format, Output, output
from mquant.cli.progress import progress
from mquant.cli.source import example, open_source
from mquant.text import clean, plural, size

if TYPE_CHECKING:
    from mquant.verify.judge import Report


DepthChoice = Annotated[
    Literal["structure", "numbers", "full"] | None,
    typer.Option(
        help="structure: read headers and JSON; numbers: all data too; full: with --against, the "
        "whole parent too, not a sample. Default: numbers for a folder, structure for a hub repo."
    ),
]
JUnitFile = Annotated[
    Path | None,
    typer.Option(
        "--junit",
        metavar="FILE",
        callback=forget,
        is_eager=True,
        help="Also write the result as JUnit XML, for CI.",
    ),
]
FailOn = Annotated[
    Literal["error", "warning"], typer.Option(help="The lowest severity that exits with 3.")
]


def verify(
    src: Src = None,
    against: Against = None,
    depth: DepthChoice = None,
    loader: LoaderChoice = None,
    fail_on: FailOn = "error",
    junit_file: JUnitFile = None,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Judge a checkpoint: whether it is whole, its numbers are sane, and it matches its parent.

    docs/verify-rules.md has every rule. For a hub repo only headers are read, unless --depth asks
    for more. Exit code 3: the checkpoint is wrong.

    Example: mquant verify ./MiniMax-M2.7-REAP-NVFP4 --against ./MiniMax-M2.7-REAP
    """
    failing = frozenset({"error", fail_on})
    with output("verify", output_format) as out:
        with junit(junit_file, src or ".") as suite:
            source = open_source(src, revision, example(verify))
            parent = None if against is None else open_source(against, None, example(verify))
            from mquant.family_files import load_families
            from mquant.verify.judge import Depth
            from mquant.verify.judge import verify as judge
            from mquant.verify.loaders.install import find_python

            vllm = None if loader is None else find_python(loader)
            with progress(out) as emit:
                chosen = None if depth is None else Depth(depth)
                report = judge(source, load_families(family), chosen, parent, emit, vllm=vllm)
            out.put(verdict=report.verdict, **report.to_json())
            _show(out, report)
            out.report(report.findings, failing=failing)
            suite.add(report, failing)
            failed = any(finding.severity in failing for finding in report.findings)
            if not failed:
                report.raise_if_undecided()
        if failed:
            raise typer.Exit(3)


def _show(out: Output, report: "Report") -> None:
    """Show the verification to a person, without the findings."""
    from mquant.verify.not_judged import in_words
    from mquant.verify.stands_for import not_modelled

    good = not report.count("error") and not report.undecided
    out.show(Text(clean(report.verdict), "bold green" if good else "bold red"))
    if report.loader is not None:
        out.show(clean(f"vLLM {report.loader.version}: {report.loader.verdict}."))
    if report.bytes_read is not None:
        amount = size(report.bytes_read)
        out.show(f"Read {amount} in {plural(report.requests or 0, 'request')} from the hub.")
    out.show(clean(" ".join(filter(None, [in_words(report.not_judged), not_modelled()]))))
