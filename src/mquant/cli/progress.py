"""Show the core's events to a person: a bar on a terminal, notes as lines."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mquant.cli.output import Format, Output
from mquant.events import Emit, Event, Note, Progress
from mquant.text import clean, plural


@contextmanager
def progress(out: Output) -> Iterator[Emit]:
    """Yield an `Emit` that shows progress (bytes, rate, time left) while the block runs.

    Bars are drawn only on a terminal. Notes are printed as lines on stderr, but not if `quiet` is
    set. Any thread may call the Emit.
    """
    if out.format is Format.HUMAN and sys.stderr.isatty():
        with _bars(out) as emit:
            yield emit
    else:
        yield lambda event: _note(out, event)


def _note(out: Output, event: Event) -> None:
    if isinstance(event, Note):
        out.note(event.message, "yellow" if event.level == "warning" else "")


@contextmanager
def _bars(out: Output) -> Iterator[Emit]:
    from rich.progress import (  # not needed for --help
        BarColumn,
        DownloadColumn,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    from mquant.cli.output import plain_console

    tasks: dict[str, TaskID] = {}
    with Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=plain_console(sys.stderr),
    ) as bars:

        def emit(event: Event) -> None:
            if isinstance(event, Progress):
                if event.stage not in tasks:
                    tasks[event.stage] = bars.add_task(
                        clean(event.stage),
                        total=event.total,
                        completed=event.done,  # bytes of an earlier run must not count in the rate
                    )
                suffix = f", {plural(event.workers, 'worker')}" if event.workers else ""
                suffix += f", {event.part}" if event.part else ""
                bars.update(
                    tasks[event.stage],
                    completed=event.done,
                    total=event.total,
                    description=clean(event.stage) + suffix,
                )
            else:
                # rich prints lines from stderr above the live bars.
                _note(out, event)

        yield emit
