"""The origin of a checkpoint: how it was made and repaired, its companions, its licence."""

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mquant.output import Record
from mquant.publish.card.facts import Card
from mquant.publish.card.markdown import block, code, table, text
from mquant.text import names, plural

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def made(card: Card) -> str:
    """Return the section on how the checkpoint was made and repaired; empty without a record."""
    record = card.record
    if record is None:
        return ""
    versions = "".join(f", {text(name)} {text(v)}" for name, v in sorted(record.versions.items()))
    engine = f", its engine {code(record.engine)}{versions}" if record.engine else ""
    parts = [f"## How it was made\n\nBy mquant {text(record.mquant)}{engine}.\n"]
    if record.recipe:
        parts.append(block([_command(card, record)], "sh"))
        parts.append(
            "The same command gives the same bytes for every tensor; `--max-shard-size` decides "
            "where shards end.\n"
        )
        for key, value in record.inputs.items():
            verb = "has the sha256" if _SHA256.fullmatch(value) else "is the dataset"
            parts.append(f"{code(key.upper())} {verb} {code(value)}.\n")
    if sentence := _cast(record.cast):
        parts.append(f"{sentence}\n")
    if content := record.source.get("content"):
        parts.append(f"The parent's files, sampled, have the sha256 {code(content)}.\n")
    if record.repairs:
        rows = [_repair(number, repair) for number, repair in enumerate(record.repairs, start=1)]
        parts.append("### Changes since\n")
        parts.append(table(("", "By", "What was found", "What was done"), rows))
    return "\n".join(parts)


def _cast(cast: Mapping[str, Any]) -> str:
    """Return what the cast from MXFP4 kept; empty if nothing was cast, or for unusable counts."""
    blocks, lossless = cast.get("blocks"), cast.get("lossless")
    if type(blocks) is not int or type(lossless) is not int or not 0 <= lossless <= blocks:
        return ""
    lost = blocks - lossless
    again = f" Rounded again: {plural(lost, 'block')}." if lost else ""
    return (
        "Weights that the parent stores in MXFP4 became NVFP4 with the same codes, lossless: "
        f"{lossless:,} of {blocks:,} blocks of 16 weights are equal to the parent's.{again}"
    )


def _command(card: Card, record: Record) -> str:
    folder = f"./{card.parent.name}" if card.parent.name else "PARENT"
    parent = card.parent.repo or record.source.get("repo") or card.about.base_model or folder
    commit = card.parent.commit or record.source.get("commit", "")
    words = ["mquant", "quantize", parent]
    words += ["--revision", commit] if commit else []
    words += ["--recipe", record.recipe]
    words += ["--engine", record.engine] if record.engine == "oneshot" else []
    for key in record.inputs:
        words += [f"--{key}", key.upper()]
    return shlex.join([*words, "-o", card.repo.rpartition("/")[2]])


def _repair(number: int, repair: Mapping[str, Any]) -> tuple[str, str, str, str]:
    findings = repair.get("findings")
    rules = [
        finding["rule"]
        for finding in (findings if isinstance(findings, list) else [])
        if isinstance(finding, dict) and isinstance(finding.get("rule"), str)
    ]
    by = repair.get("mquant")
    return (
        f"{number}",
        f"mquant {text(by)}" if isinstance(by, str) else "",
        ", ".join(map(code, dict.fromkeys(rules))) or "not recorded",
        "; ".join(_done(repair)) or "config.json and side files",
    )


def _done(repair: Mapping[str, Any]) -> Iterator[str]:
    replaced = repair.get("replaced")
    for role, count in (replaced if isinstance(replaced, dict) else {}).items():
        if type(count) is int and isinstance(role, str):
            yield f"{plural(count, 'tensor')} of {text(role)} made again from the parent"
    if type(renamed := repair.get("renamed")) is int and renamed:
        yield f"{plural(renamed, 'tensor')} renamed"
    dropped = repair.get("dropped")
    dropped = dropped if isinstance(dropped, list) else []
    left_out = [name for name in dropped if isinstance(name, str)]
    if left_out:
        yield f"left out: {text(names(left_out))}"


def sources(card: Card) -> str:
    """Return the sections on companions, citation and licence, as far as these are known."""
    return "\n".join([*_companions(card), *_citation(card), *_licence(card)])


def _companions(card: Card) -> Iterator[str]:
    if card.about.companions:
        rows = (
            (f"[{text(entry.repo)}](https://huggingface.co/{entry.repo})", text(entry.what))
            for entry in card.about.companions
        )
        yield "## Related\n\n" + table(("Repo", ""), rows)


def _citation(card: Card) -> Iterator[str]:
    if card.about.citation.strip():
        yield "## Citation\n\n" + block(card.about.citation.strip().splitlines())


def _licence(card: Card) -> Iterator[str]:
    parent = card.parent
    licence = parent.license_name or parent.license
    if licence:
        yield f"## Licence\n\n{code(licence)}, the same as {text(parent.repo) or 'the parent'}.\n"
    elif card.license_file:
        yield f"## Licence\n\nSee {code(card.license_file)} among the files.\n"
