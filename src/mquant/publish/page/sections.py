"""The sections of the report page, in the order of a reader's doubts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

from mquant.findings import Finding
from mquant.publish.page.charts import columns, heatmap, meter
from mquant.publish.page.html import Html, facts, join, table, tag
from mquant.text import size

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Nothing is fetched and no script runs, even if a name found a way through the escaping."""
_WORST: Final = 10


@dataclass(frozen=True)
class Size:
    """The bytes of a role before (None if no parent was given) and after."""

    role: str
    tensors: int
    before: int | None
    after: int


@dataclass(frozen=True)
class Evidence:
    """Everything the page shows of a checkpoint.

    `comparison` and `evaluation` are the JSON of `mquant compare` and `mquant eval`; None if not
    made. `facts` are names and values; `commands` reproduce all figures.
    """

    name: str
    parent: str | None
    verdict: str
    severity: str
    facts: Sequence[tuple[str, str]]
    sizes: Sequence[Size]
    findings: Sequence[Finding]
    recipe: str
    commands: Sequence[str]
    made_by: str
    comparison: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None


def render(evidence: Evidence) -> str:
    """The whole page."""
    style = files("mquant.publish.page").joinpath("page.css").read_text("utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{evidence.name}: mquant report"),
        tag("style", Html(style)),
    )
    sections = [
        _header(evidence),
        _tiles(evidence),
        _sizes(evidence),
        _errors(evidence),
        _routing(evidence),
        _evaluation(evidence),
        _findings(evidence),
        _recipe(evidence),
        tag("footer", f"Made by {evidence.made_by}. Every number on this page was measured."),
    ]
    body = tag("body", tag("main", *sections))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _section(title: str, *children: str) -> Html:
    return tag("section", tag("h2", title), *children)


def _header(evidence: Evidence) -> Html:
    cls = {"error": "error", "warning": "warning"}.get(evidence.severity, "good")
    made = f"Quantized from {evidence.parent}" if evidence.parent else "Its parent was not given"
    return tag(
        "header",
        tag("h1", evidence.name),
        tag("div", made, cls="sub"),
        tag("div", evidence.verdict, cls=f"badge {cls}"),
    )


def _tiles(evidence: Evidence) -> Html:
    tiles = [tag("div", tag("b", b), tag("span", s), cls="tile") for b, s in _figures(evidence)]
    return tag("div", *tiles, cls="tiles")


def _figures(evidence: Evidence) -> Iterator[tuple[str, str]]:
    after = sum(each.after for each in evidence.sizes)
    before = sum(each.before or 0 for each in evidence.sizes)
    yield size(after), f"{after / before:.1%} of {size(before)}" if before else "of tensors"
    compared, evaluated = evidence.comparison, evidence.evaluation
    if compared:
        error = compared["changed"]
        if error["tensors"]:
            sqnr = _number(error["sqnr_db"], "{:.1f} dB SQNR")
            yield _number(error["relative_error"], "{:.2%}"), f"relative weight error, {sqnr}"
        yield f"{compared['identical']:,}", "tensors identical to the parent's"
    if evaluated:
        ours, parents = evaluated["perplexity"], evaluated["parent_perplexity"]
        change = f"perplexity, parent {parents:.3f} ({ours / parents - 1:+.2%})" if parents else ""
        yield f"{ours:.3f}", change or "perplexity"
        if evaluated["kl_nats"] is not None:
            yield f"{evaluated['kl_nats']:.4f}", "nats a token: KL from the parent"
            yield f"{evaluated['top1_agreement']:.1%}", "of tokens: same first choice"
        if evaluated["router_agreement"] is not None:
            yield f"{evaluated['router_agreement']:.1%}", "of routed experts: same choice"


def _sizes(evidence: Evidence) -> Html:
    most = max([1, *(max(each.before or 0, each.after) for each in evidence.sizes)])
    rows = []
    for each in evidence.sizes:
        bars = [meter(each.after / most, "after")]
        if each.before is not None:
            bars.append(meter(each.before / most, "before"))
        ratio = f"{each.after / each.before:.1%}" if each.before else ""
        before = "" if each.before is None else size(each.before)
        rows.append((each.role, f"{each.tensors:,}", before, size(each.after), ratio, join(*bars)))
    heads = ("role", "tensors", "before", "after", "", "after, and before below it")
    return _section("Sizes", table(heads, rows, frozenset({1, 2, 3, 4})))


def _errors(evidence: Evidence) -> Html:
    found = evidence.comparison
    if found is None:
        sentence = "Weights were not compared: give the parent with --against."
        return _section("Weight error", tag("p", sentence, cls="note"))
    rows = []
    for each in found["roles"]:
        changed = bool(each["tensors"])
        numbers = (
            _number(each["relative_error"], "{:.2%}"),
            _number(each["sqnr_db"], "{:.1f} dB"),
            _number(each["cosine"], "{:.6f}"),
        )
        counts = (each["role"], f"{each['identical']:,}", f"{each['tensors']:,}")
        rows.append((*counts, *(numbers if changed else ("", "", ""))))
    heads = ("role", "identical", "changed", "rel. error", "SQNR", "cosine")
    by_role = table(heads, rows, frozenset(range(1, 6)))
    title = "Relative error of each expert's weights together"
    picture = heatmap(_grid(found["experts"]), title, "layers", "experts", "{:.2%}")
    return _section("Weight error", picture, by_role, _worst(found))


def _worst(found: Mapping[str, Any]) -> Html:
    if not found["worst"]:
        return join()
    table_of = {row[0]: dict(zip(found["columns"], row, strict=True)) for row in found["tensors"]}
    rows = []
    for name in found["worst"][:_WORST]:
        row = table_of[name]
        at = f"[{row['worst_row']}, {row['worst_column']}]" if row["worst_row"] is not None else ""
        block = f"{_number(row['worst_error'], '{:.1%}')} at {at}" if at else ""
        rows.append((_number(row["relative_error"], "{:.2%}"), block, tag("code", name)))
    heads = ("rel. error", "worst block of 16", "the ten worst tensors")
    return join(tag("p"), table(heads, rows, frozenset({0})))


def _routing(evidence: Evidence) -> Html:
    found = evidence.evaluation
    if not found or not found["routing"]:
        return join()
    parts: list[str] = []
    agreed = [(f"layer {e['layer']}", e["agreement"]) for e in found["routing"]]
    if all(value is not None for _, value in agreed):
        least = min(agreed, key=lambda each: each[1])
        sentence = (
            f"Share of the chosen experts that the parent's router chose too, by layer; "
            f"least in {least[0]}, {least[1]:.2%}."
        )
        parts += [tag("p", sentence, cls="note"), columns(agreed, 0.9, "{:.0%}")]
    usage = [[count / max(sum(e["usage"]), 1) for count in e["usage"]] for e in found["routing"]]
    parts.append(heatmap(usage, "Tokens that chose each expert", "layers", "experts", "{:.1%}"))
    unused = sum(not count for each in found["routing"] for count in each["usage"])
    total = sum(len(each["usage"]) for each in found["routing"])
    parts.append(tag("p", f"{unused:,} of {total:,} experts got no token.", cls="note"))
    return _section("Routing", *parts)


def _evaluation(evidence: Evidence) -> Html:
    found = evidence.evaluation
    if found is None:
        sentence = "Nothing was evaluated: give a text with --text."
        return _section("Evaluation", tag("p", sentence, cls="note"))
    text = found["text"]
    rows = [("text", f"{text['name']}, {found['tokens']:,} of {text['tokens'] - 1:,} tokens")]
    rows.append(("windows", f"{found['context']:,} tokens; none sees further back"))
    rows.append(("perplexity", f"{found['perplexity']:.4f}"))
    if found["parent"] is not None:
        rows.append((f"perplexity of {found['parent']}", f"{found['parent_perplexity']:.4f}"))
        rows.append(("KL from the parent", f"{found['kl_nats']:.5f} nats a token"))
        rows.append(("same first choice", f"{found['top1_agreement']:.2%} of tokens"))
    rows.append(("sha256 of the text", tag("code", text["sha256"])))
    how = "Float32 on the CPU, from the weights as they are stored; activations are not quantized."
    return _section("Evaluation", facts(rows), tag("p"), tag("p", how, cls="note"))


def _findings(evidence: Evidence) -> Html:
    if not evidence.findings:
        return _section("Findings", tag("p", "None: mquant verify has nothing to say.", cls="good"))
    items = [
        tag(
            "li",
            tag("b", each.severity, cls=each.severity),
            " ",
            tag("code", each.rule),
            tag("br"),
            each.message,
            tag("span", each.fix, cls="fix") if each.fix else "",
        )
        for each in evidence.findings
    ]
    return _section("Findings", tag("ul", *items, cls="found"))


def _recipe(evidence: Evidence) -> Html:
    parts: list[str] = [facts(evidence.facts)]
    if evidence.recipe:
        parts += [tag("p"), tag("pre", evidence.recipe)]
    how = tag("pre", "\n".join(evidence.commands))
    return join(_section("Recipe", *parts), _section("How to reproduce", how))


def _grid(rows: Sequence[Sequence[Any]]) -> list[list[float | None]]:
    """[layer, expert, value] as a table, with None for a missing value."""
    if not rows:
        return []
    high, wide = max(row[0] for row in rows) + 1, max(row[1] for row in rows) + 1
    cells: list[list[float | None]] = [[None] * wide for _ in range(high)]
    for layer, expert, value in rows:
        cells[layer][expert] = value
    return cells


def _number(value: float | None, template: str) -> str:
    return "no number" if value is None else template.format(value)
