"""`mquant compare`: the distance between a checkpoint's weights and its parent's."""

from math import isfinite
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from mquant.cli.options import Against, FamilyFile, FormatChoice, Revision, Src
from mquant.cli.output import Format, output
from mquant.cli.progress import progress
from mquant.cli.source import example, open_source
from mquant.cli.tables import table
from mquant.errors import UsageError
from mquant.text import clean, plural, size

if TYPE_CHECKING:
    from mquant.measure.comparison import Comparison, ErrorStats

_SHOWN = 10

Threads = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        metavar="N",
        help="Tensors compared at once. Default: cores + 1; 6 if SRC or PARENT is a hub repo.",
    ),
]


def compare(
    src: Src = None,
    against: Against = None,
    workers: Threads = None,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Compare every weight with the parent's: relative error, SQNR, cosine, worst block.

    Both checkpoints are read whole, once. If interrupted, run the same command again: it resumes.
    The JSON has a row for each tensor. Exit code 3: tensors are missing, unknown, or
    changed without being quantized, or a file is not the file in mquant.json.

    Example: mquant compare ./MiniMax-M2.7-REAP-NVFP4 --against ./MiniMax-M2.7-REAP
    """
    with output("compare", output_format) as out:
        source = open_source(src, revision, example(compare))
        if against is None:
            raise UsageError("--against is missing.", example(compare))
        parent = open_source(against, None, example(compare))
        from mquant.family_files import load_families
        from mquant.measure.comparison import compare as measure

        with progress(out) as emit:
            comparison = measure(source, parent, load_families(family), workers=workers, emit=emit)
        out.put(verdict=verdict(comparison), **comparison.to_json())
        out.show(render(comparison))
        if comparison.bytes_read is not None:
            requests = plural(comparison.requests or 0, "request")
            out.show(f"Read {size(comparison.bytes_read)} in {requests} from the hub.")
        out.report(comparison.findings)
        if any(finding.severity == "error" for finding in comparison.findings):
            raise typer.Exit(3)


def verdict(comparison: "Comparison") -> str:
    """Return the comparison in one sentence."""
    changed = len(comparison.changed)
    total = comparison.total
    equal = sum(comparison.equal.values())
    identical = len(comparison.tensors) - changed - equal
    text = f"{plural(identical, 'tensor')} identical to {comparison.parent}"
    if equal:
        text += f", {equal:,} equal in every number"
    if not changed:
        return f"{text}, and none changed."
    if not isfinite(total.error):
        return f"{text}, {changed:,} changed, some of them to or from NaN or infinity."
    if not total.power:
        return f"{text}, {changed:,} changed from 0."
    return f"{text}, {changed:,} changed by {_percent(total)} ({_decibel(total)})."


def render(comparison: "Comparison") -> RenderableType:
    """Render the comparison for a person, without the findings."""
    roles = table(
        ("role", "left"),
        ("identical", "right"),
        *((("equal", "right"),) if comparison.equal else ()),
        ("changed", "right"),
        ("rel. error", "right"),
        ("SQNR", "right"),
        ("cosine", "right"),
    )
    for role, (same, error) in comparison.roles.items():
        numbers = (_percent(error), _decibel(error), f"{error.cosine:.6f}")
        cells = numbers if error.tensors else ("", "", "")
        equal = (f"{comparison.equal.get(role, 0):,}",) if comparison.equal else ()
        counts = (f"{same:,}", *equal, f"{error.tensors:,}")
        roles.add_row(clean(role), *counts, *cells)
    parts: list[RenderableType] = [Text(clean(verdict(comparison)), "bold"), "", roles, ""]
    if comparison.changed:
        parts += [_worst(comparison), ""]
    return Group(*parts)


def _worst(comparison: "Comparison") -> RenderableType:
    from mquant.measure.comparison import error_stats

    rows = table(
        ("rel. error", "right"), ("SQNR", "right"), ("worst block", "right"), ("worst", "left")
    )
    for difference in comparison.changed[:_SHOWN]:
        error, block = error_stats(difference), ""
        if difference.worst is not None:
            row, column, relative = difference.worst
            zero = "the parent's is 0" if isfinite(difference.error) else "not finite"
            block = f"{relative:.1%}" if isfinite(relative) else zero
            block += f" at [{row}, {column}]"
        rows.add_row(_percent(error), _decibel(error), block, clean(difference.name))
    return rows


def _percent(error: "ErrorStats") -> str:
    if not isfinite(error.error):
        return "not finite"
    return f"{error.relative:.2%}" if error.power else "parent is 0"


def _decibel(error: "ErrorStats") -> str:
    return f"{error.sqnr:.1f} dB" if isfinite(error.error) and error.power else ""
