"""`examine` tells the state of OUT, and `discard` deletes only files that mquant wrote there."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from mquant.errors import OutputError
from mquant.output import LEDGER, RECORD, Ledger, State, discard, examine

RUN = {"source": "aa", "plan": "bb"}


def finished(out: Path, fingerprint: dict[str, str]) -> None:
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "a.safetensors").write_bytes(b"weights")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
        for path in out.iterdir()
    }
    record = {"fingerprint": fingerprint, "files": files}
    (out / RECORD).write_text(json.dumps(record))


def unfinished(out: Path, fingerprint: dict[str, str]) -> None:
    ledger = Ledger(out)
    ledger.begin(fingerprint, ["a.safetensors", "sub/b.json", "config.json"], afresh=True)
    (out / "a.safetensors.partial").write_bytes(b"half")
    (out / "sub").mkdir()
    (out / "sub/b.json").write_text("{}")
    ledger.release()


def test_a_folder_that_does_not_exist_is_free(tmp_path: Path) -> None:
    assert examine(tmp_path / "out", [], RUN, restart=False).state is State.FREE
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    assert examine(tmp_path, [], RUN, restart=False).state is State.FREE


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_mquant_did_not_make_is_refused(tmp_path: Path, *, restart: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is not empty, and mquant did not make it") as caught:
        examine(tmp_path, [], RUN, restart=restart)
    assert caught.value.fix == "Give another folder with -o, or empty this one."


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        examine(tmp_path / "out", [], RUN, restart=False)


@pytest.mark.parametrize("out", ["src", "src/inside", "."])
def test_out_and_source_never_overlap(tmp_path: Path, out: str) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(OutputError, match="mquant never writes into the source"):
        examine(tmp_path / out, [tmp_path / "src"], RUN, restart=True)


def test_a_link_to_the_source_is_the_source(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "out").symlink_to("src")
    with pytest.raises(OutputError, match="overlap"):
        examine(tmp_path / "out", [tmp_path / "src"], RUN, restart=False)


def test_the_same_finished_run_is_done(tmp_path: Path) -> None:
    finished(tmp_path / "out", RUN)
    assert examine(tmp_path / "out", [], RUN, restart=False).state is State.DONE


@pytest.mark.parametrize("name", ["a.safetensors", "config.json"])
def test_a_finished_run_that_lost_a_file_starts_over(tmp_path: Path, name: str) -> None:
    finished(tmp_path / "out", RUN)
    (tmp_path / "out" / name).unlink()
    assert examine(tmp_path / "out", [], RUN, restart=False).state is State.UNFINISHED


def test_a_finished_run_with_a_changed_file_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished(out, RUN)
    (out / "a.safetensors").write_bytes(b"cut")
    with pytest.raises(OutputError, match="since mquant wrote it: its size was 7 bytes and is 3"):
        examine(out, [], RUN, restart=False)
    assert examine(out, [], RUN, restart=True).state is State.UNFINISHED


def test_another_finished_run_is_refused_with_both_values(tmp_path: Path) -> None:
    finished(tmp_path / "out", {"source": "aa", "plan": "cc"})
    with pytest.raises(OutputError, match="plan was cc, is bb") as caught:
        examine(tmp_path / "out", [], RUN, restart=False)
    assert "--restart" in caught.value.fix


def test_restart_deletes_only_recorded_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished(out, {"source": "other"})
    (out / "notes.txt").write_text("mine")
    discard(out, examine(out, [], RUN, restart=True).files)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt"]


@pytest.mark.parametrize("deleted", [0, 1, 2])
def test_a_restart_that_was_killed_while_it_deleted_can_be_run_again(
    tmp_path: Path, deleted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    finished(out, {"source": "other"})
    files, left, unlink = examine(out, [], RUN, restart=True).files, [deleted], Path.unlink

    def until_killed(path: Path) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", until_killed)
        discard(out, reversed(files))
    assert examine(out, [], RUN, restart=True).state is State.UNFINISHED
    assert deleted == 0 or not (out / "config.json").exists()


def test_an_unfinished_run_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unfinished(out, RUN)
    claim = examine(out, [], RUN, restart=False)
    assert claim.state is State.UNFINISHED
    assert claim.recorded is not None
    assert claim.recorded.fingerprint == RUN


def test_files_of_an_unfinished_run_can_be_discarded(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unfinished(out, RUN)
    discard(out, examine(out, [], RUN, restart=False).files)
    assert [path.name for path in out.iterdir()] == [LEDGER]


def test_restart_resumes_nothing(tmp_path: Path) -> None:
    unfinished(tmp_path / "out", RUN)
    claim = examine(tmp_path / "out", [], RUN, restart=True)
    assert (claim.state, claim.recorded) == (State.UNFINISHED, None)


def test_an_unfinished_other_run_is_refused(tmp_path: Path) -> None:
    unfinished(tmp_path / "out", {"source": "zz", "plan": "bb"})
    with pytest.raises(OutputError, match="source was zz, is aa"):
        examine(tmp_path / "out", [], RUN, restart=False)


def test_a_run_that_stops_while_it_claims_out_leaves_out_free(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text('{"schema": "mqu')
    assert examine(tmp_path, [], RUN, restart=False).state is State.FREE


@pytest.mark.parametrize("name", ["../victim", "/etc/victim", "a/../../victim", ""])
def test_a_record_cannot_ask_for_files_outside_out(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    head = {"schema": "mquant.run/2", "fingerprint": RUN, "files": [name, "ok"]}
    (out / LEDGER).write_text(json.dumps(head) + "\n")
    claim = examine(out, [], RUN, restart=True)
    assert claim.files == ("ok", RECORD)
    discard(out, claim.files)
    assert victim.read_text() == "precious"


def test_a_new_claim_does_not_hide_a_finished_run(tmp_path: Path) -> None:
    # Another process may lock OUT with an empty ledger at the moment at which a run completes.
    out = tmp_path / "out"
    finished(out, RUN)
    ledger = Ledger(out)
    assert examine(out, [], RUN, restart=False).state is State.DONE
    ledger.release()
    assert not (out / LEDGER).exists()
