"""The two layouts of a verb's result: facts, and rows of numbers."""

from collections.abc import Iterable
from typing import Any, Final, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mquant.text import clean

_GAP: Final = 2  # between columns


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and values. Long values wrap beside their name.

    Values may come from files, so `clean` escapes them.
    """
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(clean(value)))
    return grid


class _Numbers(Table):
    """A table that is never narrower than its numbers: rich cuts no number, the terminal folds."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*cells, **options)
        for column, cell in zip(self.columns, cells, strict=True):
            for text in (str(column.header), str(cell)):
                parts = [text] if column.no_wrap else text.split()
                column.min_width = max(column.min_width or 0, *map(cell_len, parts), 0)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        min_width = sum((column.min_width or 0) + _GAP for column in self.columns)
        yield from super().__rich_console__(
            console, options.update(width=max(options.max_width, min_width))
        )


def table(*columns: tuple[str, Literal["left", "right"]]) -> Table:
    """Return a table of numbers. Only a last column that is text may wrap."""
    rows = _Numbers(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="cyan")
    for title, justify in columns:
        wraps = (title, justify) == columns[-1] and justify == "left"
        rows.add_column(title, justify=justify, no_wrap=not wraps)
    return rows
