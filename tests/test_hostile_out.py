"""mquant changes no file outside OUT and does not hang if OUT, a hub or a loader is hostile."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fakehub import FakeHub, hub
from make import make_checkpoint
from mquant.checkpoint import CONFIG_NAME, Folder, open_checkpoint
from mquant.checkpoint.download import download
from mquant.checkpoint.hub import HubRepo
from mquant.errors import LoaderError, MquantError, OutputError
from mquant.output import LEDGER, RECORD, Claim, Ledger, State, discard, examine, free_disk
from mquant.output import ledger as ledger_module
from mquant.output.ledger import read_ledger
from mquant.verify.loaders import ask_vllm
from run import plan_of, quantize_nvfp4

__all__ = ["hub"]

RUN = {"source": "aa"}


def read_record(out: Path) -> Any:
    return json.loads((out / RECORD).read_text())


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "src")


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """Yield a file outside of OUT, and check that the test did not change the file."""
    path = tmp_path / "elsewhere" / "victim"
    path.parent.mkdir()
    path.write_text("years of work")
    yield path
    assert path.read_text() == "years of work"
    assert list(path.parent.iterdir()) == [path]


def sentence(run: Any, *arguments: Any) -> str:
    """Return the message of the error that a call raises."""
    with pytest.raises(MquantError) as caught:
        run(*arguments)
    assert caught.value.fix
    return caught.value.message


# --- OUT


def test_a_ledger_that_is_a_link_is_not_written_through(tmp_path: Path, victim: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / LEDGER).symlink_to(victim)

    with pytest.raises(OutputError, match="mquant did not make it"):
        examine(out, [], RUN, restart=True)
    with pytest.raises(OutputError, match="cannot be written"):
        Ledger(out)


def test_a_name_that_no_folder_can_have_is_refused(src: Path, tmp_path: Path) -> None:
    out = tmp_path / ("x" * 300)

    assert sentence(free_disk, out).endswith("cannot be accessed: File name too long.")
    assert sentence(quantize_nvfp4, src, out).endswith("cannot be accessed: File name too long.")


def test_a_ledger_that_is_a_pipe_is_no_ledger(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LEDGER)

    assert read_ledger(tmp_path) is None


def test_a_ledger_cannot_count_more_jobs_than_there_are_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_MOST_JOBS", 10)
    lines = ({"jobs": [[0, 9_999_999]]}, {"jobs": [[0, 7]]}, {"jobs": [[20, 27]]})
    (tmp_path / LEDGER).write_text("".join(json.dumps(line) + "\n" for line in lines))

    ledger = read_ledger(tmp_path)

    assert ledger is not None
    assert list(ledger.units) == [0, 1, 2, 3, 4, 5, 6, 7, 20, 21]


@pytest.mark.parametrize("name", ["sub/victim", "../elsewhere/victim", "x" * 300, "a\0b", "\ud800"])
def test_a_record_deletes_nothing_outside_of_out(tmp_path: Path, victim: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "sub").symlink_to(victim.parent)
    (out / RECORD).write_text(json.dumps({"files": {name: {}}, "fingerprint": {}}))

    claim = examine(out, [], RUN, restart=True)
    discard(out, claim.files)

    assert claim == Claim(State.UNFINISHED, (RECORD,))


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00001.safetensors",
        "model-00001-of-00001.safetensors.partial",
        "recipe.yaml.partial",
        "config.json.partial",
    ],
)
@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_link_in_an_unfinished_out_is_not_written_through(
    src: Path, tmp_path: Path, victim: Path, name: str, make: Callable[[Path, Path], None]
) -> None:
    out = tmp_path / "out"
    quantize_nvfp4(src, out)
    record = json.loads((out / RECORD).read_text())
    for file in (CONFIG_NAME, "model-00001-of-00001.safetensors"):
        (out / file).unlink()
    make(victim, out / name)
    head = {"schema": "mquant.run/2", "fingerprint": record["fingerprint"], "files": [CONFIG_NAME]}
    (out / LEDGER).write_text(json.dumps(head) + "\n")

    quantize_nvfp4(src, out)
    assert read_record(out) == record


@pytest.mark.parametrize("end", ["", ".partial"])
def test_a_shard_with_another_name_is_made_again_and_not_resumed_in_place(
    src: Path, tmp_path: Path, end: str
) -> None:
    out, shard = quantize_nvfp4(src, tmp_path / "out"), "model-00001-of-00001.safetensors"
    right, record = (out / shard).read_bytes(), read_record(out)
    (out / CONFIG_NAME).unlink()
    (out / shard).unlink()
    backup = tmp_path / "backup"
    backup.write_bytes(b"x" * len(right))
    (out / (shard + end)).hardlink_to(backup)
    units = list(plan_of(src).units)
    ledger = Ledger(out)
    ledger.begin(record["fingerprint"], [shard, CONFIG_NAME], afresh=True)
    ledger.read_from({path: Folder(src).stamps[path] for unit in units for path in unit.files})
    ledger.count(range(len(units)))
    ledger.release()

    quantize_nvfp4(src, out)
    assert (out / shard).read_bytes() == right
    assert backup.read_bytes() == b"x" * len(right)


def test_side_files_do_not_follow_a_linked_folder(src: Path, tmp_path: Path, victim: Path) -> None:
    (src / "sub").mkdir()
    (src / "sub" / "victim").write_text("overwritten")
    out = tmp_path / "out"
    ledger = Ledger(out)
    ledger.release()
    (out / LEDGER).write_text("")
    real_begin = Ledger.begin

    def begin(self: Ledger, *args: Any, **kwargs: Any) -> None:
        real_begin(self, *args, **kwargs)
        (out / "sub").symlink_to(victim.parent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "begin", begin)
        assert sentence(quantize_nvfp4, src, out).startswith(f"{out}/sub is a link")


# --- the hub, and vLLM


def test_a_download_with_a_malformed_listing_is_refused(hub: FakeHub, src: Path) -> None:
    hub.add("org/model", src)
    repo = HubRepo("org/model")
    hub.tamper = lambda answer: answer.replace(b'"size"', b'"sise"').replace(b'"oid"', b'"odi"')

    message = sentence(download, repo, lambda event: None)
    assert "in a way huggingface_hub does not understand" in message


@pytest.mark.parametrize("name", ["", "../x", "/x", "a/../x", "a\\x", "a\nb", "\ud800", "x" * 1025])
def test_a_listing_with_an_unsafe_file_name_is_refused(hub: FakeHub, src: Path, name: str) -> None:
    hub.add("org/model", src)
    table = {"sha": "a" * 40, "siblings": [{"rfilename": name, "size": 1}]}
    hub.tamper = lambda answer: json.dumps(table).encode()

    assert "lists the repo in a way mquant does not understand" in sentence(HubRepo, "org/model")


def test_a_probe_that_takes_too_long_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/child\nwait\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(ask_vllm, "_SECONDS", 0.5)

    reason = ask_vllm._run(stand_in, tmp_path, tmp_path / "result.json", lambda: None)

    assert reason == "it took more than 0.5 seconds"
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "cmdline")
    while child.exists() and child.read_bytes():  # a killed process may take a moment to end
        time.sleep(0.01)


def test_a_shard_size_that_no_file_can_have_is_refused(src: Path, tmp_path: Path) -> None:
    class Huge(Folder):
        def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
            return b"\0" * 8 if end is not None else super().read(path)

    source = Huge(src)
    shard = open_checkpoint(Folder(src)).shards[0]
    source.files = {**source.files, shard: 2**63 - 1}

    with pytest.raises(LoaderError, match="mquant cannot write model-00001"):
        ask_vllm._materialise(source, (shard,), tmp_path / "given")
