"""The two shapes in which verbs show what they know: facts, and rows of numbers."""

from collections.abc import Iterable
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from mquant.cli.text import clean


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values; long values wrap beside their name. Values may come from files."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(clean(value)))
    return grid


def table(*columns: tuple[str, Literal["left", "right"]]) -> Table:
    """A table of numbers; where the last column is text it may wrap, nothing else does."""
    rows = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="cyan")
    for title, justify in columns:
        wraps = (title, justify) == columns[-1] and justify == "left"
        rows.add_column(title, justify=justify, no_wrap=not wraps)
    return rows


__all__ = ["facts", "table"]
