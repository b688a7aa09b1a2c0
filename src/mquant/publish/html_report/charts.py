"""Charts of the HTML page: heat maps, bar charts and meters, drawn without a script."""

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import Final

from mquant.publish.html_report.html import Html, join, tag

_STOPS: Final = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""The Viridis colours: lightness grows evenly, for colour-blind readers and prints too."""

Cells = Sequence[Sequence[float | None]]


def heatmap(cells: Cells, title: str, rows: str, columns: str, unit: str) -> Html:
    """Return a heat map with its scale: one pixel for each value of `cells`, transparent for None.

    `rows` and `columns` name the axes; `unit` formats a number, as in `{:.1%}`. Empty if `cells`
    has no number.
    """
    known = [value for row in cells for value in row if value is not None]
    if not known:
        return join()
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    pixels = [
        [(0, 0, 0, 0) if v is None else (*_colour((v - low) / span), 255) for v in row]
        for row in cells
    ]
    height, width = len(pixels), max(map(len, pixels))
    ratio = f"aspect-ratio:{width}/{height};min-height:{min(20 * height, 120)}px"
    picture = tag("img", src=_png(pixels), alt=title, style=ratio, cls="heat")
    bar = ", ".join(f"rgb{stop}" for stop in _STOPS)
    scale = tag(
        "div",
        unit.format(low),
        tag("span", cls="ramp", style=f"background:linear-gradient(to right, {bar})"),
        unit.format(high),
        cls="scale",
    )
    axes = tag("div", f"↓ {rows}, 0 to {height - 1}   → {columns}, 0 to {width - 1}", cls="axes")
    return tag("figure", tag("figcaption", title), picture, tag("div", axes, scale, cls="under"))


def columns(values: Sequence[tuple[str, float]], low: float, unit: str) -> Html:
    """Return one bar for each (label, value), from `low`, or a smaller minimum, up to 1."""
    floor = min([low, *(value for _, value in values)])
    span = (1 - floor) or 1.0
    bars = [
        tag(
            "span",
            tag("i", style=f"height:{max(2.0, 100 * (value - floor) / span):.1f}%"),
            title=f"{label}: {unit.format(value)}",
        )
        for label, value in values
    ]
    return tag(
        "div",
        tag("div", tag("span", "100%"), tag("span", unit.format(floor)), cls="yaxis"),
        tag("div", *bars, cls="columns"),
        cls="chart",
    )


def meter(share: float, cls: str) -> Html:
    """Return a bar that fills `share` (0 to 1) of its cell."""
    return tag("span", tag("i", style=f"width:{100 * share:.2f}%"), cls=f"meter {cls}")


def _colour(at: float) -> tuple[int, int, int]:
    place = min(max(at, 0.0), 1.0) * (len(_STOPS) - 1)
    index = min(int(place), len(_STOPS) - 2)
    part = place - index
    a, b = _STOPS[index], _STOPS[index + 1]
    red, green, blue = (round(x + (y - x) * part) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _png(pixels: Sequence[Sequence[tuple[int, int, int, int]]]) -> str:
    """Return an RGBA picture as a data URL. Short rows are padded with transparent pixels."""
    width = max(map(len, pixels))
    lines = [b"\0" + b"".join(map(bytes, row)) + b"\0\0\0\0" * (width - len(row)) for row in pixels]

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, len(pixels), 8, 6, 0, 0, 0)
    data = zlib.compress(b"".join(lines), 9)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()
