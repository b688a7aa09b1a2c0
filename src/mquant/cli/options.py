"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mquant.cli.output import Format


def shipped(kind: Literal["configs", "recipes"], incomplete: str) -> list[str]:
    """Return the names of shipped files, for the shell's completion."""
    from mquant.data_files import folder

    names = sorted(path.stem for path in folder(kind).glob("*.yaml"))
    return [name for name in names if name.startswith(incomplete)]


def recipe_names(incomplete: str) -> list[str]:
    """Return the recipes that ship with mquant, for the shell's completion."""
    return shipped("recipes", incomplete)


Src = Annotated[
    str | None,
    typer.Argument(
        metavar="SRC", help="A checkpoint folder, or a hub repo id. Default: the current folder."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repo.")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A recipe's name (see: mquant recipes), or a YAML file, llmcompressor's too.",
        autocompletion=recipe_names,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="The folder to write. Default: SRC's name and a suffix, e.g. -NVFP4.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Text to calibrate with: a .jsonl, .txt or .parquet file, or a dataset's id.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="The most samples to calibrate with. Default: the recipe's."
    ),
]
Length = Annotated[
    int | None,
    typer.Option(min=2, metavar="N", help="The most tokens of a sample. Default: the recipe's."),
]
Against = Annotated[
    str | None,
    typer.Option(metavar="PARENT", help="The folder or hub repo that SRC was made from."),
]
From = Annotated[
    str | None,
    typer.Option("--from", metavar="PARENT", help="The folder or hub repo SRC was made from."),
]
DepthChoice = Annotated[
    Literal["structure", "numbers"] | None,
    typer.Option(
        help="structure: verify headers and JSON; numbers: all data too. Default: numbers for a "
        "folder, structure for a hub repo."
    ),
]
LoaderChoice = Annotated[
    str | None,
    typer.Option(
        metavar="LOADER",
        help="Also have a loader's own code load the headers, without a GPU: vllm (see: mquant "
        "loader install), or the path of a Python that has vLLM.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")]
MaxShardSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Largest shard, e.g. 500MB or 1GiB. Default: 5GB."),
]
AllowUnsafe = Annotated[
    bool,
    typer.Option(
        "--allow-unsafe",
        help="Also quantize a router, embeddings or head that the recipe names, and make what "
        "vLLM would not load.",
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Read the scales of weights in MXFP4, and refuse if a block would be rounded again.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Fused sets that the streaming engine processes at once. Default: cores + 1.",
    ),
]
Scratch = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="The most bytes of files from or for the hub on this disk, e.g. 20GB."
    ),
]
Public = Annotated[bool, typer.Option("--public", help="Make the repo public. Default: private.")]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart", help="Delete the files that an earlier run of mquant wrote in OUT, no others."
    ),
]
Importance = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The importance of each input channel, for recipes that search scales.",
    ),
]
FamilyFile = Annotated[
    Path | None,
    typer.Option(
        "--family",
        metavar="FILE",
        help="A family file of your own, used instead of the shipped families for its model_types "
        "(see: mquant families check).",
    ),
]
EvalFile = Annotated[
    Path | None, typer.Option("--eval", metavar="FILE", help="JSON of mquant eval.")
]
CompareFile = Annotated[
    Path | None, typer.Option("--compare", metavar="FILE", help="JSON of mquant compare.")
]
FormatChoice = Annotated[
    Format, typer.Option("--format", help="How the result is written to stdout.")
]
