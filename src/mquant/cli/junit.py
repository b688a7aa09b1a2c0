"""A verification as JUnit XML, which every CI system shows: a test case for each rule."""

import xml.etree.ElementTree as ET
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from mquant.cli.text import clean
from mquant.errors import OutputError

if TYPE_CHECKING:
    from mquant.findings import Finding
    from mquant.verify.judge import Report


def write_junit(path: Path, report: "Report", failing: Collection[str]) -> None:
    """Write a report: a rule that `failing` findings break fails, other warnings are skipped.

    A rule that nothing breaks passes, where what it needs was looked at; so does one that has only
    something to tell. Raises OutputError.
    """
    from mquant.findings import RULES

    looked = {"loader" if checked == "vllm" else checked for checked in report.checked}
    suite = ET.Element("testsuite", name=f"mquant verify {clean(report.source)}")
    counts = {"tests": 0, "failures": 0, "skipped": 0}
    for rule in sorted(RULES.values(), key=lambda rule: (rule.needs, rule.id)):
        broken = [found for found in report.findings if found.rule == rule.id]
        if not broken and rule.needs not in looked:
            continue
        case = ET.SubElement(suite, "testcase", classname=f"mquant.{rule.needs}", name=rule.id)
        counts["tests"] += 1
        if broken and broken[0].severity == "info":
            ET.SubElement(case, "system-out").text = "\n".join(map(_text, broken))
        elif broken:
            kind = "failure" if broken[0].severity in failing else "skipped"
            counts["failures" if kind == "failure" else "skipped"] += 1
            told = ET.SubElement(case, kind, message=clean(broken[0].message))
            told.text = "\n".join(map(_text, broken))
    suite.attrib.update({key: str(value) for key, value in counts.items()})
    try:
        path.write_bytes(ET.tostring(suite, encoding="utf-8", xml_declaration=True) + b"\n")
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}.", "Give another file with --junit."
        ) from error


def _text(finding: "Finding") -> str:
    lines = (f"{finding.where}: {finding.message}", finding.fix)
    return "\n".join(clean(line) for line in lines)


__all__ = ["write_junit"]
