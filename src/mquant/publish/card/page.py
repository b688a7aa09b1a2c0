"""The card as Markdown. The same facts give the same bytes; unknown facts are left out."""

from collections.abc import Iterator
from typing import Final

from mquant import __version__
from mquant.findings import RULES, Finding
from mquant.publish.card.facts import Card
from mquant.publish.card.markdown import block, code, table, text
from mquant.publish.card.measured import Measured
from mquant.publish.card.metadata import metadata
from mquant.publish.card.origin import made, sources
from mquant.publish.card.serving import serving
from mquant.text import both_sizes, compress, plural

MARK: Final = "<!-- Made by mquant card"


def render(card: Card) -> str:
    """Return README.md: YAML metadata, then one section for each kind of fact."""
    sections = (
        _model(card),
        _verified(card),
        _accuracy(card),
        serving(card),
        _quantized(card),
        made(card),
        _files(card),
        sources(card),
    )
    head = f"{MARK} {__version__}, from the files it describes: what is not known is left out. -->"
    title = f"# {text(card.repo)}\n"
    return "\n".join((f"---\n{metadata(card)}---\n\n{head}\n", title, *filter(None, sections)))


def _model(card: Card) -> str:
    return "## What it is\n\n" + table(("", ""), _model_rows(card))


def _model_rows(card: Card) -> Iterator[tuple[str, str]]:
    inspection = card.inspection
    base = card.about.base_model or card.parent.repo
    if base:
        yield "Base model", f"[{text(base)}](https://huggingface.co/{base})"
    if card.architecture:
        family = f" ({text(inspection.family)})" if inspection.family else ""
        yield "Architecture", code(card.architecture) + family
    scheme = f"{text(card.scheme)}, " if card.scheme else ""
    yield "Quantization", f"{scheme}{code(card.report.method)}, {code(card.format)}"
    if inspection.layers is not None:
        yield "Layers", f"{inspection.layers:,}"
    if inspection.experts is not None:
        pruned = f", pruned from {inspection.unpruned_experts:,}" if inspection.pruned else ""
        yield "Experts", f"{inspection.experts:,}{pruned}"
    if inspection.experts_per_token is not None:
        yield "Experts per token", f"{inspection.experts_per_token:,}"
    if card.parameters is not None:
        yield "Parameters", _count(card.parameters)
    if card.active is not None:
        yield "Active per token", f"{_count(card.active)}, embeddings and lm\\_head included"
    if inspection.context is not None:
        yield "Context", f"{inspection.context:,} tokens"
    if inspection.vocabulary is not None:
        yield "Vocabulary", f"{inspection.vocabulary:,} tokens"
    yield "Size", f"{both_sizes(inspection.file_bytes)} in {plural(inspection.shards, 'shard')}"
    if card.parent.reap:
        yield "Pruning", f"The parent's card: “{text(card.parent.reap)}”"
        if card.parent.pruned_from:
            yield "Pruned from", text(card.parent.pruned_from)


def _verified(card: Card) -> str:
    report = card.report
    parts = [f"## Verified\n\n`mquant verify` {__version__}: {text(report.verdict)}\n"]
    if report.loader is not None:
        sentence = f"vLLM {text(report.loader.version)}, asked to load the headers: "
        parts.append(f"{sentence}{text(report.loader.verdict)}.\n")
    depths = ["loader" if checked == "vllm" else checked for checked in report.checked]
    rows = []
    for depth in depths:
        of_depth = {rule.id for rule in RULES.values() if rule.needs == depth}
        ids = sorted(of_depth - report.not_judged.keys())
        rows.append((depth, f"{len(ids)}", ", ".join(map(code, ids))))
    rules = table(("What was checked", "Rules", "Ids"), rows)
    parts.append(f"<details><summary>The rules</summary>\n\n{rules}\n</details>\n")
    if report.findings:
        findings = [_finding(finding) for finding in report.findings]
        parts.append(table(("Rule", "Severity", "Finding"), findings))
    else:
        parts.append("No rule found anything.\n")
    return "\n".join(parts)


def _finding(finding: Finding) -> tuple[str, str, str]:
    return code(finding.rule), finding.severity, text(finding.message)


def _accuracy(card: Card) -> str:
    measured = card.measured
    if not measured.anything:
        return "## Accuracy\n\nNot measured.\n"
    rows = []
    if measured.perplexity is not None:
        rows.append(("Perplexity of the checkpoint", f"{measured.perplexity:.4f}"))
    if measured.parent is not None:
        rows.append(("Perplexity of the parent", f"{measured.parent:.4f}"))
    if measured.kl is not None:
        rows.append(("KL divergence from the parent", f"{measured.kl:.5f} nats per token"))
    if measured.agreement is not None:
        rows.append(("The parent's most likely token", f"{measured.agreement:.2%} of positions"))
    for role, error in measured.errors.items():
        rows.append((f"Relative L2 error of the weights, {text(role)}", f"{error:.4f}"))
    facts = "" if measured.perplexity is None else _evaluated(measured)
    return "## Accuracy\n\n" + table(("Measured", ""), rows) + facts


def _evaluated(measured: Measured) -> str:
    on = [code(measured.text)] if measured.text else []
    if measured.tokens is not None:
        on.append(plural(measured.tokens, "token"))
    if measured.context is not None:
        on.append(f"windows of {measured.context:,}")
    return f"\nBy `mquant eval` on {', '.join(on)}.\n" if on else ""


def _quantized(card: Card) -> str:
    rows = [
        (text(role.role), f"{role.quantized:,}", f"{role.kept:,}", f"{role.parameters:,}")
        for role in card.roles
    ]
    head = ("Role", "Modules quantized", "Tensors kept", "Parameters")
    entries = compress(card.ignore)
    parts = ["## What is quantized, and what stays\n"]
    parts += [table(head, rows)] if rows else []
    exact = ", exact names" if not any(e.startswith("re:") for e in card.ignore) else ""
    parts.append(f"`ignore` in config.json has {len(card.ignore):,} entries{exact}.\n")
    if entries:
        parts.append(table(("Entries", "Count"), ((code(e), f"{n:,}") for e, n in entries)))
    return "\n".join(parts)


def _files(card: Card) -> str:
    files = card.record.files if card.record else {}
    same = card.report.as_recorded
    lines = [f"{digest}  {name}" for name, (_, digest) in files.items() if name in same]
    if not lines:
        return ""
    intro = (
        f"## Checksums\n\nsha256 of {plural(len(lines), 'file')}, as `mquant.json` and the files "
        "have them, in the format of `sha256sum --check`:\n"
    )
    return f"{intro}\n<details>\n\n{block(lines)}\n</details>\n"


def _count(parameters: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if parameters >= unit:
            return f"{parameters / unit:,.2f} {name} ({parameters:,})"
    return f"{parameters:,}"
