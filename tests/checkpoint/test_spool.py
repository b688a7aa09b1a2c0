"""The spool downloads a hub repo's files through a folder of bounded size."""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import mquant.checkpoint.spool as spool_module
from checkpoint.hub_folder import REPO
from fakehub import FakeHub, hub
from mquant.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from mquant.checkpoint.hub import HubRepo
from mquant.checkpoint.spool import Spool, least_room, parts_of
from mquant.errors import OutputError, SourceError
from mquant.events import Event, Progress, silent
from mquant.family_files import load_families
from mquant.synth import Sizes, synth

__all__ = ["hub"]

SHARD = 6_000_000
Work = dict[int, list[TensorInfo]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of 22 MB in 5 shards."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    sizes = Sizes(hidden=512, intermediate=512)
    synth(path, load_families()["minimax_m2"], sizes=sizes, max_shard_bytes=SHARD)
    return path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "PIECE", 300_000)
    monkeypatch.setattr("mquant.checkpoint.retry.BACKOFF_SECONDS", 0.001)


@pytest.fixture
def repo(hub: FakeHub, folder: Path) -> HubRepo:
    """Return the checkpoint's repo. The hub's counters restart at 0."""
    hub.add(REPO, folder)
    repo = HubRepo(REPO)
    hub.forget()
    return repo


def work_of(checkpoint: Checkpoint) -> Work:
    """Return one work unit for each tensor, in the order of shards and offsets."""
    infos = sorted(checkpoint.tensors.values(), key=lambda info: (info.shard, info.start))
    return dict(enumerate([info] for info in infos))


def spool_of(repo: HubRepo, scratch: Path, work: Work, room: int = 2 * SHARD) -> Spool:
    parts = parts_of(repo, open_checkpoint(repo).tensors.values(), work)
    return Spool(repo, scratch, room, parts, work, silent)


def read(spool: Spool, info: TensorInfo) -> bytes:
    data = bytearray(info.nbytes)
    spool.read_into(info.shard, info.start, memoryview(data))
    return bytes(data)


def size_of(scratch: Path) -> int:
    return sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())


def test_every_tensor_is_read_exactly_within_the_room(
    repo: HubRepo, folder: Path, tmp_path: Path
) -> None:
    work, most = work_of(open_checkpoint(repo)), 0
    with spool_of(repo, tmp_path / "s", work) as spool:
        for number, (info,) in work.items():
            content = (folder / info.shard).read_bytes()
            assert read(spool, info) == content[info.start : info.end]
            most = max(most, size_of(tmp_path / "s"))
            spool.done([number])
    assert SHARD < most <= 2 * SHARD
    spool.clear()
    assert not (tmp_path / "s").exists()


def test_every_file_is_downloaded_once(
    hub: FakeHub, repo: HubRepo, folder: Path, tmp_path: Path
) -> None:
    work = work_of(open_checkpoint(repo))
    shards = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    spool = spool_of(repo, tmp_path / "s", work)
    hub.forget()
    with spool:
        for number, (info,) in work.items():
            read(spool, info)
            spool.done([number])
    assert hub.bytes_served == shards


def test_the_least_room_is_that_of_files_needed_at_once(repo: HubRepo, tmp_path: Path) -> None:
    work = work_of(open_checkpoint(repo))
    parts = parts_of(repo, open_checkpoint(repo).tensors.values(), work)
    assert least_room(parts) == max(part.nbytes for part in parts)
    last = max(work)
    work[last + 1] = [*work[0], *work[last]]  # the last work unit needs the first file too
    parts = parts_of(repo, open_checkpoint(repo).tensors.values(), work)
    sizes = [part.nbytes for part in parts]
    assert least_room(parts) == sizes[0] + max(sizes[1:])
    with spool_of(repo, tmp_path / "s", work, least_room(parts)) as spool:
        for number, infos in work.items():
            for info in infos:
                read(spool, info)
            spool.done([number])


def test_an_interrupted_download_is_resumed(
    hub: FakeHub, repo: HubRepo, folder: Path, tmp_path: Path
) -> None:
    work = work_of(open_checkpoint(repo))
    first = work[0][0].shard
    spool = spool_of(repo, tmp_path / "s", work)
    partial = tmp_path / "s" / repo.commit / (first + ".partial")
    partial.write_bytes((folder / first).read_bytes()[:2_000_000])
    hub.forget()
    with spool:
        assert read(spool, work[0][0])
        while hub.bytes_served < 1_000_000:
            time.sleep(0.01)
    asked = [r.range for r in hub.requests if r.path.endswith(first)]
    assert min(int(r.split("=")[1].split("-")[0]) for r in asked if r) == 2_000_000


def test_a_whole_file_is_not_downloaded_again(hub: FakeHub, repo: HubRepo, tmp_path: Path) -> None:
    work = work_of(open_checkpoint(repo))
    first = work[0][0].shard
    with spool_of(repo, tmp_path / "s", work) as spool:
        read(spool, work[0][0])
    again = spool_of(repo, tmp_path / "s", work)
    hub.forget()
    with again:
        read(again, work[0][0])
    assert not [r for r in hub.requests if r.path.endswith(first)]


def test_a_whole_file_is_not_downloaded_again_if_a_part_of_the_file_is_needed(
    hub: FakeHub, repo: HubRepo, folder: Path, tmp_path: Path
) -> None:
    work = work_of(open_checkpoint(repo))
    with spool_of(repo, tmp_path / "s", work) as spool:
        read(spool, work[0][0])
        spool.done([0])
    del work[0]
    again = spool_of(repo, tmp_path / "s", work)
    hub.forget()
    with again:
        info = work[1][0]
        assert read(again, info) == (folder / info.shard).read_bytes()[info.start : info.end]
    assert not [r for r in hub.requests if r.path.endswith(info.shard)]


def test_only_the_needed_part_of_a_file_is_downloaded(
    hub: FakeHub, repo: HubRepo, folder: Path, tmp_path: Path
) -> None:
    work = work_of(open_checkpoint(repo))
    (info,) = work.pop(1)
    spool = spool_of(repo, tmp_path / "s", {1: [info]})
    hub.forget()
    with spool:
        assert read(spool, info) == (folder / info.shard).read_bytes()[info.start : info.end]
        assert size_of(tmp_path / "s") == hub.bytes_served == info.nbytes


def test_a_file_with_another_sha256_is_refused_and_deleted(
    hub: FakeHub, repo: HubRepo, tmp_path: Path
) -> None:
    work = work_of(open_checkpoint(repo))
    first = work[0][0].shard
    spool = spool_of(repo, tmp_path / "s", work)
    (tmp_path / "s" / repo.commit / (first + ".partial")).write_bytes(b"not what is there" * 999)
    with spool, pytest.raises(SourceError, match=f"{first} of {REPO} does not have the sha256"):
        read(spool, work[0][0])
    assert not list((tmp_path / "s").rglob(f"{first}*"))


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_unused_files_are_deleted_and_links_are_not_followed(
    repo: HubRepo, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    work = work_of(open_checkpoint(repo))
    first = work[0][0].shard
    inside = tmp_path / "s" / repo.commit
    inside.mkdir(parents=True)
    other = tmp_path / "other"
    other.write_bytes(b"somebody's")
    make(other, inside / (first + ".partial"))
    (inside / "stray").write_bytes(b"x")
    (tmp_path / "s" / ("0" * 40)).mkdir()
    (tmp_path / "s" / ("0" * 40) / first).write_bytes(b"of another commit")
    with spool_of(repo, tmp_path / "s", work) as spool:
        read(spool, work[0][0])
    assert other.read_bytes() == b"somebody's"
    assert not list((tmp_path / "s").rglob("stray"))
    assert not (tmp_path / "s" / ("0" * 40)).exists()


@pytest.mark.parametrize("link", ["s", "s/COMMIT"])
def test_a_folder_that_is_a_link_is_replaced(repo: HubRepo, tmp_path: Path, link: str) -> None:
    other = tmp_path / "other"
    (other / repo.commit).mkdir(parents=True)
    (other / "kept").write_text("somebody's")
    place = tmp_path / link.replace("COMMIT", repo.commit)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(other)
    work = work_of(open_checkpoint(repo))
    with spool_of(repo, tmp_path / "s", work) as spool:
        read(spool, work[0][0])
    assert sorted(path.name for path in other.rglob("*")) == sorted(["kept", repo.commit])


def test_a_failing_hub_is_one_sentence_to_every_waiting_reader(
    hub: FakeHub, repo: HubRepo, tmp_path: Path
) -> None:
    work = work_of(open_checkpoint(repo))
    spool = spool_of(repo, tmp_path / "s", work)
    hub.fail(500, times=500)
    with spool, pytest.raises(SourceError, match="reports an error"):
        read(spool, work[0][0])


def test_a_waiting_reader_can_be_stopped(repo: HubRepo, tmp_path: Path) -> None:
    work = work_of(open_checkpoint(repo))
    last = work[max(work)][0]
    with spool_of(repo, tmp_path / "s", work, SHARD) as spool:
        threading.Timer(0.2, spool.stop).start()
        with pytest.raises(SourceError, match="Stopped"):
            read(spool, last)  # the room is full: no work unit releases the first file


def test_progress_counts_files_of_an_earlier_run(repo: HubRepo, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(repo)
    work = work_of(checkpoint)
    parts = parts_of(repo, checkpoint.tensors.values(), work)
    with Spool(repo, tmp_path / "s", 3 * SHARD, parts, work, silent) as spool:
        read(spool, work[0][0])
    events: list[Event] = []
    parts = parts_of(repo, checkpoint.tensors.values(), work)
    with Spool(repo, tmp_path / "s", 3 * SHARD, parts, work, events.append) as spool:
        for number, (info,) in work.items():
            read(spool, info)
            spool.done([number])
    counts = [event.done for event in events if isinstance(event, Progress)]
    assert counts == sorted(counts)
    assert counts[0] >= parts[0].nbytes
    assert counts[-1] == sum(part.nbytes for part in parts)


def test_a_full_disk_is_one_sentence(
    repo: HubRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fdatasync", full)
    work = work_of(open_checkpoint(repo))
    with (
        spool_of(repo, tmp_path / "s", work) as spool,
        pytest.raises(OutputError, match=r"cannot be stored in .*: No space left on device"),
    ):
        read(spool, work[0][0])


def test_whole_files_are_what_the_hub_lists(repo: HubRepo, folder: Path, tmp_path: Path) -> None:
    work = work_of(open_checkpoint(repo))
    with spool_of(repo, tmp_path / "s", work) as spool:
        read(spool, work[0][0])
        path = tmp_path / "s" / repo.commit / work[0][0].shard
        assert hashlib.sha256(path.read_bytes()).hexdigest() == repo.sha256[path.name]
