"""`verify` finds the findings of every corpus case, and agrees with vLLM's verdict.

scripts/test-loaders.sh recorded vLLM's verdicts, and fails if a verdict changes.
"""

import json
from pathlib import Path

import pytest

from corpus import Case
from corpus_found import CASES
from mquant.checkpoint import Folder
from mquant.family_files import load_families
from mquant.verify.judge import Depth, verify
from run import TRAINED, quantize_nvfp4

ROOT = Path(__file__).parents[2]
VERDICTS = json.loads((ROOT / "tests/data/vllm-verdicts.json").read_text("utf-8"))["verdicts"]


@pytest.fixture(scope="session")
def fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("corpus") / "good", shard_bytes=10**6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_has_its_findings_and_agrees_with_vllm(
    fixture: Path, tmp_path: Path, case: Case
) -> None:
    report = verify(Folder(case.make(fixture, tmp_path)), load_families(), Depth.NUMBERS)
    assert case.rules <= {finding.rule for finding in report.findings}
    assert bool(report.count("error")) == case.is_wrong(VERDICTS[case.name]["verdict"])
    if not case.rules:
        assert {finding.severity for finding in report.findings} <= {"info"}


def test_no_two_cases_have_one_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


def test_the_table_in_the_docs_has_every_case() -> None:
    page = (ROOT / "docs/loaders.md").read_text("utf-8")
    assert page.startswith((ROOT / "scripts/loaders.md").read_text("utf-8"))
    table = page.partition("| case |")[2].splitlines()[2:]
    assert [row.split(" | ")[0][2:] for row in table] == [case.name for case in CASES]
    assert VERDICTS.keys() == {case.name for case in CASES}
