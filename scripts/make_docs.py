"""Write docs/cli.md from the command line's own help.

Run it: python scripts/make_docs.py [--check]

`--check` writes nothing and fails where the page is not what the help says; the tests' command
runs it, so the reference cannot fall behind.
"""

import sys
from enum import EnumType
from pathlib import Path
from typing import Any, get_args

import typer

from mquant.cli.app import app

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
KINDS = {str: "TEXT", int: "N", Path: "PATH"}
HEAD = """# Command line reference

Made by `scripts/make_docs.py` from `mquant --help`; do not edit.

SRC is a folder or a hub repo id. stdout is the result, stderr everything else. Exit codes: 0 done;
1 failed or refused; 2 the command line makes no sense; 130 interrupted, safe to run again.
"""


def page() -> str:
    """The whole page."""
    root: Any = typer.main.get_command(app)
    return HEAD + "".join(section(path, command) for path, command in verbs("mquant", root))


def verbs(path: str, command: Any) -> list[tuple[str, Any]]:
    """Every command and its full name, in the order of the help."""
    found = [] if path == "mquant" else [(path, command)]
    for name, child in getattr(command, "commands", {}).items():
        found += verbs(f"{path} {name}", child)
    return found


def section(path: str, command: Any) -> str:
    """One command: its help, its example, its arguments and options."""
    text, _, example = (command.help or "").partition("Example: ")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([path, *(f"[{p.metavar}]" for p in arguments), "[OPTIONS]"])
    rows = "".join(row(param) for param in command.params if param.name != "help")
    return (
        f"\n## {path}\n\n{text.strip()}\n\n    {usage}\n\nExample:\n\n    {example.strip()}\n\n"
        f"| | |\n| --- | --- |\n{rows}"
    )


def row(param: Any) -> str:
    """One argument or option."""
    kind = param.type_descriptor.annotation
    if param.param_type_name == "argument":
        title = param.metavar
    elif getattr(param, "is_flag", False):
        title = ", ".join(param.opts)
    else:
        values = list(kind) if isinstance(kind, EnumType) else get_args(kind)
        choices = "\\|".join(values)
        title = ", ".join(param.opts) + " " + (choices or param.metavar or KINDS.get(kind, "TEXT"))
    default = param.default
    shown = getattr(default, "value", default)
    tail = f" Default: {shown}." if shown not in (None, False, (), "") else ""
    return f"| `{title}` | {(param.help or '').strip()}{tail} |\n"


def main() -> int:
    """Write the page, or check it."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/cli.md is not what the help says: run python scripts/make_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
