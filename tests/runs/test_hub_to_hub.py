"""`quantize --push-to` needs a bounded folder only, and commits index and config.json last."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner
from typer.testing import Result as Invoked

import mquant.checkpoint.spool as spool_module
from fakehub import FakeHub, hub, writable
from judges import hashes, held, largest
from make import make_checkpoint, make_larger
from mquant.checkpoint import Folder, open_checkpoint
from mquant.checkpoint.hub import HubRepo
from mquant.checkpoint.upload import HubWriter
from mquant.cli.app import app
from mquant.errors import MquantError, OutputError
from mquant.events import Event, Note
from mquant.family_files import load_families
from mquant.output import LEDGER, read_ledger
from mquant.plan import Plan, make_plan
from mquant.recipe import find_recipe
from mquant.runs import ship_shards
from mquant.runs.hub_to_hub import quantize_to_hub
from mquant.runs.quantize import quantize
from mquant.runs.run import Result
from uploads import commit_of_another

__all__ = ["hub", "writable"]

PARENT, REPO = "org/larger", "org/larger-NVFP4"
SHARD = 1_000_000
"""The most bytes of an output shard."""
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 MB in 12 shards."""
    return make_larger(tmp_path_factory.mktemp("larger") / "src", shards=12)


@pytest.fixture(autouse=True)
def _parent(writable: FakeHub, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "PIECE", 300_000)
    writable.add(PARENT, src)


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, str]:
    """The hash of every file of a run that downloads first and keeps all files."""
    quantize(plan_of(), tmp_path / "expected")
    return hashes(tmp_path / "expected")


def plan_of(src: str = PARENT) -> Plan:
    checkpoint = open_checkpoint(HubRepo(src))
    return make_plan(checkpoint, find_recipe("nvfp4"), load_families(), max_shard_bytes=SHARD)


def ship(out: Path, scratch: int | None = None, repo: str = REPO, src: str = PARENT) -> Result:
    return quantize_to_hub(plan_of(src), out, repo, scratch=scratch)


def command(out: Path, scratch: int) -> list[str]:
    options = ["--recipe", "nvfp4", "--max-shard-size", str(SHARD), "--scratch", str(scratch)]
    start = [sys.executable, "-m", "mquant", "quantize", PARENT, *options]
    return [*start, "--push-to", REPO, "-o", str(out)]


def on_the_hub(hub: FakeHub, repo: str = REPO) -> dict[str, str]:
    digests = hashes(hub.repos[repo].folders[hub.repos[repo].revisions["main"]])
    digests.pop(".gitattributes", None)
    return digests


def refusal(out: Path, repo: str = REPO) -> MquantError:
    with pytest.raises(OutputError) as caught:
        ship(out, repo=repo)
    assert not out.exists()
    return caught.value


def test_the_repo_holds_the_files_of_a_run_that_keeps_all_files(
    hub: FakeHub, expected: dict[str, str], tmp_path: Path
) -> None:
    assert ship(tmp_path / "out", 9_000_000).fresh
    assert on_the_hub(hub) == expected
    assert hub.repos[REPO].access == "private"
    assert not (tmp_path / "out").exists()


def test_index_and_config_come_in_the_last_commit_and_the_ledger_goes(
    hub: FakeHub, tmp_path: Path
) -> None:
    ship(tmp_path / "out", 9_000_000)
    *before, last = hub.commits
    assert last.added == ("model.safetensors.index.json", "config.json")
    assert last.deleted == (LEDGER,)
    for commit in before:
        assert not {"model.safetensors.index.json", "config.json"} & {*commit.added}


def test_shards_are_packed_into_few_commits(hub: FakeHub, tmp_path: Path) -> None:
    ship(tmp_path / "out")
    shards, others, last = hub.commits
    assert len(shards.added) == len(plan_of().shards) + 1
    assert shards.added[-1] == LEDGER
    assert "mquant.json" in others.added
    assert "config.json" in last.added


def test_no_shard_waits_long_for_its_commit(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship_shards, "COMMIT_SECONDS", 0.0)
    ship(tmp_path / "out")
    assert len(hub.commits) == len(plan_of().shards) + 2


def test_a_commit_of_another_that_touches_none_of_our_files_is_named(
    hub: FakeHub, expected: dict[str, str], tmp_path: Path
) -> None:
    events: list[Event] = []
    hub.before_commit = [lambda: commit_of_another(hub, REPO, {"notes.txt": b"x"})]
    quantize_to_hub(plan_of(), tmp_path / "out", REPO, emit=events.append)
    notes = [event.message for event in events if isinstance(event, Note)]
    assert any(f"changed notes.txt in {REPO}" in note for note in notes)
    digests = on_the_hub(hub)
    digests.pop("notes.txt")
    assert digests == expected


@pytest.mark.parametrize("commits", [0, 1, 2])
def test_a_commit_of_another_that_touches_a_shard_stops_the_run(
    hub: FakeHub, tmp_path: Path, commits: int
) -> None:
    shard = plan_of().shards[0].name
    hub.before_commit = [lambda: None] * commits
    hub.before_commit += [lambda: commit_of_another(hub, REPO, {shard: b"x"})]
    with pytest.raises(OutputError, match=rf"Another's commit \(.*\) changed {shard}"):
        ship(tmp_path / "out")
    assert "config.json" not in on_the_hub(hub)


def test_a_failed_upload_is_noticed_at_once_also_with_a_scratch(
    hub: FakeHub, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OutputError("The hub is full.", "Empty it.")

    monkeypatch.setattr(HubWriter, "upload", refuse)
    hub.bytes_per_second = 8_000_000  # all files take three seconds
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="The hub is full"):
        ship(out, 90_000_000)
    ledger = read_ledger(out)
    assert ledger is not None
    assert 0 < len(ledger.shards) < len(plan_of().shards) / 2


@pytest.mark.usefixtures("hub")
def test_there_is_never_more_than_the_scratch_on_the_disk(src: Path, tmp_path: Path) -> None:
    out, scratch, most = tmp_path / "out", 3 * largest(src), 0
    with subprocess.Popen(command(out, scratch), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, held(out))
            time.sleep(0.001)
    assert process.returncode == 0
    assert largest(src) < most <= scratch


def test_a_killed_run_resumes(
    hub: FakeHub, src: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    hub.forget()
    hub.bytes_per_second = 20_000_000
    for more in (2_000_000, 9_000_000, 7_000_000):
        until = hub.bytes_served + more
        with subprocess.Popen(command(out, 9_000_000), stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and hub.bytes_served < until:
                time.sleep(0.005)
            process.kill()
    subprocess.run(command(out, 9_000_000), check=True, capture_output=True)
    assert on_the_hub(hub) == expected
    assert hub.bytes_received < sum(f.stat().st_size for f in src.iterdir()) / 3 + 3 * SHARD


def test_another_machine_resumes_from_the_repo(
    hub: FakeHub, expected: dict[str, str], tmp_path: Path
) -> None:
    hub.drop_after = 3
    with pytest.raises(OutputError, match=r"connection to 127\.0\.0\.1 broke"):
        ship(tmp_path / "materialize", 9_000_000)
    hub.drop_after = None
    sent, served = set(hub.stored), hub.bytes_served
    hub.forget()
    ship(tmp_path / "there", 9_000_000)
    assert on_the_hub(hub) == expected
    again = [r.path for r in hub.requests if r.method == "PUT" and r.path[5:] in sent]
    assert not again
    assert hub.bytes_served < served + 9_000_000


def test_a_second_run_is_already_done(hub: FakeHub, tmp_path: Path) -> None:
    ship(tmp_path / "out")
    commits = len(hub.commits)
    assert not ship(tmp_path / "out").fresh
    assert len(hub.commits) == commits
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a shard", "recipe.yaml"])
def test_a_repo_with_a_changed_file_is_not_already_there(
    hub: FakeHub, tmp_path: Path, name: str
) -> None:
    ship(tmp_path / "out")
    changed = plan_of().shards[0].name if name == "a shard" else name
    old = (hub.repos[REPO].folders[hub.repos[REPO].revisions["main"]] / changed).read_bytes()
    commit_of_another(hub, REPO, {changed: old[:-1] + bytes([old[-1] ^ 1])})
    with pytest.raises(OutputError, match=f"In {REPO}, {changed} has changed: its sha256 is"):
        ship(tmp_path / "out")


def test_a_run_killed_before_the_last_commit_is_no_checkpoint_and_resumes(
    hub: FakeHub, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mquant.runs.hub_to_hub.seal", dies)
        ship(tmp_path / "out")
    assert "config.json" not in on_the_hub(hub)
    ship(tmp_path / "out")
    assert on_the_hub(hub) == expected


def test_a_repo_that_lost_a_shard_is_not_completed(hub: FakeHub, tmp_path: Path) -> None:
    hub.loses = plan_of().shards[1].name
    with pytest.raises(OutputError, match=rf"does not hold {hub.loses} as made"):
        ship(tmp_path / "out")
    assert "config.json" not in on_the_hub(hub)
    hub.loses = None
    ship(tmp_path / "out")
    assert "config.json" in on_the_hub(hub)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors.index.json"])
def test_a_repo_that_lost_a_file_of_the_last_commit_is_not_done(
    hub: FakeHub, expected: dict[str, str], tmp_path: Path, lost: str
) -> None:
    hub.loses = lost
    with pytest.raises(OutputError, match=rf"does not hold {lost} as made"):
        ship(tmp_path / "out")
    hub.loses = None
    ship(tmp_path / "out")
    assert on_the_hub(hub) == expected


def test_a_folder_can_be_quantized_into_a_repo_too(
    hub: FakeHub, src: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    out = tmp_path / "out"
    options = ["--recipe", "nvfp4", "--max-shard-size", str(SHARD), "-o", str(out)]
    result = CliRunner().invoke(app, ["quantize", str(src), *options, "--push-to", REPO])
    assert result.exit_code == 0, result.output
    assert "Quantized into http://127.0.0.1" in result.stdout
    digests = on_the_hub(hub)
    assert {k: v for k, v in digests.items() if k != "mquant.json"} == {
        k: v for k, v in expected.items() if k != "mquant.json"
    }


def test_a_shard_of_a_folder_touched_while_the_repo_is_judged_costs_no_byte(
    hub: FakeHub, src: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(src, tmp_path / "src")
    touched: list[Event] = []

    def emit(event: Event) -> None:
        if isinstance(event, Note) and "no licence" in event.message and not touched:
            touched.append(event)  # all shards are in the repo, config.json is not
            for path in own.glob("*-00003-*.safetensors"):
                path.chmod(0o600)

    plan = make_plan(
        open_checkpoint(Folder(own)),
        find_recipe("nvfp4"),
        load_families(),
        max_shard_bytes=SHARD,
    )
    quantize_to_hub(plan, tmp_path / "out", "org/untouched")
    quantize_to_hub(plan, tmp_path / "out", REPO, emit=emit)
    assert touched
    assert on_the_hub(hub) == on_the_hub(hub, "org/untouched")


def test_public_repos_and_filled_repos_are_refused(hub: FakeHub, src: Path, tmp_path: Path) -> None:
    hub.add("org/other", src, access="private")
    assert "org/other holds config.json" in refusal(tmp_path / "out", "org/other").message
    hub.add("org/public", src)
    assert "org/public is public" in refusal(tmp_path / "out", "org/public").message


def test_another_run_into_the_same_repo_is_refused(hub: FakeHub, src: Path, tmp_path: Path) -> None:
    hub.drop_after = 3
    with pytest.raises(OutputError):
        ship(tmp_path / "out", 9_000_000)
    hub.drop_after = None
    copy = make_checkpoint(tmp_path / "copy", layers=1, experts=2)
    hub.add("org/copy", copy)
    with pytest.raises(
        OutputError, match=r"org/larger-NVFP4 is made from something else: repo was"
    ):
        ship(tmp_path / "other", src="org/copy")


def test_a_ledger_that_lies_about_shards_is_not_believed(
    hub: FakeHub, expected: dict[str, str], tmp_path: Path
) -> None:
    hub.drop_after = 3
    with pytest.raises(OutputError):
        ship(tmp_path / "out", 9_000_000)
    hub.drop_after = None
    repo = hub.repos[REPO]
    ledger = repo.folders[repo.revisions["main"]] / LEDGER
    lies = [{"shard": name, "sha256": "0" * 64, "jobs": []} for name in ("../x", *expected)]
    with ledger.open("a") as file:
        file.writelines(json.dumps(lie) + "\n" for lie in lies)
    ship(tmp_path / "there", 9_000_000)
    assert on_the_hub(hub) == expected


def invoke(*options: str) -> Invoked:
    return CliRunner().invoke(app, ["quantize", PARENT, "--recipe", "nvfp4", *options])


def test_wrong_options_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ("-o", str(tmp_path / "out"))
    assert "'x' is no hub repo id" in invoke("--push-to", "x", *out).stderr
    oneshot = invoke("--push-to", REPO, "--engine", "oneshot", *out)
    assert (oneshot.exit_code, "--push-to needs the stream engine" in oneshot.stderr) == (2, True)
    data = CliRunner().invoke(
        app,
        ["quantize", PARENT, "--recipe", "nvfp4-w4a4", "--data", "x.txt", "--push-to", REPO, *out],
    )
    assert (data.exit_code, "--push-to needs the stream engine" in data.stderr) == (2, True)
    assert "needs no data" in invoke("--push-to", REPO, "--data", "x.txt", *out).stderr
    small = invoke("--push-to", REPO, "--scratch", "3MB", *out)
    assert "--scratch 3.00 MB is not enough: files of" in small.stderr
    monkeypatch.delenv("HF_TOKEN")
    assert "There is no token" in invoke("--push-to", REPO, *out).stderr
    assert not (tmp_path / "out").exists()
