"""Count the lines of code: without blank lines, comments and docstrings.

    python scripts/count_code.py [FOLDER ...]

The script prints one row a room (of src/ if no folder is given), then everything that breaks a
limit: a file over 400 lines, a function over 60 lines, a function with more than 8 parameters
(except Typer commands, whose parameters are their options). Exit code 1: a limit is broken.
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

MOST_FILE_LINES: Final = 400
MOST_FUNCTION_LINES: Final = 60
MOST_PARAMETERS: Final = 8

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_SILENT: Final = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
        tokenize.ENCODING,
    }
)


def code_lines(text: str) -> int:
    """Return the number of lines with a token of code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - _docstring_lines(ast.parse(text)))


def too_large(path: Path, text: str, commands: Collection[str] = ()) -> Iterator[str]:
    """Yield a sentence for each limit that a file or a function in the file breaks.

    `commands` are the functions of the command line, whose parameters are their options.
    """
    count = text.count("\n")
    if count > MOST_FILE_LINES:
        yield f"{path} has {count} lines"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, _Function):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MOST_FUNCTION_LINES:
            yield f"{path}:{node.lineno} {node.name} has {length} lines"
        parameters = _parameters(node)
        if parameters > MOST_PARAMETERS and not ("cli" in path.parts and node.name in commands):
            yield f"{path}:{node.lineno} {node.name} has {parameters} parameters"


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                value = statement.value
                if isinstance(value.value, str):
                    lines.update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    return lines


def _parameters(node: _Function) -> int:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([argument for argument in every if argument.arg not in ("self", "cls")])


def commands_of(app: Path) -> set[str]:
    """Return the functions that `app.py` registers as commands: `app.command("verb")(function)`."""
    calls = [n for n in ast.walk(ast.parse(app.read_text("utf-8"))) if isinstance(n, ast.Call)]
    return {
        argument.id
        for call in calls
        if isinstance(call.func, ast.Call) and ast.unparse(call.func.func).endswith(".command")
        for argument in call.args
        if isinstance(argument, ast.Name)
    }


def main(folders: list[str]) -> int:
    """Print the table and the broken limits; return the exit code."""
    rooms: Counter[str] = Counter()
    large: list[str] = []
    apps = [app for folder in folders for app in Path(folder).rglob("cli/app.py")]
    commands = {name for app in apps for name in commands_of(app)}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            rooms["/".join(path.parts[:3]) if len(path.parts) > 3 else folder] += code_lines(text)
            large += too_large(path, text, commands)
    for room, count in sorted(rooms.items()):
        print(f"{count:7,}  {room}")
    print(f"{sum(rooms.values()):7,}  in all")
    print(*large, sep="\n")
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["src"]))
