"""Many processes write one checkpoint, each its share, and `finish` completes the checkpoint."""

import shutil
import signal
from pathlib import Path

import pytest

from fakehub import FakeHub, hub
from judges import hashes
from killed import finish_and_die, make_shares, share_and_die
from mquant.checkpoint import open_checkpoint
from mquant.checkpoint.hub import HubRepo
from mquant.events import Event, Note, Progress
from mquant.family_files import load_families
from mquant.output import SHARES, ledger_name, read_ledger
from mquant.plan import make_plan
from mquant.recipe import find_recipe
from mquant.runs.job_spec import JobSpec
from mquant.runs.quantize import quantize
from mquant.runs.shares import finish_shares, in_shares
from run import plan_of, shares_of
from share_runs import SMALL, copy, done, expected, src

__all__ = ["done", "expected", "hub", "src"]


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
