"""Shares that do not fit each other or the folder OUT are refused by name."""

import json
import os
from functools import partial
from pathlib import Path

import pytest

from judges import hashes
from make import make_checkpoint
from mquant import __version__
from mquant.errors import InUse, MquantError, OutputError, SourceError, UsageError
from mquant.events import Event, Progress
from mquant.output import SHARES, ledger_name
from mquant.runs.quantize import quantize
from mquant.runs.shares import finish_shares
from mquant.text import size
from run import plan_of, quantize_nvfp4, shares_of
from share_runs import SMALL, copy, done, expected, refused, src

__all__ = ["done", "expected", "src"]


def test_a_missing_share_is_named_and_nothing_changes(
    src: Path, done: Path, tmp_path: Path
) -> None:
    out, run = copy(done, tmp_path / "out"), shares_of(src, done, 3, SMALL)
    for number in (1, 3):
        (out / ledger_name(number, 3)).unlink()
    before = hashes(out)
    error = refused(OutputError, finish_shares, out)
    left = sum(run.parts[index].source_bytes for index in (0, 2)) / 1000
    total = run.spec.plan.source_bytes / 1000
    assert error.message == (
        f"Shares 1 and 3 of 3 are not done: {left:.1f} kB of {total:.1f} kB are still to be read."
    )
    assert error.fix == (
        "Run the same mquant quantize with --share 1/3 and so on, or with --cluster ray; "
        "then run mquant finish again."
    )
    assert hashes(out) == before


@pytest.mark.parametrize("fault", ["cut", "gone", "digest", "touched"])
def test_a_share_is_not_done_if_its_shard_its_digest_or_its_source_changed(
    src: Path, tmp_path: Path, fault: str
) -> None:
    out, source = tmp_path / "out", copy(src, tmp_path / "src")
    for number in (1, 2, 3):
        shares_of(source, out, 3, SMALL).make(number)
    shard, ledger = min(out.glob("*.safetensors")), out / ledger_name(1, 3)
    if fault == "cut":
        os.truncate(shard, 100)
    elif fault == "gone":
        shard.unlink()
    elif fault == "digest":
        ledger.write_text(ledger.read_text().replace('"sha256": "', '"sha256": "x'))
    else:
        os.utime(source / "model-00001-of-00003.safetensors", (1, 1))
    error = refused(OutputError, finish_shares, out)
    assert error.message.startswith(("Share 1 of 3 is not done: ", "Shares 1 and 2 of 3 are "))


@pytest.mark.parametrize("fault", ["changed", "gone"])
def test_a_shard_that_changed_after_its_share_is_named_and_its_share_makes_it_again(
    src: Path, done: Path, expected: dict[str, str], tmp_path: Path, fault: str
) -> None:
    out, run = copy(done, tmp_path / "out"), shares_of(src, done, 3, SMALL)
    planned = run.parts[1].shards[0]
    shard = out / planned.name
    if fault == "changed":
        shard.write_bytes(bytes(planned.file_bytes))
    else:
        shard.unlink()
    left = size(sum(unit.source_bytes for unit in planned.units))
    total = size(run.spec.plan.source_bytes)

    error = refused(OutputError, finish_shares, out)
    assert error.message == (
        f"Share 2 of 3 is not done: {left} of {total} are still to be read. "
        f"{shard.name} is gone or not as recorded."
    )
    assert error.fix.startswith("Run the same mquant quantize with --share 2/3, ")
    assert shares_of(src, out, 3, SMALL).make(2)
    finish_shares(out)
    assert hashes(out) == expected


def test_a_share_has_one_process_and_other_shares_run_beside_it(
    src: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out, errors = tmp_path / "out", list[MquantError]()

    def emit(event: Event) -> None:
        if isinstance(event, Progress) and not errors:
            errors.append(refused(InUse, shares_of(src, out, 2, SMALL).make, 1))
            shares_of(src, out, 2, SMALL).make(2)
            errors.append(refused(OutputError, finish_shares, out))

    shares_of(src, out, 2, SMALL).make(1, workers=1, emit=emit)
    assert errors[0].message == f"Another mquant is making share 1 of 2 in {out}."
    assert errors[1].message.startswith("Share 1 of 2 is not done: ")
    finish_shares(out)
    assert hashes(out) == expected


def test_another_number_of_shares_is_refused(src: Path, done: Path, tmp_path: Path) -> None:
    error = refused(OutputError, shares_of(src, done, 4, SMALL).make, 1)
    assert error.message == f"{done} is being made in 3 shares, not in 4."


def test_another_plan_is_refused_with_both_values(src: Path, done: Path) -> None:
    error = refused(OutputError, shares_of(src, done, 3, SMALL, "fp8-dynamic").make, 1)
    assert error.message.startswith(f"{done} was made from something else: plan was ")


def test_another_mquant_is_refused(src: Path, done: Path, tmp_path: Path) -> None:
    out = copy(done, tmp_path / "out")
    (out / SHARES).write_text((out / SHARES).read_text().replace(__version__, "9.9.9"))
    for run in (partial(shares_of(src, out, 3, SMALL).make, 1), partial(finish_shares, out)):
        error = refused(OutputError, run)
        assert error.message == f"{out} was begun by mquant 9.9.9, this is mquant {__version__}."


@pytest.mark.parametrize("restart", [False, True])
def test_a_whole_run_into_shares_is_refused(src: Path, done: Path, *, restart: bool) -> None:
    plan = plan_of(src, max_shard_bytes=SMALL)
    with pytest.raises(OutputError) as caught:
        quantize(plan, done, restart=restart)
    assert caught.value.message == f"{done} is being made in shares."
    assert f"mquant finish {done}" in caught.value.fix


def test_shares_into_a_whole_run_are_refused(src: Path, tmp_path: Path) -> None:
    out, messages = tmp_path / "out", list[str]()

    def emit(event: Event) -> None:
        if isinstance(event, Progress) and not messages:
            messages.append(refused(OutputError, shares_of(src, out, 2, SMALL).make, 1).message)
            messages.append(refused(OutputError, finish_shares, out).message)

    quantize_nvfp4(src, out, emit, SMALL, workers=1)
    assert messages == [
        f"{out} is being made as a whole, not in shares.",
        f"{out} holds no shares to finish.",
    ]


def test_shares_into_a_folder_of_another_tool_are_refused(src: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    error = refused(OutputError, shares_of(src, tmp_path, 2, SMALL).make, 1)
    assert error.message == f"{tmp_path} is not empty, and mquant did not make it."
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_calibrated_recipes_have_no_shares(src: Path, tmp_path: Path) -> None:
    error = refused(UsageError, shares_of, src, tmp_path, 2, SMALL, "nvfp4-gptq")
    assert "sends data through the whole model" in error.message


def test_finish_needs_the_source(done: Path, tmp_path: Path) -> None:
    out = copy(done, tmp_path / "out")
    table = json.loads((out / SHARES).read_text())
    table["order"]["source"]["folder"] = str(tmp_path / "moved")
    (out / SHARES).write_text(json.dumps(table))
    error = refused(SourceError, finish_shares, out)
    assert error.message == f"{tmp_path / 'moved'} does not exist."


def test_finish_refuses_another_source(done: Path, tmp_path: Path) -> None:
    out = copy(done, tmp_path / "out")
    table = json.loads((out / SHARES).read_text())
    table["order"]["source"]["folder"] = str(make_checkpoint(tmp_path / "other", seed=9))
    (out / SHARES).write_text(json.dumps(table))
    error = refused(OutputError, finish_shares, out)
    assert error.message.startswith(f"{out} was made from something else: content was ")
