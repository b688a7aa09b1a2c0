"""A verification as JUnit XML, which CI systems show: one test case for each rule."""

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mquant.cli.interrupt import INTERRUPTED, received
from mquant.errors import MquantError, OutputError, UsageError
from mquant.text import clean

if TYPE_CHECKING:
    from mquant.findings import Finding
    from mquant.verify.judge import Report

_MARK: Final = b"?>\n<testsuite name="  # no JSON, and no comment of YAML, has these two lines
_TAGS = {"tests": "testcase", "failures": "failure", "skipped": "skipped", "errors": "error"}


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
        self._suite.attrib.update({key: str(counts[tag]) for key, tag in _TAGS.items()})
        text: bytes = ET.tostring(self._suite, encoding="utf-8", xml_declaration=True)
        return text + b"\n"

    def _case(self, group: str, name: str) -> ET.Element:
        return ET.SubElement(self._suite, "testcase", classname=f"mquant.{group}", name=name)


def forget(path: Path | None) -> Path | None:
    """Remove an earlier report as soon as the option is read: other options may be wrong."""
    if path is not None:
        from mquant.output import Document

        with suppress(OutputError):
            Document(path, "--junit", _MARK).remove()
    return path


@contextmanager
def junit(path: Path | None, name: str) -> Iterator[JUnit]:
    """Give the report to be filled in, and write the report to `path`, however the block ends.

    A report without a verdict replaces the file of an earlier run first, so that no run that is
    killed leaves a verdict. After a UsageError there is no file. Raises OutputError as `Document`
    does.
    """
    report = JUnit(name)
    if path is None:
        yield report
        return
    from mquant.output import Document

    document = Document(path, "--junit", _MARK)
    document.check()
    if not document.is_stream:
        started = JUnit(name)
        started.error("The run ended before the verdict.", "Run the command again.")
        document.write([started.to_xml()])
    try:
        yield report
    except UsageError:
        document.remove()
        raise
    except BaseException as error:
        report.error(*_why(error))
        document.write([report.to_xml()])
        raise
    document.write([report.to_xml()])


def _why(error: BaseException) -> tuple[str, str]:
    """Why there is no verdict, and what to do."""
    if received() or isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, ""
    if isinstance(error, MquantError):
        return error.message, error.fix
    return f"{type(error).__name__}: {error}", "Please report this."


def _text(finding: "Finding") -> str:
    lines = (f"{finding.where}: {finding.message}", finding.fix)
    return "\n".join(clean(line) for line in lines)
