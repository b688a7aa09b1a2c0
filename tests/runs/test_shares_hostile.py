"""Wrong or hostile files in the OUT of a run in shares do no harm."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from judges import hashes
from mquant.errors import MquantError, OutputError
from mquant.output import LEDGER, SHARES, ledger_name
from mquant.runs.shares import finish_shares
from run import quantize_nvfp4, shares_of
from share_runs import SMALL, copy, done, expected, refused, src

__all__ = ["done", "expected", "src"]


def edited(**changes: Any) -> Any:
    return lambda table: {**table, **changes}


def ordered(**changes: Any) -> Any:
    return lambda table: {**table, "order": {**table["order"], **changes}}


@pytest.mark.parametrize(
    "edit",
    [
        edited(schema="mquant.shares/2"),
        edited(mquant=None),
        edited(of=0),
        edited(of=10**9),
        edited(of="3"),
        edited(fingerprint=[]),
        edited(order=None),
        edited(order={}),
        ordered(source={"folder": "src"}),
        ordered(source={"folder": "/a\0b"}),
        ordered(source={"folder": "/" + "x" * 300}),
        ordered(source={"repo": "org/model", "commit": "main"}),
        ordered(max_shard_bytes=0),
        ordered(max_shard_bytes=10**30),
        ordered(importance="importance.safetensors"),
        ordered(importance="/nowhere/importance.safetensors"),
        ordered(recipe={"name": "x", "suffix": "../x", "roles": {}}),
        ordered(more="keys"),
        lambda table: [table],
        lambda table: "[" * 100_000,
    ],
)
def test_a_wrong_record_of_shares_is_one_sentence(done: Path, tmp_path: Path, edit: Any) -> None:
    out = copy(done, tmp_path / "out")
    value = edit(json.loads((out / SHARES).read_text()))
    (out / SHARES).write_text(value if isinstance(value, str) else json.dumps(value))
    before = hashes(out)
    refused(MquantError, finish_shares, out)
    assert hashes(out) == before


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_record_of_shares_is_a_file(src: Path, done: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if kind == "link":
        (out / SHARES).symlink_to(done / SHARES)
    elif kind == "pipe":
        os.mkfifo(out / SHARES)
    else:
        (out / SHARES).mkdir()
    error = refused(OutputError, finish_shares, out)
    assert error.message == f"{out / SHARES} is not a file that mquant wrote."
    refused(OutputError, shares_of(src, out, 3, SMALL).make, 1)
    refused(OutputError, quantize_nvfp4, src, out)


def test_a_ledger_of_another_run_is_ignored(
    src: Path, expected: dict[str, str], done: Path, tmp_path: Path
) -> None:
    out = copy(done, tmp_path / "out")
    ledger = out / ledger_name(2, 3)
    ledger.write_text(ledger.read_text().replace('"plan": "', '"plan": "0'))
    (out / "mine.txt").write_text("kept")
    assert shares_of(src, out, 3, SMALL).make(2)
    finish_shares(out)
    assert (out / "mine.txt").read_text() == "kept"
    (out / "mine.txt").unlink()
    assert hashes(out) == expected


def test_a_ledger_cannot_have_files_deleted(src: Path, done: Path, tmp_path: Path) -> None:
    out = copy(done, tmp_path / "out")
    shard = min(out.glob("*.safetensors"))  # a shard of another share
    names = ["../victim", shard.name, "mine.txt"]
    head = {"schema": "mquant.run/2", "fingerprint": {}, "files": names}
    (out / ledger_name(2, 3)).write_text(json.dumps(head) + "\n")
    for name in ("mine.txt", "../victim"):
        (out / name).write_text("years of work")
    first = shard.read_bytes()
    shares_of(src, out, 3, SMALL).make(2)
    assert shard.read_bytes() == first
    assert (tmp_path / "victim").read_text() == (out / "mine.txt").read_text() == "years of work"


def test_a_claim_that_was_cut_off_leaves_out_free(src: Path, tmp_path: Path) -> None:
    for name in (LEDGER, ledger_name(1, 2), SHARES + ".partial"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("")
    assert shares_of(src, tmp_path / "out", 2, SMALL).make(1)


def test_a_disk_without_locks_is_one_sentence(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr("fcntl.flock", flock)
    error = refused(OutputError, shares_of(src, tmp_path / "out", 2, SMALL).make, 1)
    assert error.message.endswith("cannot be locked: Function not implemented.")
