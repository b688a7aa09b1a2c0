"""`mquant synth`: write a synthetic checkpoint of any size."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mquant.cli.options import FormatChoice, MaxShardSize, shipped
from mquant.cli.output import Format, output
from mquant.cli.progress import progress
from mquant.cli.source import example
from mquant.cli.tables import facts
from mquant.cli.text import parse_size
from mquant.errors import UsageError
from mquant.text import both_sizes, plural

if TYPE_CHECKING:
    from mquant.family import Family


def _families(incomplete: str) -> list[str]:
    return shipped("configs", incomplete)


Out = Annotated[
    Path | None, typer.Argument(metavar="OUT", help="The folder to write: empty, or not there yet.")
]
FamilyName = Annotated[
    str | None,
    typer.Option(
        "--family",
        help="The model family (see: mquant families), or a family file.",
        autocompletion=_families,
    ),
]
Layers = Annotated[int | None, typer.Option(help="Number of layers.")]
Experts = Annotated[int | None, typer.Option(help="Experts in a layer.")]
Hidden = Annotated[int | None, typer.Option(help="Hidden size.")]
Intermediate = Annotated[int | None, typer.Option(help="Intermediate size of an expert.")]
Vocab = Annotated[int | None, typer.Option(help="Size of the vocabulary.")]
Dtype = Annotated[
    Literal[
        "bf16",
        "fp16",
        "fp32",
        "fp8-block",
        "fp8-channel",
        "fp8-tensor",
        "mxfp8",
        "mxfp4",
        "mxfp4-blocks",
        "mxfp4-fp8",
        "int4",
        "int8",
        "int8-channel",
        "fp8-stacks",
    ],
    typer.Option(
        help="The dtype of weights, or the format of a release; fp8-block: with a scale for each "
        "128 x 128 block; mxfp4-blocks: as gpt-oss; mxfp4-fp8: as DeepSeek-V4; int8-channel: an I8 "
        "for each weight; fp8-stacks: fp8-block, with all experts of a layer in one tensor."
    ),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same bytes.")]
ShapesOnly = Annotated[
    bool,
    typer.Option(
        "--shapes-only", help="The real model's sizes, as sparse files that take no disk."
    ),
]


def synth(
    out_folder: Out = None,
    family: FamilyName = None,
    layers: Layers = None,
    experts: Experts = None,
    hidden: Hidden = None,
    intermediate: Intermediate = None,
    vocab: Vocab = None,
    dtype: Dtype = "bf16",
    max_shard_size: MaxShardSize = None,
    seed: Seed = 0,
    shapes_only: ShapesOnly = False,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Write a checkpoint with made-up weights, in tiny shapes or in the real model's shapes.

    Example: mquant synth OUT --family minimax_m2 --layers 62 --experts 154 --shapes-only
    """
    with output("synth", output_format) as out:
        if out_folder is None:
            raise UsageError("OUT is missing.", example(synth))
        limit = None if max_shard_size is None else parse_size(max_shard_size)
        # numpy is slow to import, and --help needs no numpy.
        from mquant.family_files import load_families
        from mquant.plan import DEFAULT_SHARD_BYTES
        from mquant.synth import Precision, Sizes
        from mquant.synth import synth as write

        chosen = _choose(family, load_families().values())
        with progress(out) as emit:
            written = write(
                out_folder,
                chosen,
                sizes=Sizes(layers, experts, hidden, intermediate, vocab),
                precision=Precision(dtype),
                max_shard_bytes=DEFAULT_SHARD_BYTES if limit is None else limit,
                seed=seed,
                shapes_only=shapes_only,
                emit=emit,
            )
        out.put(
            path=str(written.path),
            tensors=written.tensors,
            bytes=written.nbytes,
            parameters=written.parameters,
            shards=written.shards,
        )
        out.show(
            facts(
                [
                    ("Written", str(written.path)),
                    ("Tensors", f"{written.tensors:,}, {both_sizes(written.nbytes)}"),
                    ("Parameters", f"{written.parameters:,}"),
                    ("Shards", plural(written.shards, "shard")),
                    *([("Weights", "holes: every byte reads as zero")] if shapes_only else []),
                ]
            )
        )


def _choose(name: str | None, families: "Iterable[Family]") -> "Family":
    from mquant.family_files import load_family
    from mquant.untrusted import is_file

    known = {family.name: family for family in families}
    if name not in known and name and is_file(Path(name)):
        return load_family(Path(name))
    if name not in known:
        raise UsageError(
            f"There is no family {name!r}." if name else "--family is missing.",
            f"Take one of: {', '.join(known)}. {example(synth)}",
        )
    return known[name]
