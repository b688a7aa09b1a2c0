"""`--scratch` bounds the bytes of a hub repo's files that a run stores on this machine."""

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mquant.checkpoint.spool as spool_module
from fakehub import FakeHub, hub
from judges import hashes, held, largest
from make import make_larger
from mquant.checkpoint import open_checkpoint
from mquant.checkpoint.hub import HubRepo
from mquant.cli.app import app
from mquant.errors import OutputError, SourceError
from mquant.events import Emit, silent
from mquant.family_files import load_families
from mquant.plan import Plan, make_plan
from mquant.recipe import find_recipe
from mquant.runs.quantize import quantize

__all__ = ["hub"]

REPO = "org/larger"
SHARD = 2_000_000
"""Bytes of an output shard."""


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 MB in 8 shards."""
    return make_larger(tmp_path_factory.mktemp("larger") / "src", shards=8)


@pytest.fixture
def repo(hub: FakeHub, src: Path, monkeypatch: pytest.MonkeyPatch) -> HubRepo:
    monkeypatch.setattr(spool_module, "PIECE", 300_000)
    hub.add(REPO, src)
    return HubRepo(REPO)


def plan_of(repo: HubRepo) -> Plan:
    recipe = find_recipe("nvfp4")
    return make_plan(open_checkpoint(repo), recipe, load_families(), max_shard_bytes=SHARD)


def run(repo: HubRepo, out: Path, scratch: int | None, emit: Emit = silent) -> Path:
    quantize(plan_of(repo), out, scratch=scratch, emit=emit)
    return out


def test_a_run_with_a_scratch_writes_the_same_bytes(repo: HubRepo, tmp_path: Path) -> None:
    scratch = 12_000_000
    assert hashes(run(repo, tmp_path / "a", scratch)) == hashes(run(repo, tmp_path / "b", None))


def test_downloads_never_exceed_the_scratch(repo: HubRepo, src: Path, tmp_path: Path) -> None:
    scratch, out, most = 3 * largest(src), tmp_path / "out", [0]
    thread = threading.Thread(target=run, args=(repo, out, scratch))
    thread.start()
    while thread.is_alive():
        most.append(held(out / ".mquant-scratch"))
        time.sleep(0.001)
    assert largest(src) < max(most) <= scratch
    assert (out / "config.json").exists()
    assert not (out / ".mquant-scratch").exists()


def test_every_byte_of_the_shards_is_sent_once(
    hub: FakeHub, repo: HubRepo, src: Path, tmp_path: Path
) -> None:
    plan = plan_of(repo)
    hub.forget()
    quantize(plan, tmp_path / "out", scratch=3 * largest(src))
    shards = sum(path.stat().st_size for path in src.glob("*.safetensors"))
    assert shards <= hub.bytes_served < shards + 20_000


def test_a_scratch_that_files_needed_at_once_do_not_fit_is_refused(
    repo: HubRepo, src: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=r"is not enough: files of .* at the same time"):
        run(repo, tmp_path / "out", largest(src) - 1)
    assert not (tmp_path / "out").exists()


def test_a_killed_run_downloads_no_finished_file_again(
    hub: FakeHub, repo: HubRepo, src: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", run(repo, tmp_path / "whole", None)
    hub.forget()
    hub.bytes_per_second = 20_000_000
    command = [sys.executable, "-m", "mquant", "quantize", REPO, "--recipe", "nvfp4"]
    command += ["--scratch", str(2 * largest(src)), "--max-shard-size", str(SHARD), "-o", str(out)]
    for _ in range(3):
        before = hub.bytes_served
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and hub.bytes_served < before + 9_000_000:
                time.sleep(0.005)
            process.kill()
    subprocess.run(command, check=True, capture_output=True)
    assert hashes(out) == hashes(whole)
    # Each kill costs the downloads under way, which are at most the scratch.
    shards = sum(path.stat().st_size for path in src.glob("*.safetensors"))
    assert hub.bytes_served < shards + 3 * 2 * largest(src)


def test_a_side_file_that_is_not_what_the_hub_lists_is_refused(
    hub: FakeHub, repo: HubRepo, src: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(src, copy)
    (copy / "tokenizer.json").write_text("{}")
    hub.add("org/copy", copy)
    repo = HubRepo("org/copy")
    plan = plan_of(repo)
    (copy / "tokenizer.json").write_text("[]")
    with pytest.raises(SourceError, match=r"sent another tokenizer.json of org/copy than it lists"):
        quantize(plan, tmp_path / "out", scratch=10_000_000)
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.usefixtures("repo")
def test_a_scratch_for_a_folder_or_for_oneshot_is_a_usage_error(src: Path, tmp_path: Path) -> None:
    out = ["-o", str(tmp_path / "out")]
    folder = CliRunner().invoke(
        app, ["quantize", str(src), "--recipe", "nvfp4", "--scratch", "1GB", *out]
    )
    assert folder.exit_code == 2
    assert "src is a folder, which mquant reads directly and without a scratch." in folder.stderr
    oneshot = CliRunner().invoke(
        app,
        ["quantize", REPO, "--recipe", "nvfp4", "--engine", "oneshot", "--scratch", "1GB", *out],
    )
    assert oneshot.exit_code == 2
    assert "--scratch needs the stream engine" in oneshot.stderr
