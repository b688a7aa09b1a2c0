"""`mquant report`: write every measurement of a checkpoint as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from mquant.cli.evaluate import Context, TextFile, Tokens
from mquant.cli.options import (
    Against,
    CompareFile,
    EvalFile,
    FamilyFile,
    FormatChoice,
    Revision,
    Src,
)
from mquant.cli.output import Format, output
from mquant.cli.progress import progress
from mquant.cli.source import example, open_source
from mquant.cli.tables import facts
from mquant.errors import UsageError
from mquant.text import size

OutFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="The page to write. Default: SRC's name and -report.html, in the current folder.",
    ),
]


def report(
    src: Src = None,
    against: Against = None,
    text: TextFile = None,
    out_file: OutFile = None,
    comparison: CompareFile = None,
    evaluation: EvalFile = None,
    context: Context = 512,
    tokens: Tokens = 16_384,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Write one self-contained HTML page: sizes, errors, routing, evaluation, findings, recipe.

    Measurements that no file gives run now: verify, compare (with --against), eval (with --text).
    The page loads nothing from the network and runs no script. Exit code 3: the page shows errors.
    Exit code 1: what could not be judged decides whether a loader takes the checkpoint.

    Example: mquant report ./Model-NVFP4 --against ./Model --text wiki.txt -o report.html
    """
    with output("report", output_format) as out:
        source = open_source(src, revision, example(report))
        parent = None if against is None else open_source(against, None, example(report))
        if text is not None and evaluation is not None:
            raise UsageError("--text and --eval exclude each other.", example(report))
        from mquant.family_files import load_families
        from mquant.output import Document
        from mquant.publish.report import MARK, Wanted
        from mquant.publish.report import report as write

        path = out_file or Path(f"{source.name.rpartition('/')[2]}-report.html")
        inputs = Wanted(src or ".", against, text, comparison, evaluation, context, tokens)
        document = Document(path, "-o", MARK)
        with progress(out) as emit:
            written = write(source, parent, load_families(family), inputs, document, emit=emit)
        out.put(
            path=str(path),
            bytes=written.bytes,
            verdict=written.verification.verdict,
            compared=written.comparison is not None,
            evaluated=written.evaluation is not None,
        )
        out.show(
            facts(
                [
                    ("Verdict", written.verification.verdict),
                    ("Report", f"{path} ({size(written.bytes)}; open it in a browser)"),
                ]
            )
        )
        out.report(written.verification.findings)
        if written.verification.count("error"):
            raise typer.Exit(3)
        written.verification.raise_if_undecided()
