"""A `Document` replaces a file that mquant wrote, keeps other files, and writes to pipes."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mquant.errors import OutputError
from mquant.output import Document

OURS = [b"<mark>", b"new"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def document(path: Path) -> Document:
    return Document(path, "--junit", b"<mark>")


def test_a_file_of_an_earlier_run_is_replaced(source: Path) -> None:
    path = source / "report"
    document(path).write([b"<mark>", b"old"])
    document(path).write(OURS)
    assert path.read_bytes() == b"<mark>new"
    assert list(source.iterdir()) == [path]


def test_a_file_that_mquant_did_not_write_stays(source: Path) -> None:
    path = source / "config.json"
    path.write_bytes(b"{}")
    for act in (document(path).remove, lambda: document(path).write(OURS)):
        with pytest.raises(OutputError, match="exists, and mquant did not write it") as caught:
            act()
        assert caught.value.fix == "Give another file with --junit."
    assert path.read_bytes() == b"{}"


def test_an_empty_file_is_replaced(source: Path) -> None:
    (source / "report").touch()
    document(source / "report").write(OURS)
    assert (source / "report").read_bytes() == b"<mark>new"


def test_a_link_is_replaced_and_the_file_it_leads_to_stays(source: Path, tmp_path: Path) -> None:
    (source / "old").write_bytes(b"<mark>old")
    link = tmp_path / "report"
    link.symlink_to(source / "old")
    document(link).write(OURS)
    assert link.read_bytes() == b"<mark>new"
    assert (source / "old").read_bytes() == b"<mark>old"


def test_a_folder_is_refused(source: Path) -> None:
    with pytest.raises(OutputError, match="source cannot be written: Is a directory"):
        document(source).remove()
    assert source.is_dir()


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    big = b"x" * 1_000_000  # more than a pipe holds, so the writer waits for the reader
    read: list[bytes] = []

    def drain() -> None:
        os.set_blocking(reader, True)
        with os.fdopen(reader, "rb") as file:
            read.append(file.read())

    document(pipe).remove()
    draining = threading.Timer(0.05, drain)
    draining.start()
    document(pipe).write([*OURS, big])
    draining.join()
    assert read == [b"<mark>new" + big]
    assert pipe.is_fifo()


def test_a_pipe_that_nobody_reads_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="pipe cannot be written: nobody reads the pipe"):
        document(tmp_path / "pipe").write(OURS)


@pytest.mark.parametrize("to_file", [False, True])
def test_an_open_file_is_written_to(tmp_path: Path, to_file: bool) -> None:
    code = (
        "from pathlib import Path; from mquant.output import Document\n"
        "out = Document(Path('/dev/fd/1'), '--junit', b'<mark>')\n"
        "print('before', flush=True); out.check(); out.write([b'<mark>', b'new'])"
    )
    with (tmp_path / "stdout").open("wb") as file:
        stdout = file if to_file else subprocess.PIPE
        process = subprocess.run([sys.executable, "-c", code], stdout=stdout, check=True)
    written = (tmp_path / "stdout").read_bytes() if to_file else process.stdout
    assert written == b"before\n<mark>new"


@pytest.mark.parametrize("make", [os.link, os.symlink])
def test_a_file_behind_proc_is_replaced_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, Path], None]
) -> None:
    (tmp_path / "other").write_bytes(b"<mark>years of work")
    make(tmp_path / "other", tmp_path / "report")
    monkeypatch.chdir(tmp_path)
    document(Path("/proc/self/cwd/report")).write(OURS)
    assert (tmp_path / "report").read_bytes() == b"<mark>new"
    assert (tmp_path / "other").read_bytes() == b"<mark>years of work"
