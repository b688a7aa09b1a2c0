"""Every verb that writes is killed at a few operations; scripts/kill_everywhere.py kills at all."""

import shutil
from collections.abc import Iterator

import pytest

from kill_cases import CASES, Case
from kill_everywhere import Killer, Numbers, half_made

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler, cc")


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    """One fork server, with the inputs of all verbs."""
    with Killer() as killer:
        yield killer


@pytest.mark.parametrize("case", [case for case in CASES if case.sampled], ids=lambda c: c.verb)
def test_a_killed_verb_leaves_nothing_half_made_and_can_be_run_again(
    killer: Killer, case: Case
) -> None:
    tally = killer.try_case(case, Numbers(sample=1))
    assert tally.faults == []
    assert tally.kills > 0


def test_a_half_made_checkpoint_is_found() -> None:
    before, after = {"config.json": "old", "a": "1"}, {"config.json": "new", "a": "2", "b": "3"}
    for whole in (before, after, {"a": "2"}, {**after, "more": "4"}):
        assert not [*half_made(whole, before, after, gone=False)]
    (fault,) = half_made({"config.json": "new", "a": "1"}, {}, after, gone=False)
    assert fault == "looks whole, and is half-made: !a -b"


def test_a_half_made_document_is_found() -> None:
    before, after = {"": "old"}, {"": "new"}
    assert not [*half_made(before, before, after, gone=False)]
    assert not [*half_made({}, {}, after, gone=False)]
    assert not [*half_made({}, before, after, gone=True)]
    assert [*half_made({}, before, after, gone=False)]
    assert [*half_made({"": "torn"}, before, after, gone=True)]
