"""A verification as JUnit XML, which CI systems show: one test case for each rule."""

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mquant.cli.output import INTERRUPTED
from mquant.errors import MquantError, OutputError, UsageError
from mquant.text import clean

if TYPE_CHECKING:
    from mquant.findings import Finding
    from mquant.verify.judge import Report

_FIX: Final = "Give another file with --junit."
_KINDS: Final = {
    "tests": "testcase",
    "failures": "failure",
    "skipped": "skipped",
    "errors": "error",
}


class JUnit:
    """The JUnit report of one run of a verb: one suite and the test cases known so far."""

    def __init__(self, name: str) -> None:
        self._suite = ET.Element("testsuite", name=f"mquant verify {clean(name)}")

    def add(self, report: "Report", failing: Collection[str]) -> None:
        """Add a test case for each rule of `mquant verify`.

        A case fails if a finding of the rule has a severity in `failing`, and passes with the
        findings as output if they have other severities. A case whose rule was not judged is
        skipped.
        """
        from mquant.findings import RULES, VERIFIED

        rules = (rule for rule in RULES.values() if rule.needs in VERIFIED)
        for rule in sorted(rules, key=lambda rule: (rule.needs, rule.id)):
            case = self._case(rule.needs, rule.id)
            broken = [finding for finding in report.findings if finding.rule == rule.id]
            text = "\n".join(map(_text, broken))
            if any(finding.severity in failing for finding in broken):
                ET.SubElement(case, "failure", message=clean(broken[0].message)).text = text
            elif broken:
                ET.SubElement(case, "system-out").text = text
            elif why := report.not_judged.get(rule.id):
                ET.SubElement(case, "skipped", message=clean(why))

    def error(self, message: str, fix: str) -> None:
        """Add a test case that says why the verb reached no verdict."""
        case = self._case("verify", "verdict")
        ET.SubElement(case, "error", message=clean(message)).text = clean(fix)

    def to_xml(self) -> bytes:
        """Return the whole XML file."""
        counts = Counter(element.tag for element in self._suite.iter())
        self._suite.attrib.update({key: str(counts[tag]) for key, tag in _KINDS.items()})
        text: bytes = ET.tostring(self._suite, encoding="utf-8", xml_declaration=True)
        return text + b"\n"

    def _case(self, group: str, name: str) -> ET.Element:
        return ET.SubElement(self._suite, "testcase", classname=f"mquant.{group}", name=name)


@contextmanager
def junit(path: Path | None, name: str) -> Iterator[JUnit]:
    """Yield the report to fill in, and write the report to `path` however the block ends.

    The file of an earlier run is removed first. A UsageError leaves no file. Raises
    OutputError if the file cannot be removed or written.
    """
    report = JUnit(name)
    if path is None:
        yield report
        return
    from mquant.output.disk import write_document

    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.", _FIX) from error
    try:
        yield report
    except UsageError:
        raise
    except MquantError as error:
        report.error(error.message, error.fix)
        write_document(path, [report.to_xml()], _FIX)
        raise
    except KeyboardInterrupt:
        report.error(INTERRUPTED, "")
        write_document(path, [report.to_xml()], _FIX)
        raise
    except Exception as error:
        report.error(f"{type(error).__name__}: {error}", "Please report this.")
        write_document(path, [report.to_xml()], _FIX)
        raise
    write_document(path, [report.to_xml()], _FIX)


def _text(finding: "Finding") -> str:
    lines = (f"{finding.where}: {finding.message}", finding.fix)
    return "\n".join(clean(line) for line in lines)
