"""Locks decide which of several processes may begin a run or a share in one OUT.

Threads stand in for processes: an open file holds a lock, not a process.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest

from mquant.errors import OutputError
from mquant.output import (
    LEDGER,
    SHARES,
    Ledger,
    SharedRun,
    State,
    claim,
    delete_share_files,
    examine,
    folder_lock,
    ledger_name,
    look,
    read_ledger,
    read_shared_run,
    take_share,
)

RUN = {"source": "aa", "plan": "bb"}
JOINT = SharedRun(16, RUN, {"what": "ever"})
ROUNDS = 10


def at_once(*tasks: Callable[[], object]) -> list[object]:
    """Return what each task returns or raises, if all tasks begin at the same moment."""
    ready = Barrier(len(tasks))

    def run(task: Callable[[], object]) -> object:
        ready.wait()
        try:
            return task()
        except OutputError as error:
            return error

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(run, tasks))


def test_a_claim_is_read_back(tmp_path: Path) -> None:
    assert look(tmp_path / "out", [], JOINT) is State.FREE
    assert not (tmp_path / "out").exists()
    assert claim(tmp_path / "out", [], JOINT) is State.UNFINISHED
    assert read_shared_run(tmp_path / "out") == JOINT
    assert [path.name for path in (tmp_path / "out").iterdir()] == [SHARES]


def test_shares_that_begin_at_once_are_all_taken(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        out = tmp_path / f"out-{number}"
        ledgers = at_once(*(partial(take_share, out, [], JOINT, n) for n in range(1, 17)))
        assert all(isinstance(ledger, Ledger) for ledger in ledgers), ledgers
        for ledger in ledgers:
            assert isinstance(ledger, Ledger)
            ledger.begin(RUN, ["a.safetensors"], afresh=True)
            ledger.release()
        assert not (out / LEDGER).exists()


def test_a_whole_run_and_a_share_that_begin_at_once_exclude_each_other(tmp_path: Path) -> None:
    def whole(out: Path) -> None:
        examine(out, [], RUN, restart=False)
        ledger = Ledger(out)
        try:
            examine(out, [], RUN, restart=False)
            ledger.begin(RUN, ["a.safetensors"], afresh=True)
        finally:
            ledger.release()

    def share(out: Path) -> None:
        ledger = take_share(out, [], JOINT, 1)
        assert ledger is not None
        ledger.release()

    for number in range(ROUNDS):
        out = tmp_path / f"out-{number}"
        at_once(partial(whole, out), partial(share, out))
        made_whole = read_ledger(out) is not None
        assert made_whole != (out / SHARES).exists()


def test_no_share_begins_during_the_finish_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mquant.output.shared_run._TURN_SECONDS", 0.1)
    claim(tmp_path, [], JOINT)
    with folder_lock(tmp_path), pytest.raises(OutputError, match="Another mquant is writing"):
        take_share(tmp_path, [], JOINT, 1)
    assert not (tmp_path / ledger_name(1, 16)).exists()
    delete_share_files(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_share_is_awaited(tmp_path: Path) -> None:
    first = take_share(tmp_path, [], JOINT, 1)
    assert first is not None
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(take_share, tmp_path, [], JOINT, 1, patience=60.0)
        assert not second.done()
        first.release()
        ledger = second.result()
    assert ledger is not None
    ledger.release()
