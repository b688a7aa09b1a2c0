"""`mquant export`: write an NVFP4 checkpoint in another layout."""

from typing import Annotated

import typer

from mquant.cli.dequantize import tell_converted
from mquant.cli.options import FamilyFile, FormatChoice, Out, Restart, Revision, Src, Workers
from mquant.cli.output import Format, output
from mquant.cli.progress import progress
from mquant.cli.source import default_out, example, open_source
from mquant.errors import UsageError
from mquant.plan import Target

To = Annotated[Target | None, typer.Option("--to", help="The layout; TensorRT-LLM reads modelopt.")]


def export(
    src: Src = None,
    to: To = None,
    out_folder: Out = None,
    workers: Workers = None,
    restart: Restart = False,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Write an NVFP4 checkpoint in ModelOpt's layout, or back in compressed-tensors' layout.

    Codes and block scales stay the same, byte for byte; a global scale becomes its reciprocal.
    A checkpoint exported there and back has its original files, except mquant.json. W4A16 and W4A4
    are supported.

    Example: mquant export ./MiniMax-M2.7-REAP-NVFP4 --to modelopt -o ./MiniMax-M2.7-REAP-ModelOpt
    """
    with output("export", output_format) as out:
        if to is None:
            raise UsageError("--to is missing: modelopt or compressed-tensors.", example(export))
        source = open_source(src, revision, example(export))
        from mquant.family_files import load_families
        from mquant.runs.export import export as carry_out

        path = out_folder or default_out(source, _SUFFIX[to])
        with progress(out) as emit:
            result = carry_out(
                source,
                load_families(family),
                to,
                path,
                workers=workers,
                restart=restart,
                emit=emit,
            )
        tell_converted(out, result, "Exported")


_SUFFIX = {Target.MODELOPT: "ModelOpt", Target.COMPRESSED_TENSORS: "CT"}
