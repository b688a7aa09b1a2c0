"""Files are written whole, past no link, on any file system."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mquant.output import LEDGER, Ledger, link
from mquant.output.disk import fsync_folder, open_own, write_whole

LACKING = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
NO_LINKS = (errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV, *LACKING)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Path]:
    """Yield a file that has, or gets, another name, and check that the test did not change it."""
    path = tmp_path / "other"
    path.write_bytes(b"years of work")
    yield path
    assert path.read_bytes() == b"years of work"


def failing(number: int, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, fail)


def test_a_file_that_stops_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "README.md"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        write_whole(path, pieces())
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [
        ("README.md", b"old")
    ]


@pytest.mark.parametrize("name", ["README.md", "README.md.partial"])
@pytest.mark.parametrize("make", [os.link, os.symlink])
def test_a_file_with_another_name_stays(tmp_path: Path, other: Path, make: type, name: str) -> None:
    make(other, tmp_path / name)
    write_whole(tmp_path / "README.md", [b"new"])
    assert (tmp_path / "README.md").read_bytes() == b"new"


@pytest.mark.parametrize("make", [os.link, os.symlink])
def test_a_file_that_grows_begins_afresh_if_it_has_another_name(
    tmp_path: Path, other: Path, make: type
) -> None:
    path = tmp_path / "grows"
    make(other, path)
    with os.fdopen(open_own(path, os.O_APPEND), "wb") as file:
        file.write(b"new")
    with os.fdopen(open_own(path, os.O_APPEND), "wb") as file:
        file.write(b", and more")
    assert path.read_bytes() == b"new, and more"


def test_the_lines_of_a_ledger_with_another_name_go_into_a_file_of_their_own(
    tmp_path: Path, other: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    os.link(other, out / LEDGER)
    ledger = Ledger(out)
    ledger.begin({}, ["config.json"], afresh=False)
    ledger.count([1])
    ledger.release()
    assert (out / LEDGER).read_bytes() == b'years of work\n{"jobs": [[1, 1]]}\n'


@pytest.mark.parametrize("number", LACKING)
def test_a_file_system_need_not_sync_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.fsync

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(number, os.strerror(number))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "file", [b"content"])
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_folder_that_the_disk_loses_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(errno.EIO, monkeypatch, "fsync")
    with pytest.raises(OSError, match="Input/output error"):
        fsync_folder(tmp_path)


@pytest.mark.parametrize("number", NO_LINKS)
def test_a_file_system_need_not_have_hard_links(
    tmp_path: Path, other: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing(number, monkeypatch, "link")
    link(other, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"years of work"
    assert not (tmp_path / "copy").samefile(other)
