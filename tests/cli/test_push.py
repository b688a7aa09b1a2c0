"""`mquant push` refuses wrong checkpoints, uploads files in a safe order, and resumes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corpus import OF_NVFP4A16
from fakehub import GOOD_TOKEN, POOR_TOKEN, FakeHub, hub, writable
from judges import hashes, read_json
from mquant.checkpoint import upload
from mquant.cli.app import app
from pushing import REPO, document, on_the_hub, quantized, run, src
from run import TRAINED, quantize_nvfp4

__all__ = ["hub", "quantized", "src", "writable"]

# huggingface_hub itself passes files to httpx in the deprecated way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("writable"),
]


def uploads(hub: FakeHub) -> list[str]:
    """Return the paths of the large files that were sent, whole or not, in order."""
    return [request.path for request in hub.requests if request.method == "PUT"]


def every_config_has_its_shards(hub: FakeHub, shards: set[str]) -> None:
    """Assert that every commit with a config.json has all shards."""
    for folder in hub.repos[REPO].folders.values():
        names = {path.name for path in folder.iterdir()}
        assert "config.json" not in names or shards <= names


def test_every_file_arrives_and_index_and_config_come_last(src: Path, hub: FakeHub) -> None:
    CliRunner().invoke(app, ["card", str(src)])
    before = hashes(src)
    report = document(src, REPO)
    assert on_the_hub(hub) == before == hashes(src)
    assert report["sent"] == sorted(before)
    assert report["url"] == f"{hub.url}/{REPO}"
    assert report["verdict"].startswith("Clean for vLLM 0.32: 327 tensors")
    *first, last = hub.commits
    assert last.added == ("model.safetensors.index.json", "config.json")
    assert {name for commit in first for name in commit.added} == before.keys() - set(last.added)
    every_config_has_its_shards(hub, {path.name for path in src.glob("*.safetensors")})


def test_the_repo_is_private_unless_public_is_asked_for(src: Path, hub: FakeHub) -> None:
    assert document(src, REPO)["private"]
    assert hub.repos[REPO].access == "private"
    del hub.repos[REPO]
    assert not document(src, REPO, "--public")["private"]
    assert hub.repos[REPO].access == "public"


def test_nothing_goes_into_a_public_repo_by_accident(src: Path, hub: FakeHub) -> None:
    hub.add(REPO, src)
    result = run(src, REPO, code=1)
    assert f"{REPO} is public: a push publishes the checkpoint." in result.stderr
    assert not hub.commits


def test_a_push_needs_no_cache_folder(
    src: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    run(src, REPO)
    assert on_the_hub(hub).keys() == {path.name for path in src.iterdir()}


def test_a_second_push_is_already_done(src: Path, hub: FakeHub) -> None:
    run(src, REPO)
    commits = list(hub.commits)
    report = document(src, REPO)
    assert report["already_done"]
    assert report["sent"] == []
    assert hub.commits == commits


def test_a_new_card_goes_up_alone(src: Path, hub: FakeHub) -> None:
    run(src, REPO)
    hub.forget()
    CliRunner().invoke(app, ["card", str(src)])
    assert document(src, REPO)["sent"] == ["README.md"]
    assert hub.commits[-1].added == ("README.md",)
    assert not uploads(hub)


def test_a_repaired_checkpoint_with_a_new_card_goes_up(
    src: Path, tmp_path: Path, hub: FakeHub
) -> None:
    CliRunner().invoke(app, ["card", str(src)])
    bad = next(c for c in OF_NVFP4A16 if c.name == "one router quantized").make(src, tmp_path / "b")
    good = tmp_path / "good"
    command = ["repair", str(bad), "--from", str(TRAINED), "-o", str(good)]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert "README.md" in read_json(good / "mquant.json")["files"]
    assert CliRunner().invoke(app, ["card", str(good)]).exit_code == 0
    assert "### Changes since" in (good / "README.md").read_text(encoding="utf-8")
    run(good, REPO)
    assert on_the_hub(hub) == hashes(good)


def test_a_dry_run_lists_files_and_bytes_and_sends_no_request(
    src: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    report = document(src, REPO, "--dry-run")
    assert report["files"] == {name: (src / name).stat().st_size for name in hashes(src)}
    assert report["bytes"] == sum(report["files"].values())
    assert report["last_commit"] == ["model.safetensors.index.json", "config.json"]
    assert not hub.requests
    shown = run(src, REPO, "--dry-run").stdout
    assert "model.safetensors.index.json and config.json are uploaded last, in one commit." in shown


def test_a_shard_with_a_changed_byte_is_refused(src: Path, hub: FakeHub) -> None:
    shard = min(src.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = run(src, REPO, code=1)
    assert f"{shard.name} in Q is not the file that mquant.json says" in result.stderr
    assert not hub.commits
    assert REPO not in hub.repos


def test_a_broken_checkpoint_is_refused(src: Path, tmp_path: Path, hub: FakeHub) -> None:
    bad = next(c for c in OF_NVFP4A16 if c.name == "one router quantized").make(src, tmp_path / "b")
    record = read_json(bad / "mquant.json")
    record["files"] = {
        name: {"bytes": (bad / name).stat().st_size, "sha256": digest}
        for name, digest in hashes(bad).items()
        if name != "mquant.json"
    }
    (bad / "mquant.json").write_text(json.dumps(record), encoding="utf-8")
    report = document(bad, REPO, code=3)
    assert "router-quantized" in {finding["rule"] for finding in report["findings"]}
    assert REPO not in hub.repos


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            "mquant.json",
            "Q has no mquant.json, which lists the checkpoint's files and their sha256.",
        ),
        ("tokenizer.json", "Q lacks tokenizer.json, which its mquant.json names."),
        ("+evil.py", "evil.py in Q is not in its mquant.json."),
    ],
)
def test_missing_and_additional_files_are_refused(
    src: Path, hub: FakeHub, edit: str, sentence: str
) -> None:
    if edit.startswith("+"):
        (src / edit[1:]).write_text("x", encoding="utf-8")
    else:
        (src / edit).unlink()
    assert sentence in run(src, REPO, code=1).stderr
    assert not hub.requests


def test_another_checkpoint_is_replaced_only_if_asked_and_never_looks_half_new(
    src: Path, tmp_path: Path, hub: FakeHub
) -> None:
    old = Path(shutil.copytree(TRAINED, tmp_path / "old"))
    hub.add(REPO, old, access="private")
    assert f"{REPO} holds another checkpoint." in run(src, REPO, code=1).stderr
    assert not hub.commits
    document(src, REPO, "--replace")
    first, *_, last = hub.commits
    assert first.deleted == ("config.json", "model.safetensors.index.json")
    assert (
        set(last.deleted) == {path.name for path in old.glob("*.safetensors")} - hashes(src).keys()
    )
    assert last.added[-1] == "config.json"
    digests = on_the_hub(hub)
    assert {name: digests[name] for name in hashes(src)} == hashes(src)


def test_a_checkpoint_with_the_same_config_json_is_replaced_too(
    src: Path, hub: FakeHub, tmp_path: Path
) -> None:
    run(src, REPO)
    other = quantize_nvfp4(TRAINED, tmp_path / "other", shard_bytes=500_000)
    assert hashes(other)["config.json"] == hashes(src)["config.json"]
    run(other, REPO, "--replace")
    assert on_the_hub(hub) == hashes(other)


def test_what_fits_one_commit_goes_in_one_commit(src: Path, hub: FakeHub) -> None:
    run(src, REPO)
    assert len(hub.commits) == 2


def test_more_files_than_a_commit_has_are_committed_piece_by_piece_and_commits_stay(
    src: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "MOST_FILES", 2)
    hub.drop_after = 3
    run(src, REPO, code=1)
    committed = on_the_hub(hub)
    assert {name for name in committed if name.endswith(".safetensors")}
    hub.drop_after = None
    sent = document(src, REPO)["sent"]
    assert not committed.keys() & set(sent)
    assert all(len(commit.added) <= 2 for commit in hub.commits)
    assert on_the_hub(hub) == hashes(src)


def test_dropped_connections_are_tried_again(src: Path, hub: FakeHub) -> None:
    hub.drops = 3
    document(src, REPO)
    assert hub.drops == 0
    assert on_the_hub(hub) == hashes(src)


def test_a_hub_that_goes_away_is_a_sentence_and_the_same_command_resumes(
    src: Path, hub: FakeHub
) -> None:
    shards = sorted(path.name for path in src.glob("*.safetensors"))
    assert len(shards) >= 4
    hub.drop_after = 2
    result = run(src, REPO, code=1)
    assert "The connection to 127.0.0.1 broke." in result.stderr
    assert "Run the same command again to resume." in result.stderr
    assert len(hub.stored) == 2
    every_config_has_its_shards(hub, set(shards))
    sent = {path for path in uploads(hub) if path.rpartition("/")[2] in hub.stored}
    hub.drop_after = None
    hub.forget()
    result = run(src, REPO)
    assert "These bytes were verified before." in result.stderr
    assert not sent & set(uploads(hub)), "what was sent is not sent again"
    assert on_the_hub(hub) == hashes(src)


def test_the_last_commit_is_tried_again_after_an_error_of_the_hub(src: Path, hub: FakeHub) -> None:
    run(src, REPO)
    (src / "NOTICE").write_text("x", encoding="utf-8")
    hub.fail(503, times=2)
    assert document(src, REPO)["sent"] == ["NOTICE"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_push_ends_at_once_and_the_same_command_resumes(
    src: Path, hub: FakeHub, signum: int
) -> None:
    hub.latency = 0.2
    command = [sys.executable, "-m", "mquant", "push", str(src), REPO]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not hub.stored and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
    if signum is signal.SIGINT:
        assert process.returncode == 130
        assert errors.endswith("Interrupted; it is safe to run the same command again.\n")
    assert "config.json" not in on_the_hub(hub)
    hub.latency = 0
    run(src, REPO)
    assert on_the_hub(hub) == hashes(src)


def test_a_push_without_a_token_is_a_sentence(
    src: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = run(src, REPO, code=1)
    assert "There is no token, so 127.0.0.1 accepts no files." in result.stderr
    assert not hub.requests


@pytest.mark.parametrize("token", [POOR_TOKEN, "hf_revokedrevokedrevokedrevoked", "hf_bro ken\n"])
def test_a_token_never_appears(
    src: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("MQUANT_TRACEBACK", "1")
    result = run(src, REPO, "--format", "json", code=1)
    assert token.strip() not in result.output + result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads(result.stdout)["error"]["fix"]
    assert REPO not in hub.repos


def test_the_token_goes_to_the_hub_alone_and_into_no_file(
    src: Path, hub: FakeHub, tmp_path: Path
) -> None:
    hub.drop_after = 1
    run(src, REPO, code=1)
    assert {r.authorization for r in hub.requests if r.host == "localhost"} == {None}
    for path in (tmp_path / "cache").rglob("*"):
        assert path.is_dir() or GOOD_TOKEN not in path.read_text(encoding="utf-8")


def test_a_card_that_the_hub_does_not_accept_is_a_sentence(src: Path, hub: FakeHub) -> None:
    (src / "README.md").write_text("---\nlicense: mine\n---\n", encoding="utf-8")
    result = run(src, REPO, code=1)
    assert "127.0.0.1 does not accept the metadata of README.md:" in result.stderr
    assert "Write the card again with mquant card." in result.stderr


def test_a_file_that_the_hub_lost_is_noticed_and_sent_again(src: Path, hub: FakeHub) -> None:
    hub.loses = "tokenizer.json"
    result = run(src, REPO, code=1)
    assert f"{REPO} does not have the recorded content of tokenizer.json." in result.stderr
    hub.loses = None
    run(src, REPO)
    assert on_the_hub(hub) == hashes(src)


def test_nothing_is_left_in_the_cache(src: Path, tmp_path: Path) -> None:
    run(src, REPO)
    assert not list((tmp_path / "cache" / "mquant" / "push").iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "SRC or REPO is missing."),
        (["x"], "SRC or REPO is missing."),
        (["x", "no repo"], "'no repo' is no hub repo id."),
    ],
)
def test_a_wrong_command_line_is_a_sentence(arguments: list[str], sentence: str) -> None:
    assert sentence in run(*arguments, code=2).stderr


def test_a_truncated_note_is_a_fresh_start(
    src: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hub.drop_after = 2
    run(src, REPO, code=1)
    (note,) = (tmp_path / "cache/mquant/push").iterdir()
    note.write_bytes(note.read_bytes()[:-20])
    hub.drop_after = None
    assert "These bytes were verified before." not in run(src, REPO).stderr
    assert on_the_hub(hub) == hashes(src)
