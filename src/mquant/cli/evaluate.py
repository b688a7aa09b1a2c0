"""`mquant eval`: perplexity and KL divergence of a checkpoint and its parent."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from mquant.cli.options import Against, FamilyFile, FormatChoice, Revision, Src
from mquant.cli.output import Format, output
from mquant.cli.progress import progress
from mquant.cli.source import example, open_source
from mquant.cli.tables import facts, table
from mquant.errors import UsageError
from mquant.text import clean

if TYPE_CHECKING:
    from mquant.measure.evaluation import Evaluation

_SHOWN = 12

TextFile = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="The text, in UTF-8.")
]
Context = Annotated[
    int, typer.Option(min=2, metavar="N", help="Tokens in a window: a token sees only its window.")
]
Tokens = Annotated[
    int, typer.Option(min=1, metavar="N", help="The most tokens of the text that are predicted.")
]


def evaluate(
    src: Src = None,
    against: Against = None,
    text: TextFile = None,
    context: Context = 512,
    tokens: Tokens = 16_384,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Measure perplexity, KL divergence from the parent, and router agreement on your text.

    Both models run in float32 on the CPU, a layer at a time, with weights from disk: a model of any
    size needs the memory of one layer. Activations are not quantized. Exit code 3: a file is not
    the file in mquant.json.

    Example: mquant eval ./Model-NVFP4 --against ./Model --text wiki.txt
    """
    with output("eval", output_format) as out:
        source = open_source(src, revision, example(evaluate))
        if text is None:
            raise UsageError("--text is missing.", example(evaluate))
        parent = None if against is None else open_source(against, None, example(evaluate))
        from mquant.family_files import load_families
        from mquant.measure.evaluation import evaluate as run

        with progress(out) as emit:
            evaluated = run(
                source,
                parent,
                load_families(family),
                text,
                context=context,
                tokens=tokens,
                emit=emit,
            )
        out.put(**evaluated.to_json())
        out.show(render(evaluated))
        out.report(evaluated.findings)
        if any(finding.severity == "error" for finding in evaluated.findings):
            raise typer.Exit(3)


def render(evaluated: "Evaluation") -> RenderableType:
    """Render the evaluation for a person."""
    rows = [
        ("Text", f"{evaluated.text}: {evaluated.tokens:,} tokens, windows of {evaluated.context}")
    ]
    rows.append(("Perplexity", f"{evaluated.perplexity:.4f}"))
    if evaluated.parent is not None:
        change = evaluated.perplexity / (evaluated.parent_perplexity or 1) - 1
        rows[-1] = (
            "Perplexity",
            f"{evaluated.perplexity:.4f}, {evaluated.parent} "
            f"{evaluated.parent_perplexity:.4f} ({change:+.2%})",
        )
        rows.append(("KL", f"{evaluated.kl:.5f} nats a token"))
        rows.append(("Same top token", f"{evaluated.agreement:.2%}"))
    if evaluated.router_agreement is not None:
        rows.append(("Same experts", f"{evaluated.router_agreement:.2%} of those chosen"))
    unused = sum(count == 0 for layer in evaluated.routing for count in layer.usage)
    if evaluated.routing:
        total = sum(len(layer.usage) for layer in evaluated.routing)
        rows.append(("Experts unused", f"{unused:,} of {total:,}"))
    parts: list[RenderableType] = [Text(clean(evaluated.source), "bold"), "", facts(rows), ""]
    if evaluated.router_agreement is not None:
        parts += [_routers(evaluated), ""]
    return Group(*parts)


def _routers(evaluated: "Evaluation") -> RenderableType:
    """Render the layers whose routers agree least."""
    rows = table(("layer", "right"), ("same experts", "right"), ("busiest expert", "right"))
    worst = sorted(evaluated.routing, key=lambda layer: layer.agreement or 0)[:_SHOWN]
    for layer in worst:
        busiest = max(range(len(layer.usage)), key=lambda expert: layer.usage[expert])
        share = layer.usage[busiest] / sum(layer.usage)
        rows.add_row(str(layer.layer), f"{layer.agreement:.2%}", f"{busiest} ({share:.1%})")
    return rows
