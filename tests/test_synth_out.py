"""`synth` writes a whole checkpoint to an empty folder, or leaves no file."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from judges import hashes
from mquant.errors import InUse, OutputError
from mquant.events import Event, Progress
from mquant.family import Family
from mquant.output.ledger import Ledger
from mquant.synth import Sizes, synth
from synthetic import family, opened

__all__ = ["family"]


def killed(out: Path, family: Family, moves: int) -> int | None:
    """Write a checkpoint, and kill the process after `moves` files have moved to OUT.

    If all files have moved, the process dies before it removes the empty hidden folder.
    """
    process = multiprocessing.get_context("fork").Process(target=_die, args=(out, family, moves))
    process.start()
    process.join(60)
    return process.exitcode


def _die(out: Path, family: Family, moves: int) -> None:
    rename, left = Path.rename, moves

    def move(path: Path, target: Path) -> Path:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return rename(path, target)

    Path.rename = move  # type: ignore[method-assign, assignment]
    os.rmdir = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    synth(out, family, max_shard_bytes=300_000)


def test_an_out_that_is_not_empty_is_refused(tmp_path: Path, family: Family) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty") as caught:
        synth(tmp_path, family)
    assert caught.value.exit_code == 1
    assert "Give another folder" in caught.value.fix
    with pytest.raises(OutputError, match="is a file"):
        synth(tmp_path / "mine.txt", family)
    with pytest.raises(OutputError, match="cannot be written"):
        synth(tmp_path / "mine.txt" / "out", family)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_too_little_disk_is_refused_before_a_byte_is_written(
    tmp_path: Path, family: Family
) -> None:
    with pytest.raises(OutputError, match="are free there"):
        synth(tmp_path / "out", family, sizes=Sizes(vocab=10**13))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("existed", [True, False])
def test_a_run_that_fails_leaves_no_file(tmp_path: Path, family: Family, existed: bool) -> None:
    out = tmp_path / "out"
    if existed:
        out.mkdir()

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done > event.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth(out, family, max_shard_bytes=100_000, emit=stop)
    assert out.exists() == existed
    assert not existed or not any(out.iterdir())


def test_a_run_that_was_killed_is_run_again(tmp_path: Path, family: Family) -> None:
    right = hashes(synth(tmp_path / "right", family, max_shard_bytes=300_000).path)
    moves = len(right)
    for kill in range(moves + 1):
        out = tmp_path / str(kill)
        assert killed(out, family, kill) == -signal.SIGKILL
        assert synth(out, family, max_shard_bytes=300_000).path == out
        assert hashes(out) == right


def test_a_file_beside_those_of_a_killed_run_is_kept(tmp_path: Path, family: Family) -> None:
    killed(tmp_path, family, 2)
    (tmp_path / "mine.txt").write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OutputError, match="is not empty"):
        synth(tmp_path, family)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_two_runs_at_once_do_not_mix(tmp_path: Path, family: Family) -> None:
    def again(_: Event) -> None:
        with pytest.raises(InUse, match="Another mquant is writing"):
            synth(tmp_path, family)

    synth(tmp_path, family, emit=again)
    assert opened(tmp_path).tensors


def test_the_files_of_a_run_that_ends_just_before_the_lock_are_kept(
    tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Ledger):
        def __init__(self, out: Path, name: str) -> None:
            (out / "config.json").write_text("theirs")
            super().__init__(out, name)

    monkeypatch.setattr("mquant.output.staging.Ledger", Late)
    with pytest.raises(OutputError, match="is not empty"):
        synth(tmp_path, family)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "theirs"


def test_an_empty_folder_is_accepted_and_progress_adds_up(tmp_path: Path, family: Family) -> None:
    events: list[Event] = []
    synthetic = synth(tmp_path, family, emit=events.append)
    assert events[-1] == Progress("synth", synthetic.nbytes, synthetic.nbytes)
    assert opened(tmp_path).nbytes == synthetic.nbytes


def test_large_tensors_take_little_memory(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from mquant.family_files import load_families
from mquant.synth import Sizes, synth
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024

before = peak()
result = synth(Path(sys.argv[1]), load_families()["minimax_m2"], sizes=Sizes(layers=1, vocab=10**6))
print(result.nbytes, peak() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    size, memory = map(int, process.stdout.split())
    assert size > 500_000_000
    assert memory < 50_000_000


def test_the_command_line_reports_the_checkpoint_or_an_error(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "mquant", "synth", *arguments, "--format", "json"]
        process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        return process.returncode, json.loads(process.stdout)

    options = ("out", "--family", "minimax_m2", "--layers", "3", "--experts", "10", "--shapes-only")
    assert run(*options, "--dtype", "fp16", "--max-shard-size", "1GB") == (
        0,
        {
            "schema": "mquant.synth/1",
            "ok": True,
            "findings": [],
            "path": "out",
            "tensors": 3 + 3 * (10 + 30),
            "bytes": (checkpoint := opened(tmp_path / "out")).nbytes,
            "parameters": checkpoint.parameters,
            "shards": len(checkpoint.shards),
        },
    )
    assert checkpoint.config["hidden_size"] == 3072
    again, envelope = run(*options)
    assert again == 1
    assert envelope["error"]["message"] == "out is not empty."
    for misuse in (("--family", "minimax_m2"), ("new",), ("new", "--family", "gpt2")):
        code, envelope = run(*misuse)
        assert code == 2
        assert "mquant synth OUT --family minimax_m2" in envelope["error"]["fix"]
