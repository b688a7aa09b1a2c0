"""The layers of mquant: imports go downward only, and what is heavy or speaks stays where it is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mquant
from make import make_checkpoint

ROOT = Path(mquant.__file__).parent
LAYERS = (
    {"cli"},
    {"publish", "repair", "smoke", "synth"},
    {"runs", "measure"},
    {"verify"},
    {"engines", "output", "forward"},
    {"weights", "plan", "numerics"},
    {"loader_model"},
    {"recipe"},
    {"family"},
    {"checkpoint", "schemes", "data", "formulas", "matching"},
    {"dtypes", "events", "untrusted", "text", "compiled"},
    {"errors"},
    {"findings"},
)
HEIGHT = {name: -depth for depth, layer in enumerate(LAYERS) for name in layer}
NEVER = {  # though they lie lower
    "verify": {"numerics", "engines"},
    "weights": {"numerics"},
    "forward": {"numerics"},
    "measure": {"numerics", "engines"},
}
HEAVY = {"torch", "llmcompressor", "transformers", "compressed_tensors", "accelerate"}
# Run by vLLM's own Python; not a part of the program, but of its data.
PROBE = ROOT / "verify/loaders/vllm_probe.py"
FILES = sorted(path for path in ROOT.rglob("*.py") if path != PROBE)
MODULES = [path for path in FILES if path.parent != ROOT or not path.stem.startswith("__")]


def part(path: Path) -> str:
    """The package or module directly below mquant that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: relative import"
            names = [alias.name for alias in node.names]
            yield from (f"mquant.{n}" for n in names) if node.module == "mquant" else [node.module]


def called(path: Path) -> set[str]:
    """Names and dotted names that a file calls."""
    calls = (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call))
    return {ast.unparse(call.func) for call in calls}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_downward(path: Path) -> None:
    me = part(path)
    for name in imported(path):
        other = name.split(".")[1] if name.startswith("mquant.") else me
        if other not in (me, "__version__"):
            assert other in HEIGHT, f"{other} has no layer: add it to LAYERS"
            assert HEIGHT[other] < HEIGHT[me], f"{me} must not import {name}"
            assert other not in NEVER.get(me, ()), f"{me} must not import {name}"


def test_only_the_command_line_speaks_and_exits() -> None:
    for path in (path for path in MODULES if part(path) != "cli"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"typer", "rich", "click"}, path
        assert not called(path) & {"print", "exit", "sys.exit", "os._exit", "input"}, path


def test_only_engines_import_what_is_heavy() -> None:
    for path in (path for path in FILES if part(path) != "engines"):
        assert not {name.split(".")[0] for name in imported(path)} & HEAVY, path


def test_only_the_cluster_imports_ray() -> None:
    for path in (path for path in FILES if path != ROOT / "runs/ray_cluster.py"):
        assert "ray" not in {name.split(".")[0] for name in imported(path)}, path


def loaded_by(*arguments: str) -> set[str]:
    """The heavy modules that a command has loaded when it ends; it must succeed."""
    slow = HEAVY | {"numba", "ray"}
    code = (
        "import atexit, sys; from mquant.cli import main\n"
        f"atexit.register(lambda: print('LOADED', *({slow!r} & set(sys.modules))))\n"
        "main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    *said, last = run.stdout.splitlines()
    assert said, "the command said nothing"
    return set(last.split()) - {"LOADED"}


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("--help") == set()


def test_plan_loads_nothing_heavy(tmp_path: Path) -> None:
    src = str(make_checkpoint(tmp_path / "src"))

    assert loaded_by("plan", src, "--recipe", "nvfp4") == set()
