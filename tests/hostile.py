"""Random hostile checkpoints: copies of a good checkpoint with changes that no good tool makes.

One `random.Random` decides every change, so that a seed writes the same folder again.
`run_command` runs one of mquant's own commands on the folder and returns the faults: a crash, an
exit code other than 0 to 3, a control character on the terminal. Two calls of `snapshot` show
whether the command changed a file outside OUT.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

import yaml
from typer import testing
from typer.main import get_command
from typer.testing import CliRunner

import hostile_inputs
from hostile_changes import CHANGES, dumped, spoil_out, twisted
from make import make_checkpoint
from mquant.cli.app import app
from run import quantize_nvfp4

# Making the tree of verbs takes longer than most verbs.
vars(testing)["_get_command"] = cache(get_command)

RECIPE: Final[dict[str, Any]] = {
    "name": "mine",
    "suffix": "NVFP4",
    "roles": {"expert": "NVFP4A16", "attention": "NVFP4A16"},
    "ignore": [r"re:.*self_attn\..*"],
}


@dataclass(frozen=True)
class Bases:
    """The good checkpoints to copy for cases, in `folder`, and a folder to which links may lead."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Bases":
        """Write a BF16 checkpoint, and the same checkpoint in NVFP4."""
        make_checkpoint(folder / "bf16", layers=1, experts=2, hidden=32, intermediate=16, vocab=32)
        (folder / "bf16" / "tokenizer.json").write_text(hostile_inputs.tokenizer_json())
        quantize_nvfp4(folder / "bf16", folder / "nvfp4", shard_bytes=8_000)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        (folder / "elsewhere").mkdir()
        (folder / "elsewhere" / "secret.json").write_text('{"secret": 1}')
        return cls(folder)

    @property
    def elsewhere(self) -> Path:
        """A folder that no command may write to."""
        return self.folder / "elsewhere"


def make_case(bases: Bases, where: Path, random: Random) -> Path:
    """Write a hostile checkpoint to `where`/src, beside good ones and `elsewhere`; return src."""
    where.mkdir()
    for name in ("bf16", "nvfp4", "elsewhere"):
        shutil.copytree(bases.folder / name, where / name)
    src = where / "src"
    shutil.copytree(bases.folder / random.choice(("bf16", "nvfp4")), src)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        random.choice(CHANGES)(src, random)
    recipe = twisted(RECIPE, random) if random.random() < 0.5 else RECIPE
    (where / "mine.yaml").write_text(yaml.safe_dump(recipe))
    if random.random() < 0.3:
        spoil_out(where / "out", random)
    return src


def commands(src: str, where: Path, random: Random) -> Iterator[list[str]]:
    """Yield the command lines to run on `src`, which may be a repo."""
    recipe = random.choice(("nvfp4", str(where / "mine.yaml")))
    out = ["-o", str(where / "out"), "--workers", "2"]
    form = random.choice((["--format", "json"], []))
    yield ["inspect", src, *form]
    yield ["plan", src, "--recipe", recipe, *form]
    depth = ["--depth", random.choice(("structure", "numbers", "full"))]
    if any(path.is_file() and path.stat().st_size > 2**30 for path in (where / "src").iterdir()):
        depth = ["--depth", "structure"]  # reading a terabyte of zeros takes too long
    against = random.choice(([], [], ["--against", str(where / "bf16")]))
    yield ["verify", src, *depth, *against, *form, "--junit", str(where / "out.xml")]
    yield ["verify-ignore", src, *form]
    restart = random.choice(([], ["--restart"]))
    for _ in range(random.choice((1, 1, 2))):
        yield ["quantize", src, "--recipe", recipe, *out, *restart, *form]
    shallow = ["--depth", "structure"] if depth[1] == "structure" else []
    options = ["-o", str(where / "out-repaired"), *shallow, *restart, *form]
    # The hostile checkpoint is the damaged checkpoint or the parent.
    pair = random.choice(
        ((src, str(where / "bf16")), (src, str(where / "bf16")), (str(where / "nvfp4"), src))
    )
    yield ["repair", pair[0], "--from", pair[1], *options]


def run_command(command: list[str]) -> tuple[int, list[str]]:
    """Run a command; return its exit code and the faults of its behaviour."""
    result = CliRunner().invoke(app, command)
    printed = result.stdout + result.stderr
    faults = []
    if result.exit_code not in (0, 1, 2, 3):
        faults.append(f"exit code {result.exit_code}")
    if result.exception and not isinstance(result.exception, SystemExit):
        faults.append(f"raised {result.exception!r}")
    if "failed unexpectedly" in printed or "Traceback" in printed:
        faults.append(printed[-600:])
    if hostile_inputs.control_characters(printed):
        faults.append("printed a control character")
    if command[-1] == "json" and result.stdout and not hostile_inputs.is_json(result.stdout):
        faults.append("printed no JSON")
    return result.exit_code, faults


def snapshot(where: Path) -> dict[str, tuple[int, int, int]]:
    """Return path -> mode, size and time of change of every file in `where` outside OUT."""
    states = {}
    for folder, folders, names in os.walk(where):
        if Path(folder) == where:
            folders[:] = [name for name in folders if not name.startswith("out")]
            names = [name for name in names if not name.startswith("out")]
        for name in (*folders, *names):
            path = Path(folder, name)
            stat = path.lstat()
            size = stat.st_size if name in names else 0
            states[str(path.relative_to(where))] = (stat.st_mode, size, stat.st_mtime_ns)
    return states


__all__ = ["Bases", "commands", "dumped", "make_case", "run_command", "snapshot", "twisted"]
