"""Imports go downward only, and heavy imports, printing and exiting stay in their rooms."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mquant
from count_code import commands_of, too_large
from make import make_checkpoint

ROOT = Path(mquant.__file__).parent
LAYERS = (
    {"cli"},
    {"family_draft", "publish", "repair", "smoke", "synth"},
    {"runs", "measure", "synth_quantization"},
    {"verify", "synth_formats"},
    {"engines", "output", "synth_tower"},
    {"forward"},
    {"weights", "plan", "numerics", "tokens"},
    {"loader_model"},
    {"recipe"},
    {"family_files"},
    {"family", "usual_roles"},
    {"family_rows"},
    {"loader_rows"},
    {"checkpoint", "schemes", "data_files", "formulas", "name_patterns"},
    {"dtypes", "events", "untrusted", "text", "compiled"},
    {"errors", "synth_side_files"},
    {"findings"},
)
HEIGHT = {name: -depth for depth, layer in enumerate(LAYERS) for name in layer}
NEVER = {  # although these rooms are lower
    "verify": {"numerics", "engines"},
    "weights": {"numerics"},
    "forward": {"numerics", "plan"},
    "measure": {"numerics", "engines"},
}
HEAVY = {"torch", "llmcompressor", "transformers", "compressed_tensors", "accelerate"}
# Files that vLLM's own Python runs: these are data of the program, not code.
PROBE = [ROOT / f"verify/loaders/{name}.py" for name in ("inside_vllm", "vllm_stubs")]
FILES = sorted(path for path in ROOT.rglob("*.py") if path not in PROBE)
MODULES = [path for path in FILES if path.parent != ROOT or not path.stem.startswith("__")]


def part(path: Path) -> str:
    """Return the package or module directly below mquant that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: relative import"
            names = [alias.name for alias in node.names]
            yield from (f"mquant.{n}" for n in names) if node.module == "mquant" else [node.module]


def called(path: Path) -> set[str]:
    """Return the names and dotted names that a file calls."""
    calls = (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call))
    return {ast.unparse(call.func) for call in calls}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_downward(path: Path) -> None:
    room = part(path)
    for name in imported(path):
        other = name.split(".")[1] if name.startswith("mquant.") else room
        if other not in (room, "__version__"):
            assert other in HEIGHT, f"{other} has no layer: add it to LAYERS"
            assert HEIGHT[other] < HEIGHT[room], f"{room} must not import {name}"
            assert other not in NEVER.get(room, ()), f"{room} must not import {name}"


def test_only_the_command_line_prints_and_exits() -> None:
    for path in (path for path in MODULES if part(path) != "cli"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"typer", "rich", "click"}, path
        assert not called(path) & {"print", "exit", "sys.exit", "os._exit", "input"}, path


def test_only_engines_import_heavy_libraries() -> None:
    for path in (path for path in FILES if part(path) != "engines"):
        assert not {name.split(".")[0] for name in imported(path)} & HEAVY, path


def test_only_the_cluster_imports_ray() -> None:
    for path in (path for path in FILES if path != ROOT / "runs/ray_cluster.py"):
        assert "ray" not in {name.split(".")[0] for name in imported(path)}, path


def loaded_by(*arguments: str) -> set[str]:
    """Run a command, which must succeed, and return the heavy modules that the command loads."""
    slow = HEAVY | {"numba", "ray"}
    code = (
        "import atexit, sys; from mquant.cli import main\n"
        f"atexit.register(lambda: print('LOADED', *({slow!r} & set(sys.modules))))\n"
        "main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    *printed, last = run.stdout.splitlines()
    assert printed, "the command said nothing"
    return set(last.split()) - {"LOADED"}


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("--help") == set()


def test_plan_loads_nothing_heavy(tmp_path: Path) -> None:
    src = str(make_checkpoint(tmp_path / "src"))

    assert loaded_by("plan", src, "--recipe", "nvfp4") == set()


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts): set(imported(path))
        for path in MODULES
    }
    left = {name: others & graph.keys() - {name} for name, others in graph.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "a circle, or what stands on one"


# A function that gets a run needs no path of OUT. These functions begin a run, or read OUT.
ENTRIES = {
    "runs/quantize.py": {"quantize"},
    "runs/convert.py": {"convert"},
    "runs/export.py": {"export"},
    "runs/hub_to_hub.py": {"quantize_to_hub"},
    "runs/ray_cluster.py": {"quantize_on_ray"},
    "runs/shares.py": {"in_shares", "reopen", "finish_shares"},
    "runs/calibrate.py": {"calibrate"},
    "runs/forecast.py": {"forecast"},
    "repair/repair.py": {"repair"},
    "publish/report.py": {"report"},
    "synth.py": {"synth"},
}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_a_run_and_entries_take_a_bare_out(path: Path) -> None:
    file = path.relative_to(ROOT).as_posix()
    if part(path) in ("output", "cli") or file == "runs/run.py":
        return
    takers = {
        node.name
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if argument.arg == "out"
        and argument.annotation
        and ast.unparse(argument.annotation) == "Path"
    }
    assert takers <= ENTRIES.get(file, set())


def test_no_file_or_function_is_too_large() -> None:
    commands = commands_of(ROOT / "cli/app.py")
    root = Path(__file__).parents[1]
    others = (path for name in ("tests", "scripts") for path in (root / name).rglob("*.py"))
    texts = {path: path.read_text("utf-8") for path in (*FILES, *others)}
    assert not [large for path, text in texts.items() for large in too_large(path, text, commands)]
