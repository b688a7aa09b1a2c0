"""`mquant push` notices what changes meanwhile: files, the repo, and a busy hub."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from fakehub import FakeHub, hub, writable
from judges import hashes
from mquant.checkpoint import Folder
from mquant.events import silent
from mquant.family_files import load_families
from mquant.publish import push as push_module
from pushing import REPO, on_the_hub, quantized, run, src
from run import TRAINED, quantize_nvfp4
from uploads import commit_of_another

__all__ = ["hub", "quantized", "src", "writable"]

# huggingface_hub itself passes files to httpx in the deprecated way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("writable"),
]


def after_verifying(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Have `action` happen after the push verified the local files, and before it uploads them."""
    judge = push_module._judge

    def judge_and_act(*arguments: Any) -> object:
        report = judge(*arguments)
        action()
        return report

    monkeypatch.setattr(push_module, "_judge", judge_and_act)


def change(file: Path) -> None:
    """Change a byte of a file, and keep its size and times."""
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def sentence(result: Result) -> str:
    """Return the error and its fix, on one line."""
    return " ".join(result.stderr[result.stderr.index("Error: ") :].split())


@pytest.mark.parametrize("name", ["model-00002-of-", "tokenizer.json", "config.json"])
def test_a_file_that_changes_after_it_was_verified_completes_no_repo(
    src: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (file,) = src.glob(f"{name}*")
    after_verifying(monkeypatch, lambda: change(file))
    result = run(src, REPO, code=1)
    assert f"{file.name} was changed before its upload" in result.stderr
    assert not {"config.json", file.name} & on_the_hub(hub).keys()


def test_a_shard_that_changes_between_a_stop_and_the_next_run_completes_no_repo(
    src: Path, hub: FakeHub
) -> None:
    last = max(src.glob("*.safetensors"))
    hub.drop_after = 2
    run(src, REPO, code=1)
    hub.drop_after = None
    change(last)
    assert last.name in run(src, REPO, code=1).stderr
    assert "config.json" not in on_the_hub(hub)


def test_a_repo_whose_digests_are_not_those_of_mquant_json_is_not_completed(
    src: Path, hub: FakeHub
) -> None:
    shard = min(src.glob("*.safetensors"))
    digest = hashes(src)[shard.name].encode()
    hub.tamper = lambda body: body.replace(b'"sha256": "' + digest, b'"sha256": "' + b"0" * 64)
    result = run(src, REPO, code=1)
    assert f"{REPO} does not have the recorded content of {shard.name}." in result.stderr
    assert "config.json" not in on_the_hub(hub)


@pytest.mark.parametrize("commits", [0, 1])
def test_two_pushes_into_one_new_repo_never_mix(
    src: Path, hub: FakeHub, tmp_path: Path, commits: int
) -> None:
    other = quantize_nvfp4(TRAINED, tmp_path / "other", shard_bytes=500_000)

    def push_other() -> None:
        shipment = push_module.load(Folder(other))
        push_module.push(shipment, REPO, load_families(), silent, replace=True)

    hub.before_commit = [lambda: None] * commits
    hub.before_commit += [push_other]
    result = run(src, REPO, code=1)
    assert "Another's commit (" in result.stderr
    assert f"in {REPO} during the upload." in result.stderr
    assert on_the_hub(hub) == hashes(other)


@pytest.mark.parametrize("begun", ["before the repo exists", "before the first commit"])
def test_of_two_pushes_of_one_folder_the_loser_finds_all_files_there(
    src: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    def push_too() -> None:
        push_module.push(push_module.load(Folder(src)), REPO, load_families(), silent)

    if begun == "before the repo exists":
        once = [push_too]
        after_verifying(monkeypatch, lambda: once.pop()() if once else None)
        expected = f"Another created {REPO} just now. If that is the same checkpoint, run the same "
    else:
        hub.before_commit = [push_too]
        expected = f"changed config.json, model.safetensors.index.json in {REPO} during the upload."
    assert expected in sentence(run(src, REPO, code=1))
    assert on_the_hub(hub) == hashes(src)
    hub.forget()
    assert f"Already there: {hub.url}/{REPO}" in run(src, REPO).output
    assert not hub.bytes_received


def test_a_card_that_another_edits_during_the_push_is_named_with_its_commit(
    src: Path, hub: FakeHub
) -> None:
    (src / "README.md").write_text("---\nlicense: mit\n---\nours")
    made: list[str] = []
    edited = {"README.md": b"edited"}
    hub.before_commit = [
        lambda: None,
        lambda: made.append(commit_of_another(hub, REPO, edited)),
    ]
    assert sentence(run(src, REPO, code=1)) == (
        f"Error: Another's commit ({made[0][:12]}) changed README.md in {REPO} during the upload. "
        f"Look at {hub.url}/{REPO}/commit/{made[0]}. Let one process push to the repo at a time, "
        "then run the same command again. That replaces README.md; to keep the other's text, copy "
        "it into the folder first."
    )
    run(src, REPO)
    assert on_the_hub(hub) == hashes(src)


def test_a_repo_that_another_creates_meanwhile_is_not_written_to(
    src: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_verifying(monkeypatch, lambda: hub.add(REPO, TRAINED, access="private"))
    assert f"Another created {REPO} just now." in run(src, REPO, code=1).stderr
    assert not hub.commits


@pytest.mark.parametrize("commits", [0, 1])
def test_a_commit_of_another_that_touches_none_of_our_files_is_named_and_gone_on_from(
    src: Path, hub: FakeHub, commits: int
) -> None:
    made: list[str] = []
    another = {"notes.txt": b"hello"}
    hub.before_commit = [lambda: None] * commits
    hub.before_commit += [lambda: made.append(commit_of_another(hub, REPO, another))]
    result = run(src, REPO)
    (commit,) = made
    assert f"Another's commit ({commit[:12]}) changed notes.txt in {REPO}" in result.stderr
    digests = on_the_hub(hub)
    assert digests.pop("notes.txt")
    assert digests == hashes(src)


@pytest.mark.parametrize("commits", [0, 1])
@pytest.mark.parametrize("name", ["tokenizer.json", "model-00009-of-00009.safetensors"])
def test_a_commit_of_another_that_touches_what_loaders_read_stops_the_push(
    src: Path, hub: FakeHub, commits: int, name: str
) -> None:
    hub.before_commit = [lambda: None] * commits
    hub.before_commit += [lambda: commit_of_another(hub, REPO, {name: b"x"})]
    result = run(src, REPO, code=1)
    assert f"changed {name} in {REPO} during the upload." in result.stderr
    assert "config.json" not in on_the_hub(hub)


def test_a_commit_whose_answer_is_lost_is_not_taken_for_anothers(src: Path, hub: FakeHub) -> None:
    hub.lost_answers = 2
    result = run(src, REPO)
    assert "Another's commit" not in result.stderr
    assert on_the_hub(hub) == hashes(src)
    assert len(hub.commits) == 2


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (503, {"Retry_After": "90"}, 90),
        (429, {"RateLimit": '"api";r=0;t=55'}, 55),
        (
            429,
            {"X_Error_Message": "Too many commits. You can retry this action in 43 minutes."},
            2580,
        ),
    ],
)
def test_a_wait_for_the_hub_is_a_line_that_says_until_when(
    src: Path,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    headers: dict[str, str],
    seconds: int,
) -> None:
    waits: list[float] = []
    empty = src.parent / "empty"
    empty.mkdir()
    hub.add(REPO, empty, access="private")
    monkeypatch.setattr("mquant.checkpoint.retry.time.sleep", waits.append)
    after_verifying(monkeypatch, lambda: hub.fail(status, 1, **headers))
    result = run(src, REPO)
    assert waits == [seconds]
    assert re.search(rf"\(HTTP {status}\).*: waiting until \d\d:\d\d:\d\d", result.stderr)


def test_a_wait_of_a_day_ends_the_push_and_the_same_command_resumes(
    src: Path, hub: FakeHub
) -> None:
    hub.before_commit = [lambda: hub.fail(429, 1, Retry_After=str(28 * 3600))]
    hub.lost_answers = 1
    result = run(src, REPO, code=1)
    assert re.search(r"the hub asks to wait until \d\d:\d\d .* on \d{4}-\d\d-\d\d\.", result.stderr)
    assert "Run the same command again then; it resumes." in " ".join(result.stderr.split())
    hub.forget()
    run(src, REPO)
    assert on_the_hub(hub) == hashes(src)
    assert not hub.bytes_received
