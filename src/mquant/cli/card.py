"""`mquant card`: write the hub's README.md from known facts only."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mquant.cli.options import (
    CompareFile,
    DepthChoice,
    EvalFile,
    FamilyFile,
    FormatChoice,
    From,
    LoaderChoice,
    Revision,
    Src,
)
from mquant.cli.output import Format, Output, output
from mquant.cli.progress import progress
from mquant.cli.source import example, open_source
from mquant.errors import OutputError, UsageError

if TYPE_CHECKING:
    from mquant.checkpoint import Source
    from mquant.publish.card import Card, Measured


AboutFile = Annotated[
    Path | None,
    typer.Option(
        "--about",
        metavar="FILE",
        help="YAML with facts from you: repo, base_model, companions (repo, what), citation.",
    ),
]
CardFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="The file to write. Default: README.md in SRC's folder.",
    ),
]


def card(
    src: Src = None,
    parent: From = None,
    eval_file: EvalFile = None,
    compare_file: CompareFile = None,
    about_file: AboutFile = None,
    depth: DepthChoice = None,
    loader: LoaderChoice = None,
    file: CardFile = None,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Write a quantized checkpoint's model card, from facts only.

    The checkpoint is verified first; a broken one gets no card (exit code 3). The card leaves
    out unknown facts, and says so if nothing was measured.

    Example: mquant card ./MiniMax-M2.7-REAP-NVFP4 --from ./MiniMax-M2.7-REAP
    """
    with output("card", output_format) as out:
        source = open_source(src, revision, example(card))
        original = None if parent is None else open_source(parent, None, example(card))
        path = _path(source, file)
        from mquant.family_files import load_families
        from mquant.output import Document
        from mquant.publish.card import MARK, gather, read_about, render
        from mquant.verify.judge import Depth
        from mquant.verify.loaders.install import find_python

        document = Document(path, "-o", MARK.encode())
        document.check()
        about = None if about_file is None else read_about(about_file)
        measured = _measured(source.name, eval_file, compare_file)
        with progress(out) as emit:
            card_facts = gather(
                source,
                load_families(family),
                given=original,
                measured=measured,
                about=about,
                depth=None if depth is None else Depth(depth),
                vllm=None if loader is None else find_python(loader),
                emit=emit,
            )
        out.put(verdict=card_facts.report.verdict)
        if card_facts.report.count("error"):
            out.report(card_facts.report.findings)
            out.show(Text("The checkpoint is broken, so no card was written.", "bold red"))
            raise typer.Exit(3)
        card_facts.report.raise_if_undecided()
        document.write([render(card_facts).encode()])
        _tell(out, card_facts, path)


def _path(source: "Source", file: Path | None) -> Path:
    from mquant.checkpoint import Folder

    if file is not None:
        return file
    if isinstance(source, Folder):
        path = source.root / "README.md"
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is not a regular file.", "Give another file with -o.")
        return path
    raise UsageError(
        f"{source.name} is a hub repo: say where its card goes, with -o.",
        f"Example: mquant card {source.name} -o README.md",
    )


def _measured(name: str, eval_file: Path | None, compare_file: Path | None) -> "Measured":
    from mquant.publish.card import Measured, read_compare, read_eval

    figures = {} if eval_file is None else read_eval(eval_file, name)
    figures |= {} if compare_file is None else read_compare(compare_file, name)
    return Measured(**figures)


def _tell(out: Output, card: "Card", path: Path) -> None:
    out.put(
        card=str(path),
        repo=card.repo,
        scheme=card.scheme or None,
        base_model=card.about.base_model or card.parent.repo or None,
        license=card.parent.license or None,
        measured=card.measured.anything,
    )
    out.show(Text.assemble(("Wrote", "bold green"), f" {path}"), card.report.verdict)
