"""The report of a checkpoint: all measurements, new or read from files, in one HTML file."""

import shlex
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from mquant import __version__
from mquant.checkpoint import Checkpoint, Source, open_checkpoint
from mquant.errors import SourceError
from mquant.events import Emit, silent
from mquant.family import Family
from mquant.measure.comparison import compare
from mquant.measure.evaluation import CONTEXT, TOKENS, Evaluation, evaluate
from mquant.output.document import Document
from mquant.output.finish import RECIPE_NAME
from mquant.output.mquant_json import read_table
from mquant.publish.html_report import Evidence, render
from mquant.publish.html_report.sections import Size
from mquant.untrusted import MAX_TEXT_BYTES, open_named, parse_json
from mquant.verify.digests import refuse_changed
from mquant.verify.inspect import inspect
from mquant.verify.judge import Report, verify
from mquant.verify.not_judged import in_words

MARK: Final = b": mquant report</title>"
_MOST_SHOWN: Final = 20_000  # bytes: a larger file is no recipe


@dataclass(frozen=True)
class Wanted:
    """The inputs of a report.

    `comparison` and `evaluation` are files that `mquant compare` and `mquant eval` wrote with
    `--format json`. Without `comparison`, the weights are compared if a parent is given; without
    `evaluation`, the checkpoint is evaluated if `text` is given. `src` and `against` are the names
    that the user typed.
    """

    src: str
    against: str | None = None
    text: Path | None = None
    comparison: Path | None = None
    evaluation: Path | None = None
    context: int = CONTEXT
    tokens: int = TOKENS


@dataclass(frozen=True)
class Made:
    """The bytes of the written report, and the results in the report."""

    bytes: int
    verification: Report
    comparison: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None


def report(
    source: Source,
    parent: Source | None,
    families: Mapping[str, Family],
    inputs: Wanted,
    document: Document,
    *,
    emit: Emit = silent,
) -> Made:
    """Measure what no given file holds, and write the HTML page to `document`.

    Raises DataFileError or SourceError if an input cannot be read, or describes another
    checkpoint; OutputError as `Document` does.
    """
    document.check()
    comparison = _read_result(inputs.comparison, "compare", source)
    evaluation = _read_result(inputs.evaluation, "eval", source)
    verification = verify(source, families, None, parent, emit)
    if parent is not None and (comparison is None or inputs.text is not None):
        refuse_changed(parent, emit)
    if comparison is None and parent is not None:
        comparison = compare(source, parent, families, digests=False, emit=emit).to_json()
    if evaluation is None and inputs.text is not None:
        evaluation = _evaluate(source, parent, families, inputs, inputs.text, emit).to_json()
    checkpoint = open_checkpoint(source, tolerant=True)
    parent_checkpoint = open_checkpoint(parent) if parent else None
    evidence = Evidence(
        name=source.name,
        parent=parent.name if parent else _parent_name(comparison, evaluation),
        verdict=verification.verdict,
        severity=_severity(verification),
        facts=_facts(checkpoint, verification, families),
        sizes=_sizes(checkpoint, parent_checkpoint, families),
        findings=verification.findings,
        not_judged=in_words(verification.not_judged),
        recipe=_text(source, RECIPE_NAME),
        commands=_commands(inputs, str(document.path)),
        made_by=f"mquant {__version__}",
        comparison=comparison,
        evaluation=evaluation,
    )
    try:
        page = render(evidence)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        if inputs.comparison is None and inputs.evaluation is None:
            raise
        paths = " or ".join(str(path) for path in (inputs.comparison, inputs.evaluation) if path)
        raise SourceError(
            f"{paths} is not a result of this version of mquant: {type(error).__name__} {error}.",
            "Write the file again with --format json.",
        ) from error
    raw = page.encode()
    document.write([raw])
    return Made(len(raw), verification, comparison, evaluation)


def _evaluate(
    source: Source,
    parent: Source | None,
    families: Mapping[str, Family],
    inputs: Wanted,
    text: Path,
    emit: Emit,
) -> Evaluation:
    """Evaluate files that were compared with mquant.json before."""
    numbers = {"context": inputs.context, "tokens": inputs.tokens}
    return evaluate(source, parent, families, text, **numbers, digests=False, emit=emit)


def _severity(verification: Report) -> str:
    worst = verification.findings[0].severity if verification.findings else "info"
    return "warning" if verification.undecided and worst == "info" else worst


def _read_result(path: Path | None, verb: Literal["compare", "eval"], source: Source) -> Any:
    if path is None:
        return None
    try:
        with open_named(path, "Check the path.", MAX_TEXT_BYTES) as file:
            document = parse_json(file.read())
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("schema") != f"mquant.{verb}/1":
        raise SourceError(
            f"{path} is not the JSON of mquant {verb}.",
            f"Write the file with: mquant {verb} --format json",
        )
    if "error" in document or document.get("source") != source.name:
        subject = document.get("source") or "a run that failed"
        raise SourceError(f"{path} describes {subject}, not {source.name}.", "Measure again.")
    return document


def _parent_name(*documents: Mapping[str, Any] | None) -> str | None:
    names = (document.get("parent") for document in documents if document)
    return next((name for name in names if isinstance(name, str)), None)


def _facts(
    checkpoint: Checkpoint, verification: Report, families: Mapping[str, Family]
) -> list[tuple[str, str]]:
    inspection = inspect(checkpoint, families)
    rows = [
        ("family", inspection.family or f"unknown ({inspection.model_type})"),
        ("quantization", inspection.quantization or "none"),
        ("quantized modules", f"{verification.quantized:,}"),
        ("tensors", f"{inspection.tensors:,} in {inspection.shards:,} shards"),
        ("layers", "" if inspection.layers is None else f"{inspection.layers:,}"),
        ("experts", "" if inspection.experts is None else f"{inspection.experts:,}"),
    ]
    record = read_table(checkpoint.source)
    try:
        rows.append(("recipe", str(record["recipe"]["title"])))
        rows.append(("engine", f"{record['engine']['name']}, mquant {record['mquant']}"))
        rows.append(("made from", ", ".join(f"{k} {v}" for k, v in record["source"].items())))
    except (KeyError, TypeError, AttributeError):
        pass  # another tool wrote the checkpoint
    return [(name, value) for name, value in rows if value]


def _sizes(
    checkpoint: Checkpoint, parent: Checkpoint | None, families: Mapping[str, Family]
) -> list[Size]:
    before: dict[str, int] = defaultdict(int)
    if parent is not None:
        before.update({portion.name: portion.bytes for portion in inspect(parent, families).roles})
    return [
        Size(portion.name, portion.tensors, before[portion.name] if parent else None, portion.bytes)
        for portion in inspect(checkpoint, families).roles
    ]


def _text(source: Source, path: str, most: int = _MOST_SHOWN) -> str:
    if not 0 < source.files.get(path, 0) <= most:
        return ""
    return source.read(path).decode("utf-8", "replace")


def _commands(inputs: Wanted, page: str) -> list[str]:
    against = ["--against", inputs.against] if inputs.against else []
    commands = [["pip", "install", f"mquant=={__version__}"]]
    commands.append(["mquant", "verify", inputs.src, *against])
    if against:
        commands.append(["mquant", "compare", inputs.src, *against])
    text: list[str] = []
    if inputs.text is not None:
        text = ["--text", str(inputs.text), "--context", str(inputs.context)]
        text += ["--tokens", str(inputs.tokens)]
        commands.append(["mquant", "eval", inputs.src, *against, *text])
    commands.append(["mquant", "report", inputs.src, *against, *text, "-o", page])
    return [shlex.join(command) for command in commands]
