"""`mquant families draft`: write the family file that a checkpoint would take."""

from pathlib import Path
from typing import Annotated

import typer

from mquant.cli.options import FormatChoice, Revision, Src
from mquant.cli.output import Format, output, write
from mquant.cli.source import example, open_source
from mquant.errors import OutputError
from mquant.text import clean, plural

DraftFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="The file to write. Default: stdout."),
]


def draft(
    src: Src = None,
    file: DraftFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Write a draft of a family file, from a checkpoint's headers and config.json.

    The draft names every tensor. A comment that begins with `# unsure` is above each line that
    the headers do not settle. Continue with: mquant families check FILE --against SRC.

    Example: mquant families draft ./MyModel -o my_model.yaml
    """
    with output("families.draft", output_format) as out:
        source = open_source(src, revision, example(draft))
        if file is not None and file.exists():
            raise OutputError(f"{file} exists already.", "Give another file with -o.")
        from mquant.checkpoint import open_checkpoint
        from mquant.family_draft import draft_family

        drafted = draft_family(open_checkpoint(source))
        text = drafted.text
        unsure = text.count("# unsure: ")
        out.put(name=drafted.content["name"], unsure=unsure, text=text)
        if file is None:
            if out.format is Format.HUMAN:
                write(text)  # unchanged: the user may redirect the output into a file
            return
        from mquant.output.disk import out_of_space, write_whole

        raw = text.encode()
        with out_of_space(file, len(raw)):
            write_whole(file, [raw])
        rows = plural(len(drafted.content["tensors"]), "row")
        out.show(clean(f"{file}: {rows}, unsure of {plural(unsure, 'fact')}."))
        out.show(clean(f"Next: mquant families check {file} --against {source.name}"))
