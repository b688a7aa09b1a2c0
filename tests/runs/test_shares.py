"""Many processes write one checkpoint, each its share, and `finish` completes the checkpoint."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fakehub import FakeHub, hub
from judges import hashes
from killed import finish_and_die, make_shares, share_and_die
from make import make_checkpoint
from mquant import __version__
from mquant.checkpoint import open_checkpoint
from mquant.checkpoint.hub import HubRepo
from mquant.errors import InUse, MquantError, OutputError, SourceError, UsageError
from mquant.events import Event, Note, Progress
from mquant.family import load_families
from mquant.output import LEDGER, SHARES, ledger_name, read_ledger
from mquant.plan import make_plan
from mquant.recipe import find_recipe
from mquant.runs.job_spec import JobSpec
from mquant.runs.quantize import quantize
from mquant.runs.shares import finish_shares, in_shares
from run import plan_of, quantize_nvfp4, shares_of

__all__ = ["hub"]

SMALL = 20_000
"""The bytes of an output shard, so that a small checkpoint gets several shards."""


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    src = make_checkpoint(tmp_path_factory.mktemp("small") / "src", layers=2, experts=4, shards=3)
    (src / "tokenizer.json").write_text("{}")
    return src


@pytest.fixture(scope="module")
def expected(src: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file's hash after a run of one process."""
    return hashes(quantize_nvfp4(src, tmp_path_factory.mktemp("whole") / "out", shard_bytes=SMALL))


@pytest.fixture(scope="module")
def done(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OUT whose three shares are done; tests take copies."""
    out = tmp_path_factory.mktemp("made") / "out"
    for number in (2, 3, 1):
        shares_of(src, out, 3, SMALL).make(number)
    return out


def copy(folder: Path, path: Path) -> Path:
    shutil.copytree(folder, path)
    return path


def refused(error: type[MquantError], run: Any, *arguments: Any) -> MquantError:
    with pytest.raises(error) as caught:
        run(*arguments)
    assert caught.value.fix
    return caught.value


# --- the same bytes


@pytest.mark.parametrize("of", [1, 2, 3, 12])
def test_shares_made_at_the_same_time_give_the_files_of_one_process(
    src: Path, expected: dict[str, str], tmp_path: Path, of: int
) -> None:
    out = tmp_path / "out"
    assert make_shares(src, out, SMALL, of) == [0] * of
    assert not (out / "config.json").exists()
    assert finish_shares(out) is not None
    assert hashes(out) == expected


def test_a_share_writes_its_own_shards_and_nothing_else(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = shares_of(src, out, 3, SMALL)
    run.make(2)
    own = {shard.name for shard in run.parts[1].shards}
    assert {path.name for path in out.iterdir()} == {*own, SHARES, "mquant-run.2-of-3.jsonl"}


def test_a_share_without_a_shard_is_done_at_once_with_a_note(src: Path, tmp_path: Path) -> None:
    run, events = shares_of(src, tmp_path / "out", 50, SMALL), list[Event]()
    assert run.make(50, emit=events.append)
    assert events == [Note("info", "Share 50 of 50 has no shard to make.")]


def test_shares_carry_a_recipe_file_of_another_tool(src: Path, tmp_path: Path) -> None:
    recipe = str(tmp_path / "recipe.yaml")
    modifier = "{targets: [Linear], scheme: NVFP4A16, ignore: [lm_head, 're:.*gate$', 're:.*x$']}"
    Path(recipe).write_text(f"s_stage:\n  q_modifiers:\n    QuantizationModifier: {modifier}\n")
    for number in (1, 2):
        shares_of(src, tmp_path / "out", 2, SMALL, recipe).make(number)
    Path(recipe).unlink()
    finish_shares(tmp_path / "out")
    assert (tmp_path / "out/config.json").is_file()


def test_each_share_downloads_only_its_shards_and_finish_downloads_no_shard(
    hub: FakeHub, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", src)
    plan = make_plan(
        open_checkpoint(HubRepo("org/model")),
        find_recipe("nvfp4"),
        load_families(),
        max_shard_bytes=SMALL,
    )
    order = JobSpec.of(plan, SMALL, allow_unsafe=False, importance=None)
    caches = [tmp_path / f"cache-{number}" for number in (1, 2, 3)]
    for number, cache in enumerate(caches, 1):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        in_shares(plan, order, tmp_path / "out", 3).make(number)
    shards = [{path.name for path in cache.rglob("*.safetensors")} for cache in caches]
    assert all(0 < len(names) < 3 for names in (shards[0], shards[2]))
    shutil.rmtree(caches[2])
    finish_shares(tmp_path / "out")
    assert not caches[2].exists()
    quantize(plan, tmp_path / "whole")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


# --- interrupted and resumed


def test_a_killed_share_resumes_with_the_jobs_that_its_ledger_lacks(
    src: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out, run = tmp_path / "out", shares_of(src, tmp_path / "out", 2, SMALL)
    run.make(1)
    others = (out / ledger_name(1, 2)).read_bytes()
    units = sum(len(shard.units) for shard in run.parts[1].shards)
    assert share_and_die(src, out, SMALL, 2, 2, 5) == -signal.SIGKILL
    ledger = read_ledger(out, ledger_name(2, 2))
    assert ledger is not None
    assert len(ledger.units) == 5
    events: list[Event] = []
    assert run.make(2, emit=events.append)
    assert len([event for event in events if isinstance(event, Progress)]) == 1 + units - 5
    assert (out / ledger_name(1, 2)).read_bytes() == others
    finish_shares(out)
    assert hashes(out) == expected


def test_a_share_that_is_done_is_not_made_again(src: Path, done: Path, tmp_path: Path) -> None:
    out = copy(done, tmp_path / "out")
    before = hashes(out)
    events: list[Event] = []
    assert not shares_of(src, out, 3, SMALL).make(2, emit=events.append)
    assert (events, hashes(out)) == ([], before)


def test_a_killed_finish_can_be_repeated(
    done: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    changes, code = 0, None
    while code != 0:
        out = copy(done, tmp_path / f"killed-{changes}")
        code = finish_and_die(out, changes)
        assert code in (0, -signal.SIGKILL)
        finish_shares(out)
        assert hashes(out) == expected
        changes += 1
    assert changes > 8


def test_a_second_finish_is_already_done(src: Path, done: Path, tmp_path: Path) -> None:
    out = copy(done, tmp_path / "out")
    assert finish_shares(out) is not None
    before = hashes(out)
    assert finish_shares(out) is None
    assert not shares_of(src, out, 3, SMALL).make(1)
    assert not quantize(plan_of(src, max_shard_bytes=SMALL), out).fresh
    assert hashes(out) == before


# --- refusals


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
    src: Path, done: Path, tmp_path: Path, fault: str
) -> None:
    out, source = copy(done, tmp_path / "out"), copy(src, tmp_path / "src")
    table = json.loads((out / SHARES).read_text())
    table["order"]["source"]["folder"] = str(source)
    (out / SHARES).write_text(json.dumps(table))
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


# --- hostile files in OUT


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
