"""`mquant smoke`: send five prompts to a running server."""

from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mquant.cli.options import FormatChoice, Revision
from mquant.cli.output import Format, Output, output
from mquant.cli.source import example, open_source
from mquant.cli.tables import facts
from mquant.errors import UsageError
from mquant.text import clean

if TYPE_CHECKING:
    from mquant.smoke.prompts import Trial

_SHOWN = 200

Url = Annotated[
    str | None, typer.Argument(metavar="URL", help="The server's address, with or without /v1.")
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="SRC",
        help="The folder or hub repo that is served; prompts use the sampling of its "
        "generation_config.json. Default: the server's own sampling.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="The served model. Default: the first."),
]
MaxTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")]
Timeout = Annotated[
    float, typer.Option(min=1, metavar="SECONDS", help="The longest wait for one answer.")
]


def smoke(
    url: Url = None,
    checkpoint: CheckpointOption = None,
    model: ModelName = None,
    max_tokens: MaxTokens = 4096,
    timeout: Timeout = 600,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Ask a running OpenAI-compatible server five prompts, and check the answers.

    Coding, maths, translation, recall from a long text, JSON: each has a mechanical check. A key
    is taken from OPENAI_API_KEY. Exit code 3: an answer is wrong.

    Example: mquant smoke http://localhost:8000 --checkpoint ./MiniMax-M2.7-REAP-NVFP4
    """
    with output("smoke", output_format) as out:
        if url is None:
            raise UsageError("URL is missing.", example(smoke))
        if revision is not None and checkpoint is None:
            raise UsageError("--revision is for --checkpoint.", example(smoke))
        from mquant.checkpoint.generation_config import read_sampling
        from mquant.smoke.prompts import options_of
        from mquant.smoke.prompts import smoke as ask
        from mquant.smoke.server import Server

        source = None if checkpoint is None else open_source(checkpoint, revision, example(smoke))
        options = options_of(read_sampling(source) if source else {}, max_tokens)
        trials = []
        with closing(Server(url, seconds=timeout)) as server:
            name = server.choose(model)
            out.put(server=server.name, model=name, options=options)
            shown_options = ", ".join(f"{key} {value:g}" for key, value in options.items())
            out.show(
                facts([("Server", server.name), ("Model", name), ("Options", shown_options)]), ""
            )
            for trial in ask(server, options):
                trials.append(trial)
                _show(out, trial)
        failed = [trial for trial in trials if trial.wrong]
        out.put(
            passed=len(trials) - len(failed),
            prompts=[
                {
                    "id": trial.prompt.id,
                    "passed": not trial.wrong,
                    "wrong": trial.wrong or None,
                    "answer": trial.answer,
                }
                for trial in trials
            ],
        )
        out.show(f"{len(trials) - len(failed)} of {len(trials)} answers are right.")
        out.report(trial.finding(name) for trial in failed)
        if failed:
            raise typer.Exit(3)


def _show(out: Output, trial: "Trial") -> None:
    mark = ("✗", "bold red") if trial.wrong else ("✓", "bold green")
    answer = clean(" ".join(trial.answer.split())[:_SHOWN])
    out.show(Text.assemble(mark, f" {trial.prompt.what}: ", (answer, "dim")))
