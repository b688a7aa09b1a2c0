"""`mquant families`: the model families that mquant knows."""

from typing import Annotated

import typer
from rich.text import Text

from mquant.cli.options import FormatChoice, shipped
from mquant.cli.output import Format, output
from mquant.cli.recipes import show_file
from mquant.text import clean


def _complete(incomplete: str) -> list[str]:
    return shipped("configs", incomplete)


Name = Annotated[
    str | None, typer.Argument(metavar="NAME", help="The family.", autocompletion=_complete)
]


def families(context: typer.Context, output_format: FormatChoice = Format.HUMAN) -> None:
    """List the model families that mquant knows.

    Example: mquant families
    """
    if context.invoked_subcommand is not None:
        return
    with output("families", output_format) as out:
        from mquant.family_files import load_families

        known = load_families()
        out.put(
            families=[
                {"name": name, "title": family.title, "model_types": list(family.model_types)}
                for name, family in known.items()
            ]
        )
        for name, family in known.items():
            types = ", ".join(family.model_types)
            out.show(
                Text.assemble(
                    (clean(name), "bold"), f"  {clean(family.title)} (model_type {clean(types)})"
                )
            )


def show(name: Name = None, output_format: FormatChoice = Format.HUMAN) -> None:
    """Print a family's file: its tensors' names, roles and fused sets.

    Example: mquant families show minimax_m2
    """
    with output("families.show", output_format) as out:
        from mquant.family_files import load_families

        show_file(out, "families", name, load_families())
