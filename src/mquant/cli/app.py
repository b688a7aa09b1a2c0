"""The verbs, in the order in which a person needs the verbs."""

from collections.abc import Callable
from typing import Annotated

import typer

from mquant.cli import families, loader, recipes
from mquant.cli.calibrate import calibrate
from mquant.cli.card import card
from mquant.cli.compare import compare
from mquant.cli.dequantize import dequantize
from mquant.cli.evaluate import evaluate
from mquant.cli.export import export
from mquant.cli.families_check import check
from mquant.cli.families_draft import draft
from mquant.cli.finish import finish
from mquant.cli.inspect import inspect
from mquant.cli.plan import plan
from mquant.cli.push import push
from mquant.cli.quantize import quantize
from mquant.cli.repair import repair
from mquant.cli.report import report
from mquant.cli.smoke import smoke
from mquant.cli.synth import synth
from mquant.cli.verify import verify
from mquant.cli.verify_ignore import verify_ignore

app = typer.Typer(
    name="mquant",
    no_args_is_help=True,
    rich_markup_mode="rich",
    # `output` turns every exception into one sentence: typer never prints a traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        from mquant import __version__

        typer.echo(f"mquant {__version__}")
        raise typer.Exit


@app.callback()
def _mquant(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Turn a mixture-of-experts checkpoint into a low-bit one that loads the first time.

    Example: mquant quantize MiniMaxAI/MiniMax-M2 --recipe nvfp4
    """


def _group(name: str, listing: Callable[..., None], show: Callable[..., None]) -> typer.Typer:
    """Add a group of verbs: its name alone lists the files, and `show NAME` prints one file."""
    group = typer.Typer(rich_markup_mode="rich")
    group.callback(invoke_without_command=True)(listing)
    group.command("show")(show)
    app.add_typer(group, name=name)
    return group


app.command("inspect")(inspect)
app.command("plan")(plan)
app.command("quantize")(quantize)
app.command("finish")(finish)
app.command("calibrate")(calibrate)
app.command("verify")(verify)
app.command("verify-ignore")(verify_ignore)
app.command("compare")(compare)
app.command("eval")(evaluate)
app.command("report")(report)
app.command("repair")(repair)
app.command("dequantize")(dequantize)
app.command("export")(export)
app.command("card")(card)
app.command("push")(push)
app.command("smoke")(smoke)
_group("recipes", recipes.recipes, recipes.show)
_families = _group("families", families.families, families.show)
_families.command("draft")(draft)
_families.command("check")(check)
app.command("synth")(synth)
_loader = typer.Typer(
    rich_markup_mode="rich", no_args_is_help=True, help="Install the real loaders that verify runs."
)
_loader.command("install")(loader.install)
_loader.callback()(lambda: None)
app.add_typer(_loader, name="loader")
