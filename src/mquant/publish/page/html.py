"""HTML from nested calls. Every string that is not `Html` is escaped: names are untrusted."""

from collections.abc import Sequence
from html import escape


class Html(str):
    """Markup. Only `tag` makes it."""

    __slots__ = ()


def text(value: str) -> Html:
    """A string as markup; control and bidi characters are written as escapes."""
    shown = "".join(
        c
        if c.isprintable() or c == "\n"
        else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in value
    )
    return Html(escape(shown))


def tag(name: str, /, *children: str, **attributes: str) -> Html:
    """An element. `cls` sets class; underscores become dashes; an empty attribute is left out."""
    start = "".join(
        f' {"class" if key == "cls" else key.replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value
    )
    if name in ("meta", "img", "br"):
        return Html(f"<{name}{start}>")
    return Html(f"<{name}{start}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Elements and text, one after another."""
    return Html("".join(c if isinstance(c, Html) else text(c) for c in children))


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: frozenset[int]) -> Html:
    """A table that scrolls if it is too wide. `numbers`: the columns that are right-aligned."""

    def row(kind: str, cells: tuple[str, ...]) -> Html:
        made = (tag(kind, c, cls="n" if i in numbers else "") for i, c in enumerate(cells))
        return tag("tr", *made)

    body = tag("tbody", *(row("td", cells) for cells in rows))
    return tag("div", tag("table", tag("thead", row("th", heads)), body), cls="scroll")


def facts(rows: Sequence[tuple[str, str]]) -> Html:
    """Names and values. Long values wrap."""
    made = (tag("tr", tag("td", name), tag("td", value)) for name, value in rows)
    return tag("table", tag("tbody", *made), cls="facts")
