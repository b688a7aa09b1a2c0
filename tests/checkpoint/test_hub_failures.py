"""`HubRepo` names every failure of the hub in one sentence, and retries the transient ones."""

import json
import re
import socket
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from checkpoint.hub_folder import REPO, fast_retries, folder
from fakehub import GOOD_TOKEN, POOR_TOKEN, FakeHub, hub
from hub_repos import Request
from mquant.checkpoint import Folder, open_checkpoint
from mquant.checkpoint.hub import HubRepo
from mquant.errors import SourceError
from mquant.events import silent

__all__ = ["fast_retries", "folder", "hub"]


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


def test_a_retry_after_hours_is_not_awaited_but_told(hub: FakeHub) -> None:
    hub.fail(429, Retry_After=str(28 * 3600))
    error = refusal()
    until = datetime.now(UTC).astimezone() + timedelta(hours=28)
    assert re.fullmatch(
        r"127\.0\.0\.1 limits the number of requests \(HTTP 429\): the hub asks to wait until "
        rf"\d\d:\d\d {until:%Z} on {until:%Y-%m-%d}\.",
        error.message,
    )
    assert error.fix == "Run the same command again then; it resumes."
    assert len(hub.requests) == 1


def test_a_download_does_not_wait_hours_in_silence(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: Request) -> tuple[int, dict[str, str]] | None:
        return (429, {"Retry-After": "100800"}) if "/resolve/" in request.path else None

    def sleep(seconds: float) -> None:
        pytest.fail(f"huggingface_hub waits {seconds} s")

    hub.add(REPO, folder)
    repo = HubRepo(REPO)
    monkeypatch.setattr(hub, "note", answer)
    monkeypatch.setattr(_http, "time", SimpleNamespace(time=time.time, sleep=sleep))
    with pytest.raises(SourceError, match="the hub asks to wait until"):
        repo.materialize(silent)


@pytest.mark.parametrize("wait", ["9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_retry_after_the_last_year_is_told_too(hub: FakeHub, wait: str) -> None:
    hub.fail(503, Retry_After=wait)
    assert "(HTTP 503): the hub asks to wait until " in refusal().message


def test_a_connection_that_breaks_is_retried_and_then_reported(hub: FakeHub, folder: Path) -> None:
    hub.add(REPO, folder)
    repo = HubRepo(REPO)
    hub.forget()
    hub.ranges = "cut short"
    with pytest.raises(SourceError, match=r"cannot be reached|sent"):
        repo.read("model.safetensors.index.json")
    assert len(hub.requests) == 5


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
