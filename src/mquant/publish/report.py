"""Every measurement of a checkpoint, made now or before, as one HTML file."""

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
from mquant.measure.evaluation import CONTEXT, TOKENS, evaluate
from mquant.output.document import Document
from mquant.output.finish import RECIPE_NAME
from mquant.output.record import read_table
from mquant.publish.page import Evidence, render
from mquant.publish.page.sections import Size
from mquant.untrusted import parse_json
from mquant.verify.inspect import inspect
from mquant.verify.judge import Report, verify

MARK: Final = b": mquant report</title>"
_MOST_SHOWN: Final = 20_000  # characters of a recipe: more is no recipe


@dataclass(frozen=True)
class Wanted:
    """The inputs of a report.

    `comparison` and `evaluation` are files that `mquant compare` and `mquant eval` wrote with
    `--format json`. Without the files both are measured, if there is a parent, and a text. `src`
    and `against` are the names that the user typed.
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
    """The bytes of the written page, and the page's content."""

    bytes: int
    verification: Report
    comparison: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None


def report(
    source: Source,
    parent: Source | None,
    families: Mapping[str, Family],
    wanted: Wanted,
    document: Document,
    *,
    emit: Emit = silent,
) -> Made:
    """Measure what is not measured yet, and write the page to `document`.

    Raises SourceError if an input cannot be read, or describes another checkpoint; OutputError as
    `Document` does.
    """
    document.check()
    compared = _given(wanted.comparison, "compare", source)
    evaluated = _given(wanted.evaluation, "eval", source)
    judged = verify(source, families, None, parent, emit)
    if compared is None and parent is not None:
        compared = compare(source, parent, families, emit=emit).to_json()
    if evaluated is None and wanted.text is not None:
        evaluated = evaluate(
            source,
            parent,
            families,
            wanted.text,
            context=wanted.context,
            tokens=wanted.tokens,
            emit=emit,
        ).to_json()
    mine = open_checkpoint(source, tolerant=True)
    reference = open_checkpoint(parent) if parent else None
    evidence = Evidence(
        name=source.name,
        parent=parent.name if parent else _parent_of(compared, evaluated),
        verdict=judged.verdict,
        severity=_severity(judged),
        facts=_facts(mine, judged, families),
        sizes=_sizes(mine, reference, families),
        findings=judged.findings,
        recipe=_text(source, RECIPE_NAME),
        commands=_commands(wanted, str(document.path)),
        made_by=f"mquant {__version__}",
        comparison=compared,
        evaluation=evaluated,
    )
    try:
        page = render(evidence)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if wanted.comparison is None and wanted.evaluation is None:
            raise
        given = " or ".join(str(each) for each in (wanted.comparison, wanted.evaluation) if each)
        raise SourceError(
            f"{given} is not what this mquant writes: {type(error).__name__} {error}.",
            "Make it again with --format json.",
        ) from error
    raw = page.encode()
    document.write([raw])
    return Made(len(raw), judged, compared, evaluated)


def _severity(judged: Report) -> str:
    worst = judged.findings[0].severity if judged.findings else "info"
    return "warning" if judged.undecided and worst == "info" else worst


def _given(path: Path | None, verb: Literal["compare", "eval"], source: Source) -> Any:
    if path is None:
        return None
    try:
        found = parse_json(path.read_bytes())
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("schema") != f"mquant.{verb}/1":
        raise SourceError(
            f"{path} is not the JSON of mquant {verb}.",
            f"Make it with: mquant {verb} --format json",
        )
    if "error" in found or found.get("source") != source.name:
        whose = f"of {found['source']}" if found.get("source") else "of a run that failed"
        raise SourceError(f"{path} is {whose}, not of {source.name}.", "Make it again.")
    return found


def _parent_of(*documents: Mapping[str, Any] | None) -> str | None:
    names = (document.get("parent") for document in documents if document)
    return next((name for name in names if isinstance(name, str)), None)


def _facts(
    checkpoint: Checkpoint, judged: Report, families: Mapping[str, Family]
) -> list[tuple[str, str]]:
    found = inspect(checkpoint, families)
    rows = [
        ("family", found.family or f"unknown ({found.model_type})"),
        ("quantization", found.quantization or "none"),
        ("quantized modules", f"{judged.quantized:,}"),
        ("tensors", f"{found.tensors:,} in {found.shards:,} shards"),
        ("layers", "" if found.layers is None else f"{found.layers:,}"),
        ("experts", "" if found.experts is None else f"{found.experts:,}"),
    ]
    made = read_table(checkpoint.source)
    try:
        rows.append(("recipe", str(made["recipe"]["title"])))
        rows.append(("engine", f"{made['engine']['name']}, mquant {made['mquant']}"))
        rows.append(("made from", ", ".join(f"{k} {v}" for k, v in made["source"].items())))
    except (KeyError, TypeError, AttributeError):
        pass  # another tool made it
    return [(name, value) for name, value in rows if value]


def _sizes(
    mine: Checkpoint, reference: Checkpoint | None, families: Mapping[str, Family]
) -> list[Size]:
    before: dict[str, int] = defaultdict(int)
    if reference is not None:
        before.update({each.name: each.bytes for each in inspect(reference, families).roles})
    return [
        Size(each.name, each.tensors, before[each.name] if reference else None, each.bytes)
        for each in inspect(mine, families).roles
    ]


def _text(source: Source, path: str, most: int = _MOST_SHOWN) -> str:
    if not 0 < source.files.get(path, 0) <= most:
        return ""
    return source.read(path).decode("utf-8", "replace")


def _commands(wanted: Wanted, page: str) -> list[str]:
    against = ["--against", wanted.against] if wanted.against else []
    commands = [["pip", "install", f"mquant=={__version__}"]]
    commands.append(["mquant", "verify", wanted.src, *against])
    if against:
        commands.append(["mquant", "compare", wanted.src, *against])
    text: list[str] = []
    if wanted.text is not None:
        text = ["--text", str(wanted.text), "--context", str(wanted.context)]
        text += ["--tokens", str(wanted.tokens)]
        commands.append(["mquant", "eval", wanted.src, *against, *text])
    commands.append(["mquant", "report", wanted.src, *against, *text, "-o", page])
    return [shlex.join(command) for command in commands]
