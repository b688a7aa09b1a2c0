"""`mquant calibrate`: an importance file, for recipes that search scales."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mquant.cli.options import (
    Data,
    FamilyFile,
    FormatChoice,
    Length,
    RecipeName,
    Revision,
    Samples,
    Src,
)
from mquant.cli.output import Format, output
from mquant.cli.plan import chosen_recipe, make
from mquant.cli.progress import progress
from mquant.cli.source import example
from mquant.cli.tables import facts
from mquant.errors import UsageError
from mquant.text import names, plural

File = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")]


def calibrate(
    src: Src = None,
    data: Data = None,
    samples: Samples = None,
    length: Length = None,
    recipe: RecipeName = "nvfp4-opt",
    out_file: File = Path("importance.safetensors"),
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Measure the importance of each input channel: the mean square of its values on a text.

    The text goes through the model layer by layer, in the memory of one layer; each routed expert
    counts its own tokens. `mquant quantize --recipe nvfp4-opt --importance FILE` reads FILE.

    Example: mquant calibrate ./MiniMax-M2.7-REAP --data texts.jsonl -o importance.safetensors
    """
    with output("calibrate", output_format) as out:
        if data is None:
            raise UsageError("--data is missing.", example(calibrate))
        chosen = chosen_recipe(calibrate, recipe, samples, length)
        plan = make(calibrate, src, chosen, revision, None, family, allow_unsafe=False)
        out.report(plan.findings)
        from mquant.runs.calibrate import calibrate as measure

        with progress(out) as emit:
            result = measure(plan, data, out_file, emit)
        out.put(
            out=str(result.out),
            modules=result.modules,
            samples=result.samples,
            tokens=result.tokens,
            data=dict(result.data),
            unseen=list(result.unseen),
        )
        rows = [
            ("Data", f"{plural(result.samples, 'sample')}, {plural(result.tokens, 'token')}"),
            ("Modules", f"{result.modules:,}"),
        ]
        if result.unseen:
            rows.append(("Unseen", f"{len(result.unseen):,} saw no token: {names(result.unseen)}"))
        out.show(Text.assemble(("Measured", "bold green"), f" {result.out}"), facts(rows))
