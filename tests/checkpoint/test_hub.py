"""`HubRepo` reads a repo by ranges of files, and names every failure of the hub in one sentence."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from huggingface_hub import constants

import mquant.checkpoint.hub as hub_module
from fakehub import GOOD_TOKEN, POOR_TOKEN, FakeHub, hub
from mquant.checkpoint import Folder, open_checkpoint
from mquant.checkpoint.download import download
from mquant.checkpoint.hub import HubRepo
from mquant.errors import SourceError
from mquant.events import Event, Progress, silent
from mquant.family import load_families
from mquant.synth import Sizes, synth

__all__ = ["hub"]

REPO = "org/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of 22 MB in 5 shards, with other files that repos have."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    sizes = Sizes(hidden=512, intermediate=512)
    synth(path, load_families()["minimax_m2"], sizes=sizes, max_shard_bytes=6_000_000)
    (path / "README.md").write_text("# A model\n")
    (path / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (path / "pytorch_model.bin").write_bytes(bytes(1_000_000))
    (path / "original").mkdir()
    (path / "original/consolidated.safetensors").write_bytes(bytes(1_000_000))
    (path / "odd [name]").mkdir()
    (path / "odd [name]/vocab*.txt").write_text("a\nb\n")
    return path


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mquant.checkpoint.retry.BACKOFF_SECONDS", 0.001)


def refusal(repo_id: str = REPO, revision: str | None = None) -> SourceError:
    """Return the error that opening the checkpoint raises."""
    with pytest.raises(SourceError) as caught:
        open_checkpoint(HubRepo(repo_id, revision))
    error = caught.value
    assert error.exit_code == 1
    assert error.fix
    assert "hf_" not in error.message + error.fix.replace("`hf auth login`", "")
    assert "\n" not in error.message + error.fix
    return error


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


def test_a_repo_that_does_not_exist_is_named(hub: FakeHub) -> None:
    error = refusal("org/nothing")
    assert error.message == "There is no repo org/nothing on 127.0.0.1, or it is private."
    assert "`hf auth login` or set HF_TOKEN" in error.fix


def test_a_repo_that_does_not_exist_is_named_despite_a_token(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", POOR_TOKEN)
    error = refusal("org/nothing")
    assert error.message == "There is no repo org/nothing on 127.0.0.1, or it is private."
    assert "use a token that may read the repo" in error.fix


def test_a_private_repo_needs_a_token(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, folder, access="private")
    assert "or it is private" in refusal().message
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    assert open_checkpoint(HubRepo(REPO)).tensors


def test_a_revision_that_does_not_exist_is_named(hub: FakeHub, folder: Path) -> None:
    hub.add(REPO, folder)
    error = refusal(revision="v9")
    assert error.message == "org/tiny has no revision 'v9'."
    assert "--revision" in error.fix


@pytest.mark.parametrize("token", ["", POOR_TOKEN])
def test_a_gated_repo_is_refused_with_the_page_that_grants_access(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    hub.add(REPO, folder, access="gated")
    monkeypatch.setenv("HF_TOKEN", token)
    error = refusal()
    assert error.message == "org/tiny is gated: its owner grants access on request."
    assert f"Ask for access at {hub.url}/org/tiny" in error.fix
    assert ("use a token that may read the repo" if token else "hf auth login") in error.fix
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    assert open_checkpoint(HubRepo(REPO)).tensors


def test_an_unknown_token_is_named(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, folder)
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    assert refusal().message == "127.0.0.1 does not accept your token."


def test_a_malformed_token_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_\u00e4\x01")
    assert "HF_ENDPOINT or the token is malformed" in refusal().message


def test_a_forbidden_repo_is_named(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, folder)
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    hub.fail(403)
    assert refusal().message == "127.0.0.1 forbids reading org/tiny with your token."


def test_a_disabled_repo_is_named(hub: FakeHub) -> None:
    hub.fail(403, X_Error_Message="Access to this resource is disabled.")
    assert refusal().message == "127.0.0.1 has disabled org/tiny."


def test_a_listed_file_that_the_hub_does_not_serve_is_named(hub: FakeHub, folder: Path) -> None:
    hub.add(REPO, folder)
    repo = HubRepo(REPO)
    hub.fail(404, X_Error_Code="EntryNotFound")
    with pytest.raises(SourceError, match=r"org/tiny lists config\.json but does not serve it"):
        repo.read("config.json")
    with pytest.raises(SourceError, match="has no file 'nothing'"):
        repo.read("nothing")


def test_a_hub_that_does_not_answer_is_named_without_its_password(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv(
            "HF_ENDPOINT", f"http://me:hf_secret@127.0.0.1:{unused.getsockname()[1]}"
        )
        error = refusal()
    assert error.message == "127.0.0.1 cannot be reached."
    assert "HF_ENDPOINT" in error.fix


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:80", "ftp://127.0.0.1", "http://127.0.0.1:x", "http://[::1"]
)
def test_an_endpoint_that_is_no_url_is_refused(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "cannot be asked: HF_ENDPOINT" in refusal().message


def test_offline_mode_asks_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refusal()
    assert error.message == "HF_HUB_OFFLINE is set, so org/tiny cannot be read from 127.0.0.1."
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "a b/c", "../x", "org/x..y", "org/" + "x" * 99])
def test_a_malformed_repo_id_is_refused(hub: FakeHub, repo_id: str) -> None:
    assert "neither an existing folder nor a hub repo id" in refusal(repo_id).message


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_transient_failures_are_retried(hub: FakeHub, folder: Path, status: int) -> None:
    hub.add(REPO, folder)
    hub.fail(status, times=4)
    repo = HubRepo(REPO)
    assert repo.requests == 5
    hub.fail(status, times=4)
    assert open_checkpoint(repo).tensors == open_checkpoint(Folder(folder)).tensors


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(503, "reports an error (HTTP 503)"), (429, "limits the number of requests (HTTP 429)")],
)
def test_permanent_failures_end_after_five_tries(hub: FakeHub, status: int, sentence: str) -> None:
    hub.fail(status, times=100)
    assert sentence in refusal().message
    assert len(hub.requests) == 5


def test_retries_wait_as_long_as_the_hub_asks(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, folder)
    waits: list[float] = []
    monkeypatch.setattr("mquant.checkpoint.retry.time.sleep", waits.append)
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    hub.fail(503, Retry_After="7")
    hub.fail(429, Retry_After=soon)
    hub.fail(429, RateLimit='"api";r=0;t=55')
    hub.fail(503, Retry_After="soon")
    HubRepo(REPO)
    assert waits[0] == 7
    assert 25 < waits[1] <= 30
    assert waits[2] == 55
    assert waits[3] < 0.1


def test_a_retry_after_hours_is_not_awaited(hub: FakeHub) -> None:
    hub.fail(429, Retry_After="7200")
    assert "HTTP 429" in refusal().message
    assert len(hub.requests) == 1


def test_a_connection_that_breaks_is_retried_and_then_reported(hub: FakeHub, folder: Path) -> None:
    hub.add(REPO, folder)
    repo = HubRepo(REPO)
    hub.forget()
    hub.ranges = "cut short"
    with pytest.raises(SourceError, match=r"cannot be reached|sent"):
        repo.read("model.safetensors.index.json")
    assert len(hub.requests) == 5


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


def test_redirects_without_end_are_refused(hub: FakeHub, folder: Path) -> None:
    hub.add(REPO, folder)
    hub.redirect_to = hub.url + "{path}"
    assert "redirects without end" in refusal().message


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("ftp://127.0.0.1/", "redirects to an address that begins with 'ftp'"),
        ("http://127.0.0.1:x/", "127.0.0.1 cannot be reached"),
        ("http://[::1", "127.0.0.1 cannot be reached"),
    ],
)
def test_redirects_to_unusable_addresses_are_refused(
    hub: FakeHub, folder: Path, target: str, sentence: str
) -> None:
    hub.add(REPO, folder)
    hub.redirect_to = target
    assert sentence in refusal().message


@pytest.mark.parametrize(
    "edit",
    [
        {"sha": "main"},
        {"sha": None},
        {"siblings": None},
        {"siblings": [{"rfilename": "config.json"}]},
        {"siblings": [{"rfilename": "../config.json", "size": 3}]},
        {"siblings": [{"rfilename": "/etc/passwd", "size": 3}]},
        {"siblings": [{"rfilename": "a\\b", "size": 3}]},
        {"siblings": [{"rfilename": "a\x1b[2J", "size": 3}]},
        {"siblings": [{"rfilename": "config.json", "size": -1}]},
        {"siblings": [{"rfilename": "config.json", "size": True}]},
        {"siblings": ["config.json"]},
        [],
        "{",
    ],
)
def test_a_malformed_listing_is_refused(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, edit: dict[str, object] | list[object] | str
) -> None:
    good = {"sha": "0" * 40, "siblings": [{"rfilename": "config.json", "size": 3}]}
    answer = {**good, **edit} if isinstance(edit, dict) else edit
    raw = answer if isinstance(answer, str) else json.dumps(answer)
    monkeypatch.setattr(HubRepo, "_whole", lambda *_: raw.encode())
    assert "127.0.0.1 " in refusal().message


def test_download_stores_identical_files_of_the_commit(hub: FakeHub, folder: Path) -> None:
    commit = hub.add(REPO, folder)
    repo = HubRepo(REPO)
    events: list[Event] = []
    snapshot = download(repo, events.append)
    assert snapshot.name == commit
    downloaded, original = Folder(snapshot), Folder(folder)
    skipped = {"pytorch_model.bin", "original/consolidated.safetensors"}
    assert set(downloaded.files) == set(original.files) - skipped
    assert all(downloaded.read(path) == original.read(path) for path in downloaded.files)
    total = sum(downloaded.files.values())
    assert events[-1] == Progress("download", total, total)
    assert all(isinstance(e, Progress) and 0 < e.done <= e.total == total for e in events)
    hub.forget()
    assert download(repo, silent) == snapshot
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
