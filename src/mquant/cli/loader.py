"""`mquant loader`: install the loaders that judge what mquant writes and knows."""

from typing import Annotated, Literal

import typer

from mquant.cli.options import FormatChoice
from mquant.cli.output import Format, output

Name = Annotated[
    Literal["vllm", "transformers"],
    typer.Argument(
        metavar="NAME",
        help="vllm: its CPU build, for `mquant verify --loader`. transformers: its newest release, "
        "which scripts/transformers_names.py asks.",
    ),
]


def install(name: Name, output_format: FormatChoice = Format.HUMAN) -> None:
    """Install a loader in an environment of its own, under the user's cache.

    vLLM takes 4 GB and some minutes. If an environment has vLLM already, set MQUANT_VLLM_PYTHON to
    the Python of that environment instead.

    Example: mquant loader install vllm
    """
    with output("loader.install", output_format) as out:
        from mquant.verify.loaders.install import LOADERS

        loader = LOADERS[name]
        what = f"{loader.package} {loader.version}"
        if not loader.installed:
            out.note(f"Installing {what} in {loader.folder} takes some minutes.", "")
        fresh = loader.install()
        python = str(loader.python)
        out.put(loader=name, version=loader.version, python=python, already_done=not fresh)
        done = "Installed" if fresh else "Already there"
        out.show(f"{done}: {loader.title} {loader.version} ({python})")
