"""Helpers of the tests of ignore lists."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from make import Edit, make_checkpoint
from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.loader_model.modules import read_modules
from mquant.verify.ignore_report import IgnoreReport, check_ignore


@pytest.fixture
def judge(tmp_path: Path) -> Callable[..., IgnoreReport]:
    """Return a function that writes a checkpoint and judges its ignore list."""

    def judged(edit: Edit | None, config: Any = ..., **keys: Any) -> IgnoreReport:
        keys |= {"quantization_config": config}
        folder = make_checkpoint(tmp_path / "model", edit=edit, config=keys)
        return check_ignore(read_modules(open_checkpoint(Folder(folder)), load_families()))

    return judged


Judge = Callable[..., IgnoreReport]


def rules(report: IgnoreReport) -> dict[str, str]:
    """Return the severity of each finding, by its rule."""
    return {finding.rule: finding.severity for finding in report.findings}


def message(report: IgnoreReport, rule: str) -> str:
    """Return the message of a rule's only finding, which says how to mend the fault."""
    (finding,) = [finding for finding in report.findings if finding.rule == rule]
    assert finding.fix
    return finding.message
