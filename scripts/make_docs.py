"""Write docs/cli.md from the command line's help, and docs/verify-rules.md from the rules.

Run it: python scripts/make_docs.py [--check]

`--check` writes no page and fails if a page differs from what the program says. scripts/test.sh
runs `--check`, so that the pages stay up to date.
"""

import pkgutil
import sys
from enum import EnumType
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import typer

import mquant
from mquant.cli.app import app
from mquant.findings import RULES, VERIFIED, Rule
from pages import write_or_check

KINDS = {str: "TEXT", int: "N", Path: "PATH"}
HEAD = """# Command line reference

Written by `scripts/make_docs.py` from `mquant --help`; do not edit.

SRC is a folder or a hub repo id. stdout has the result, stderr everything else. Exit codes: 0 done;
1 failed, refused, or could not be judged; 2 the command line is wrong; 3 the checkpoint is wrong;
130 interrupted, safe to run again.
"""
RULES_HEAD = """# What `mquant verify` checks

Written by `scripts/make_docs.py` from the rules beside the checks; do not edit.

`structure` needs headers and JSON only, `numbers` reads all data, `against` compares with the
parent (`--against`), `loader` has a real loader load the headers (`--loader vllm`). Errors exit
with 3; warnings exit with 3 only with `--fail-on warning`; an info never fails.

A rule that was not applied has not passed: the rule is listed as not judged, and skipped in JUnit.
If such a rule decides whether a loader takes a quantized checkpoint, the exit code is 1;
`--loader vllm` then decides.
"""
OTHERS = {
    "plan": "Rules of `mquant plan` and of every verb that plans: an error refuses the plan.",
    "inspect": "Remarks of `mquant inspect`.",
    "run": "Rules of runs: of `mquant quantize`, `mquant eval`, `mquant repair` and the like.",
    "smoke": "Rules of `mquant smoke`.",
}
# Modules that need an extra, or that another Python runs; no rule is declared in them.
UNIMPORTED = ("mquant.engines", "mquant.runs.ray_cluster", "mquant.verify.loaders.inside_vllm")


def page() -> str:
    """Return the page of the command line."""
    root: Any = typer.main.get_command(app)
    return HEAD + "".join(section(path, command) for path, command in verbs("mquant", root))


def rules_page() -> str:
    """Return the page of rules, by what the rules need."""
    for module in pkgutil.walk_packages(mquant.__path__, "mquant."):
        if not module.name.startswith(UNIMPORTED) and not module.name.endswith("__main__"):
            import_module(module.name)  # registers its rules
    text = RULES_HEAD
    for depth in (*VERIFIED, *OTHERS):
        rules = sorted((r for r in RULES.values() if r.needs == depth), key=lambda rule: rule.id)
        about = f"{OTHERS[depth]}\n\n" if depth in OTHERS else ""
        text += f"\n## {depth}\n\n{about}| rule | severity | what must hold | why | fix |\n"
        text += "| --- | --- | --- | --- | --- |\n" + "".join(map(rule_row, rules))
    return text


def rule_row(rule: Rule) -> str:
    """Return one rule as a row of a table."""
    cells = (f"`{rule.id}`", rule.severity, rule.what, rule.why, rule.fix)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def verbs(path: str, command: Any) -> list[tuple[str, Any]]:
    """Return every command with its full name, in the order of the help."""
    commands = [] if path == "mquant" else [(path, command)]
    for name, child in getattr(command, "commands", {}).items():
        commands += verbs(f"{path} {name}", child)
    return commands


def section(path: str, command: Any) -> str:
    """Return the section of a command: its help, its example, its arguments and options."""
    text, _, example = (command.help or "").partition("Example: ")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([path, *(f"[{p.metavar}]" for p in arguments), "[OPTIONS]"])
    rows = "".join(row(param) for param in command.params if param.name != "help")
    return (
        f"\n## {path}\n\n{text.strip()}\n\n    {usage}\n\nExample:\n\n    {example.strip()}\n\n"
        f"| | |\n| --- | --- |\n{rows}"
    )


def row(param: Any) -> str:
    """Return one argument or option as a row of a table."""
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
    """Write or check the pages, and return the exit code."""
    pages = {"cli.md": page(), "verify-rules.md": rules_page()}
    return write_or_check(pages, "is not what the program says: run python scripts/make_docs.py")


if __name__ == "__main__":
    sys.exit(main())
