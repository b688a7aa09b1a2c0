"""HTML from nested calls. Every string that is not `Html` is escaped: names are untrusted."""

from collections.abc import Sequence
from html import escape


class Html(str):
    """Markup that is not escaped again."""

    __slots__ = ()


def text(value: str) -> Html:
    """Return a string as markup; control and bidi characters are written as escapes."""
    shown = "".join(
        c
        if c.isprintable() or c == "\n"
        else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in value
    )
    return Html(escape(shown))


def tag(name: str, /, *children: str, **attributes: str) -> Html:
    """Return an element. `cls` sets class; `_` becomes `-`; an empty attribute is left out."""
    start = "".join(
        f' {"class" if key == "cls" else key.replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value
    )
    if name in ("meta", "img", "br"):
        return Html(f"<{name}{start}>")
    return Html(f"<{name}{start}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Return elements and texts, joined in their order."""
    return Html("".join(c if isinstance(c, Html) else text(c) for c in children))


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: frozenset[int]) -> Html:
    """Return a table that scrolls if the table is too wide. `numbers`: right-aligned columns."""

    def row(kind: str, cells: tuple[str, ...]) -> Html:
        tags = (tag(kind, c, cls="n" if i in numbers else "") for i, c in enumerate(cells))
        return tag("tr", *tags)

    body = tag("tbody", *(row("td", cells) for cells in rows))
    return tag("div", tag("table", tag("thead", row("th", heads)), body), cls="scroll")


def facts(rows: Sequence[tuple[str, str]]) -> Html:
    """Return a table of names and values. Long values wrap."""
    body = (tag("tr", tag("td", name), tag("td", value)) for name, value in rows)
    return tag("table", tag("tbody", *body), cls="facts")
