"""`mquant recipes`: the recipes that ship with mquant."""

from collections.abc import Iterable
from typing import Annotated, Literal

import typer
from rich.padding import Padding
from rich.text import Text

from mquant.cli.options import FormatChoice, recipe_names
from mquant.cli.output import Format, Output, output, write
from mquant.errors import UsageError
from mquant.text import clean

Name = Annotated[
    str | None, typer.Argument(metavar="NAME", help="The recipe.", autocompletion=recipe_names)
]


def recipes(context: typer.Context, output_format: FormatChoice = Format.HUMAN) -> None:
    """List the recipes: which precision each role gets.

    Example: mquant recipes
    """
    if context.invoked_subcommand is not None:
        return
    with output("recipes", output_format) as out:
        from mquant.recipe import load_recipes

        known = load_recipes()
        out.put(
            recipes=[
                {"name": name, "title": recipe.title, "description": recipe.description}
                for name, recipe in known.items()
            ]
        )
        for name, recipe in known.items():
            title = Text.assemble((clean(name), "bold"), f"  {clean(recipe.title)}")
            out.show(title, Padding(Text(clean(recipe.description)), (0, 0, 0, 2)))


def show(name: Name = None, output_format: FormatChoice = Format.HUMAN) -> None:
    """Print a recipe's file, e.g. as the start of your own recipe.

    Example: mquant recipes show nvfp4
    """
    with output("recipes.show", output_format) as out:
        from mquant.recipe import load_recipes

        show_file(out, "recipes", name, load_recipes())


def show_file(
    out: Output, verb: Literal["recipes", "families"], name: str | None, known: Iterable[str]
) -> None:
    """Print a shipped file, or its content as JSON. Raises UsageError for an unknown name."""
    from mquant.data_files import folder, read_yaml

    names = list(known)
    if name not in names:
        noun = "recipe" if verb == "recipes" else "family"
        raise UsageError(
            f"There is no {noun} {name!r}." if name else "NAME is missing.",
            f"Take one of: {', '.join(names)}. Example: mquant {verb} show {names[0]}",
        )
    path = folder("recipes" if verb == "recipes" else "configs") / f"{name}.yaml"
    out.put(name=name, content=read_yaml(path))
    if out.format is Format.HUMAN:
        # Print the file unchanged: the user may redirect the output into a new recipe.
        write(path.read_text(encoding="utf-8"))
