"""Markdown from untrusted strings, with every special character escaped.

A name could load an image that reports the readers to a host, end a table, or fake a section.
"""

import re
from collections.abc import Iterable
from typing import Final

from mquant.text import clean

# An underscore inside a word, and other characters after the first, need no escape.
_SPECIAL: Final = re.compile(r"([\\`*\[\]|~$]|^[-+=#]|(?<![^\W_])_|_(?![^\W_]))")
_HTML: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_PLAIN_CODE: Final = re.compile(r"[^`|]*[^`|\s\\]")


def text(value: str) -> str:
    """Return a string for a sentence or a cell, on one line, with all Markdown escaped."""
    escaped = _SPECIAL.sub(r"\\\1", clean(value)).translate(_HTML)
    # The hub links addresses, and notifies the user of @name.
    for sign, entity in (("://", "&#58;//"), ("@", "&#64;"), ("www.", "www&#46;")):
        escaped = escaped.replace(sign, entity)
    return escaped


def code(value: str) -> str:
    """Return a string as code, for a sentence or a cell."""
    line = clean(value)
    if _PLAIN_CODE.fullmatch(line) and not line[0].isspace():
        return f"`{line}`"
    return "<code>" + "".join(c if c.isalnum() else f"&#{ord(c)};" for c in line) + "</code>"


def block(lines: Iterable[str], language: str = "") -> str:
    """Return lines as a code block, with a fence longer than any run of backticks in the lines."""
    shown = [clean(line) for line in lines]
    longest = max((len(run) for line in shown for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join((fence + language, *shown, fence)) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table whose cells are Markdown already."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *map(list, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
