"""The sections of the report page, in their order on the page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

from mquant.findings import Finding
from mquant.publish.html_report.charts import columns, heatmap, meter
from mquant.publish.html_report.html import Html, facts, join, table, tag
from mquant.text import size

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The browser fetches nothing and runs no script, even if a name is not escaped."""
_WORST: Final = 10


@dataclass(frozen=True)
class Size:
    """The bytes of a role in the parent (`before`; None without a parent) and in the checkpoint."""

    role: str
    tensors: int
    before: int | None
    after: int


@dataclass(frozen=True)
class Evidence:
    """Everything the page shows about a checkpoint.

    `comparison` and `evaluation` are the JSON of `mquant compare` and `mquant eval`; None if not
    measured. `facts` are names and values; `commands` reproduce all figures.
    """

    name: str
    parent: str | None
    verdict: str
    severity: str
    facts: Sequence[tuple[str, str]]
    sizes: Sequence[Size]
    findings: Sequence[Finding]
    not_judged: str
    recipe: str
    commands: Sequence[str]
    made_by: str
    comparison: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None


def render(evidence: Evidence) -> str:
    """Return the whole page."""
    style = files("mquant.publish.html_report").joinpath("page.css").read_text("utf-8")
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
        tag("footer", f"Written by {evidence.made_by}. Every number on this page was measured."),
    ]
    body = tag("body", tag("main", *sections))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _section(title: str, *children: str) -> Html:
    return tag("section", tag("h2", title), *children)


def _header(evidence: Evidence) -> Html:
    cls = {"error": "error", "warning": "warning"}.get(evidence.severity, "good")
    origin = f"Quantized from {evidence.parent}" if evidence.parent else "No parent was given"
    return tag(
        "header",
        tag("h1", evidence.name),
        tag("div", origin, cls="sub"),
        tag("div", evidence.verdict, cls=f"badge {cls}"),
    )


def _tiles(evidence: Evidence) -> Html:
    tiles = [tag("div", tag("b", b), tag("span", s), cls="tile") for b, s in _figures(evidence)]
    return tag("div", *tiles, cls="tiles")


def _figures(evidence: Evidence) -> Iterator[tuple[str, str]]:
    after = sum(part.after for part in evidence.sizes)
    before = sum(part.before or 0 for part in evidence.sizes)
    yield size(after), f"{after / before:.1%} of {size(before)}" if before else "of tensors"
    comparison, evaluation = evidence.comparison, evidence.evaluation
    if comparison:
        changed = comparison["changed"]
        if changed["tensors"]:
            sqnr = _number(changed["sqnr_db"], "{:.1f} dB SQNR")
            yield _number(changed["relative_error"], "{:.2%}"), f"relative weight error, {sqnr}"
        yield f"{comparison['identical']:,}", "tensors identical to the parent's"
    if evaluation:
        own, parent = evaluation["perplexity"], evaluation["parent_perplexity"]
        change = f"perplexity, parent {parent:.3f} ({own / parent - 1:+.2%})" if parent else ""
        yield f"{own:.3f}", change or "perplexity"
        if evaluation["kl_nats"] is not None:
            yield f"{evaluation['kl_nats']:.4f}", "nats a token: KL from the parent"
            yield f"{evaluation['top1_agreement']:.1%}", "of tokens: same most likely token"
        if evaluation["router_agreement"] is not None:
            yield f"{evaluation['router_agreement']:.1%}", "of routed experts: same choice"


def _sizes(evidence: Evidence) -> Html:
    most = max([1, *(max(part.before or 0, part.after) for part in evidence.sizes)])
    rows = []
    for part in evidence.sizes:
        bars = [meter(part.after / most, "after")]
        if part.before is not None:
            bars.append(meter(part.before / most, "before"))
        ratio = f"{part.after / part.before:.1%}" if part.before else ""
        before = "" if part.before is None else size(part.before)
        rows.append((part.role, f"{part.tensors:,}", before, size(part.after), ratio, join(*bars)))
    heads = ("role", "tensors", "before", "after", "", "after (upper bar), before (lower bar)")
    return _section("Sizes", table(heads, rows, frozenset({1, 2, 3, 4})))


def _errors(evidence: Evidence) -> Html:
    comparison = evidence.comparison
    if comparison is None:
        sentence = "Weights were not compared: give the parent with --against."
        return _section("Weight error", tag("p", sentence, cls="note"))
    rows = []
    for row in comparison["roles"]:
        differs = bool(row["tensors"])
        numbers = (
            _number(row["relative_error"], "{:.2%}"),
            _number(row["sqnr_db"], "{:.1f} dB"),
            _number(row["cosine"], "{:.6f}"),
        )
        equal = f", {row['equal']:,} equal" if row["equal"] else ""
        counts = (row["role"], f"{row['identical']:,}{equal}", f"{row['tensors']:,}")
        rows.append((*counts, *(numbers if differs else ("", "", ""))))
    heads = ("role", "identical", "changed", "rel. error", "SQNR", "cosine")
    by_role = table(heads, rows, frozenset(range(1, 6)))
    title = "Relative error of each expert's weights together"
    picture = heatmap(_grid(comparison["experts"]), title, "layers", "experts", "{:.2%}")
    return _section("Weight error", picture, by_role, _worst(comparison))


def _worst(result: Mapping[str, Any]) -> Html:
    if not result["worst"]:
        return join()
    table_of = {row[0]: dict(zip(result["columns"], row, strict=True)) for row in result["tensors"]}
    rows = []
    for name in result["worst"][:_WORST]:
        row = table_of[name]
        at = f"[{row['worst_row']}, {row['worst_column']}]" if row["worst_row"] is not None else ""
        block = f"{_number(row['worst_error'], '{:.1%}')} at {at}" if at else ""
        rows.append((_number(row["relative_error"], "{:.2%}"), block, tag("code", name)))
    heads = ("rel. error", "worst block of 16", "the ten worst tensors")
    return join(tag("p"), table(heads, rows, frozenset({0})))


def _routing(evidence: Evidence) -> Html:
    routing = evidence.evaluation["routing"] if evidence.evaluation else None
    if not routing:
        return join()
    parts: list[str] = []
    agreement = [(f"layer {layer['layer']}", layer["agreement"]) for layer in routing]
    if all(value is not None for _, value in agreement):
        least = min(agreement, key=lambda pair: pair[1])
        sentence = (
            f"Share of the chosen experts that the parent's router chose too, by layer; "
            f"least in {least[0]}, {least[1]:.2%}."
        )
        parts += [tag("p", sentence, cls="note"), columns(agreement, 0.9, "{:.0%}")]
    usage = [[count / max(sum(layer["usage"]), 1) for count in layer["usage"]] for layer in routing]
    parts.append(heatmap(usage, "Tokens that chose each expert", "layers", "experts", "{:.1%}"))
    unused = sum(not count for layer in routing for count in layer["usage"])
    total = sum(len(layer["usage"]) for layer in routing)
    parts.append(tag("p", f"{unused:,} of {total:,} experts got no token.", cls="note"))
    return _section("Routing", *parts)


def _evaluation(evidence: Evidence) -> Html:
    result = evidence.evaluation
    if result is None:
        sentence = "The checkpoint was not evaluated: give a text with --text."
        return _section("Evaluation", tag("p", sentence, cls="note"))
    text = result["text"]
    whole = "" if text["tokens"] is None else f" of {text['tokens'] - 1:,}"
    rows = [("text", f"{text['name']}, {result['tokens']:,}{whole} tokens")]
    rows.append(("windows", f"{result['context']:,} tokens; no token sees an earlier window"))
    rows.append(("perplexity", f"{result['perplexity']:.4f}"))
    if result["parent"] is not None:
        rows.append((f"perplexity of {result['parent']}", f"{result['parent_perplexity']:.4f}"))
        rows.append(("KL from the parent", f"{result['kl_nats']:.5f} nats a token"))
        rows.append(("same most likely token", f"{result['top1_agreement']:.2%} of tokens"))
    read = f"the first {text['bytes']:,} bytes" if text["tokens"] is None else "the text"
    rows.append((f"sha256 of {read}", tag("code", text["sha256"])))
    how = "Float32 on the CPU, from the weights as they are stored; activations are not quantized."
    return _section("Evaluation", facts(rows), tag("p"), tag("p", how, cls="note"))


def _findings(evidence: Evidence) -> Html:
    not_judged = tag("p", evidence.not_judged)
    if not evidence.findings:
        none = tag("p", "mquant verify has no findings.", cls="good")
        return _section("Findings", none, not_judged)
    items = [
        tag(
            "li",
            tag("b", finding.severity, cls=finding.severity),
            " ",
            tag("code", finding.rule),
            tag("br"),
            finding.message,
            tag("span", finding.fix, cls="fix") if finding.fix else "",
        )
        for finding in evidence.findings
    ]
    return _section("Findings", tag("ul", *items, cls="found"), not_judged)


def _recipe(evidence: Evidence) -> Html:
    parts: list[str] = [facts(evidence.facts)]
    if evidence.recipe:
        parts += [tag("p"), tag("pre", evidence.recipe)]
    how = tag("pre", "\n".join(evidence.commands))
    return join(_section("Recipe", *parts), _section("How to reproduce", how))


def _grid(rows: Sequence[Sequence[Any]]) -> list[list[float | None]]:
    """Return rows of [layer, expert, value] as a table, with None for a missing value."""
    if not rows:
        return []
    high, wide = max(row[0] for row in rows) + 1, max(row[1] for row in rows) + 1
    cells: list[list[float | None]] = [[None] * wide for _ in range(high)]
    for layer, expert, value in rows:
        cells[layer][expert] = value
    return cells


def _number(value: float | None, template: str) -> str:
    return "no number" if value is None else template.format(value)
