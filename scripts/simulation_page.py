"""The output of the simulation of scaling out: tables, numbers as text, and pictures as SVG."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

Point = tuple[float, float]

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 176, 34, 44
# Colour-blind readers can tell these colours apart, on a dark and on a light page.
_COLOURS: Final = ("#d55e00", "#0a8f6b", "#3b82d6", "#b8599b")
_TIMES: Final = (
    (10, "10 s"),
    (60, "1 min"),
    (600, "10 min"),
    (3600, "1 h"),
    (36_000, "10 h"),
    (360_000, "100 h"),
)
_STYLE: Final = """<style>
text{font:12px system-ui,sans-serif;fill:#333}
.grid{stroke:#8888;stroke-width:.5}
path{fill:none;stroke-width:2}
@media(prefers-color-scheme:dark){text{fill:#ddd}}
</style>"""


@dataclass(frozen=True)
class Curve:
    """A line of a picture: (machines, seconds). The curves of one `group` have one colour."""

    label: str
    group: int
    dashed: bool
    points: Sequence[Point]


def picture(title: str, curves: Sequence[Curve], mark: int, marked: str) -> str:
    """Return an SVG of seconds over machines, both logarithmic, with a line at `mark` machines."""
    across = [x for curve in curves for x, _ in curve.points]
    up = [y for curve in curves for _, y in curve.points]
    low, high = min(up) / 1.5, max(up) * 1.3

    def x_of(value: float) -> float:
        part = math.log(value / min(across)) / math.log(max(across) / min(across))
        return _LEFT + part * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        part = math.log(value / low) / math.log(high / low)
        return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<text x="{_LEFT}" y="18">{title}</text>']
    for x in dict.fromkeys(across):
        parts += [_line(x_of(x), _TOP, x_of(x), _HEIGHT - _BOTTOM)]
        parts += [_text(x_of(x), _HEIGHT - _BOTTOM + 18, f"{x:g}", "middle")]
    parts += [_text(x_of(math.sqrt(max(across))), _HEIGHT - 8, "machines", "middle")]
    for seconds, label in _TIMES:
        if low <= seconds <= high:
            parts += [_line(_LEFT, y_of(seconds), _WIDTH - _RIGHT, y_of(seconds))]
            parts += [_text(_LEFT - 6, y_of(seconds) + 4, label, "end")]
    parts += [
        f'<line x1="{x_of(mark):.1f}" y1="{_TOP}" x2="{x_of(mark):.1f}" y2="{_HEIGHT - _BOTTOM}" '
        'stroke="#888" stroke-dasharray="2 3"/>',
        _text(x_of(mark) - 5, _HEIGHT - _BOTTOM - 8, marked, "end"),
    ]
    for number, curve in enumerate(curves):
        colour, dash = _COLOURS[curve.group], ' stroke-dasharray="6 4"' if curve.dashed else ""
        way = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in curve.points)
        parts += [f'<path d="M{way.replace(" ", " L")}" stroke="{colour}"{dash}/>']
        place, begin = _TOP + 10 + 20 * number, _WIDTH - _RIGHT + 12
        parts += [f'<path d="M{begin},{place} h22" stroke="{colour}"{dash}/>']
        parts += [_text(begin + 28, place + 4, curve.label, "start")]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
    return "\n".join([head, f"<title>{title}</title>", _STYLE, *parts, "</svg>\n"])


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown, with the first column aligned to the left."""
    names = [*head]
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def span(seconds: float) -> str:
    """Return a time as people write it: `48 s`, `3.7 min`, `2.3 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 5970:
        return f"{seconds / 60:.1f} min" if seconds < 600 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def hours(value: float) -> str:
    """Return machine-hours: two decimals below 9.95 h, none above."""
    return f"{value:.2f} h" if value < 9.95 else f"{value:,.0f} h"


def fill(text: str, values: Mapping[str, str]) -> str:
    """Return a page with `{{name}}` replaced by its value. Raises KeyError for a missing value."""
    pieces = text.split("{{")
    return pieces[0] + "".join(
        values[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces[1:])
    )


__all__ = ["Curve", "fill", "hours", "picture", "span", "table"]
