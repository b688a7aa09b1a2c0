"""`mquant finish`: complete a checkpoint whose shares are all done."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mquant.cli.options import FormatChoice
from mquant.cli.output import Format, output
from mquant.cli.progress import progress
from mquant.cli.results import tell_result
from mquant.text import clean

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder that --share wrote into.")]


def finish(out_folder: Out, output_format: FormatChoice = Format.HUMAN) -> None:
    """Complete a checkpoint whose shares `mquant quantize --share 1/N` to N/N have written.

    OUT records all options. If a share is not done, mquant names the share and changes nothing. The
    source must still be at its old path, for its headers and side files.

    Example: mquant finish ./MiniMax-M2.7-REAP-NVFP4
    """
    with output("finish", output_format) as out:
        from mquant.runs.shares import finish_shares

        with progress(out) as emit:
            result = finish_shares(out_folder, emit)
        if result is not None:
            tell_result(out, result)
            return
        out.put(out=str(out_folder), already_done=True)
        out.show(Text.assemble(("Already done:", "bold green"), f" {clean(str(out_folder))}"))
