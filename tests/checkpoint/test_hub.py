"""`HubRepo` reads a repo at one commit by ranges of files, and `download` stores all its files."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from huggingface_hub import constants

import mquant.checkpoint.hub as hub_module
from checkpoint.hub_folder import REPO, fast_retries, folder
from fakehub import GOOD_TOKEN, FakeHub, hub
from mquant.checkpoint import Folder, open_checkpoint
from mquant.checkpoint.download import download
from mquant.checkpoint.hub import HubRepo
from mquant.errors import SourceError
from mquant.events import Event, Progress, silent
from mquant.family_files import load_families
from mquant.synth import Sizes, synth

__all__ = ["fast_retries", "folder", "hub"]


# --- reading


def test_a_repo_is_the_same_checkpoint_as_its_folder_from_far_fewer_bytes(
    hub: FakeHub, folder: Path
) -> None:
    commit = hub.add(REPO, folder)
    repo = HubRepo(REPO)
    local, remote = open_checkpoint(Folder(folder)), open_checkpoint(repo)
    assert remote.tensors == local.tensors
    assert remote.config == local.config
    assert remote.shards == local.shards
    assert remote.side_files == local.side_files
    assert remote.findings == local.findings == ()
    assert repo.files == Folder(folder).files
    assert repo.name == REPO
    assert repo.identity() == {"kind": "hub", "repo": REPO, "commit": commit}
    assert local.nbytes > 20_000_000
    assert repo.bytes_read < local.nbytes / 20
    # The server may have sent more than the reader read: the sockets buffer the difference.
    assert repo.bytes_read <= hub.bytes_served < local.nbytes / 20
    assert repo.requests == len(hub.requests)


def test_reads_are_exact_from_many_threads(hub: FakeHub, folder: Path) -> None:
    hub.add(REPO, folder)
    repo, local = HubRepo(REPO), Folder(folder)
    shard = open_checkpoint(local).shards[0]
    size = local.files[shard]
    spans = [(0, size), (0, 1), (size - 1, size), (7, 7), (size, size)]
    spans += [(start, start + 3001) for start in range(0, 60_000, 3000)]
    before = repo.bytes_read
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda span: repo.read(shard, *span), spans))
    assert parts == [local.read(shard, *span) for span in spans]
    assert repo.bytes_read - before == sum(end - start for start, end in spans)
    assert repo.read("odd [name]/vocab*.txt") == b"a\nb\n"


@pytest.mark.parametrize("span", [(0, 10**12), (-1, 3), (5, 2)])
def test_spans_outside_of_a_file_are_refused(
    hub: FakeHub, folder: Path, span: tuple[int, int]
) -> None:
    hub.add(REPO, folder)
    with pytest.raises(SourceError, match="ends at byte"):
        HubRepo(REPO).read("config.json", *span)


def test_a_revision_is_pinned_to_its_commit(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for path, layers in ((old, 1), (new, 3)):
        synth(path, load_families()["minimax_m2"], sizes=Sizes(layers=layers))
    first = hub.add(REPO, old)
    hub.add(REPO, new, revision="pr/2 x")
    repo = HubRepo(REPO)
    assert hub.add(REPO, new) != first
    assert open_checkpoint(repo).config["num_hidden_layers"] == 1
    assert HubRepo(REPO, first).identity() == repo.identity()
    assert open_checkpoint(HubRepo(REPO, "pr/2 x")).config["num_hidden_layers"] == 3


def test_a_server_that_ignores_ranges_is_cut_off(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, folder)
    repo, local = HubRepo(REPO), Folder(folder)
    shard = open_checkpoint(local).shards[0]
    hub.ranges = "ignored"
    before = repo.bytes_read
    assert repo.read(shard, 0, 1000) == local.read(shard, 0, 1000)
    assert repo.read(shard, 300_000, 300_010) == local.read(shard, 300_000, 300_010)
    assert repo.bytes_read - before < 500_000
    monkeypatch.setattr(hub_module, "MAX_SKIPPED_BYTES", 100_000)
    with pytest.raises(SourceError, match="does not serve parts of files"):
        repo.read(shard, 300_000, 300_010)


def test_another_range_than_asked_for_is_refused(hub: FakeHub, folder: Path) -> None:
    hub.add(REPO, folder)
    repo = HubRepo(REPO)
    hub.ranges = "shifted"
    with pytest.raises(SourceError, match=r"another part of config\.json than asked for"):
        repo.read("config.json", 2, 10)


def test_the_token_goes_to_the_hub_alone(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    hub.add(REPO, folder, access="gated")
    open_checkpoint(HubRepo(REPO))
    sent = {request.host: request.authorization for request in hub.requests}
    assert sent == {"127.0.0.1": f"Bearer {GOOD_TOKEN}", "localhost": None}


def test_the_token_does_not_go_to_another_port_of_the_hubs_host(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    hub.add(REPO, folder, access="gated")
    with closing(FakeHub()) as other:
        other.add(REPO, folder)
        hub.redirect_to = other.url + "{path}"
        repo = HubRepo(REPO)
        open_checkpoint(repo)
        download(repo, silent)
        assert {request.authorization for request in other.requests} == {None}
        assert {request.authorization for request in hub.requests} == {f"Bearer {GOOD_TOKEN}"}


def test_the_hub_is_asked_once_for_the_address_of_a_file(hub: FakeHub, folder: Path) -> None:
    hub.add(REPO, folder)
    repo = HubRepo(REPO)
    shard = next(path for path in repo.files if path.endswith(".safetensors"))
    hub.forget()
    content = (folder / shard).read_bytes()
    assert [repo.read(shard, n, n + 10) for n in (0, 99)] == [content[:10], content[99:109]]
    assert [request.host for request in hub.requests] == ["127.0.0.1", "localhost", "localhost"]


def test_an_expired_address_of_a_file_is_asked_for_again(hub: FakeHub, folder: Path) -> None:
    hub.add(REPO, folder)
    repo = HubRepo(REPO)
    shard = next(path for path in repo.files if path.endswith(".safetensors"))
    repo.read(shard, 0, 10)
    hub.forget()
    hub.fail(403)  # the answer of a link that expired
    assert repo.read(shard, 0, 10) == (folder / shard).read_bytes()[:10]
    hosts = [request.host for request in hub.requests]
    assert hosts == ["localhost", "127.0.0.1", "localhost"]


# --- downloading


def test_download_stores_identical_files_of_the_commit(hub: FakeHub, folder: Path) -> None:
    commit = hub.add(REPO, folder)
    repo = HubRepo(REPO)
    events: list[Event] = []
    downloaded = download(repo, events.append)
    assert downloaded.name == commit
    original = Folder(folder)
    skipped = {"pytorch_model.bin", "original/consolidated.safetensors"}
    assert set(downloaded.files) == set(original.files) - skipped
    assert all(downloaded.read(path) == original.read(path) for path in downloaded.files)
    total = sum(downloaded.files.values())
    assert Progress("download", total, total) in events
    assert events[-1] == Progress("hash", total, total)
    assert all(isinstance(e, Progress) and 0 < e.done <= e.total == total for e in events)
    hub.forget()
    assert download(repo, silent).root == downloaded.root
    assert hub.bytes_served == 0


def test_download_prints_nothing(
    hub: FakeHub, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add(REPO, folder)
    repo = HubRepo(REPO)
    hub.fail(503, times=2, Retry_After="0")
    download(repo, silent)
    assert capfd.readouterr() == ("", "")


def test_download_refuses_a_gated_repo(hub: FakeHub, folder: Path) -> None:
    hub.add(REPO, folder, access="gated")
    with pytest.raises(SourceError, match="org/tiny is gated") as caught:
        download(HubRepo(REPO), silent)
    assert "Ask for access" in caught.value.fix


def test_download_refuses_offline_mode(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, folder)
    repo = HubRepo(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        download(repo, silent)


def test_download_refuses_a_cache_that_cannot_be_written(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add(REPO, folder)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="cannot be stored in the Hugging Face cache") as caught:
        download(HubRepo(REPO), silent)
    assert "HF_HOME" in caught.value.fix
