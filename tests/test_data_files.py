"""A user without a home folder, or with an odd one, gets the same work done."""

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mquant.data_files import cache, home, settle_folders, temporary_folder
from mquant.errors import OutputError
from run import TRAINED


def no_user(uid: int) -> pwd.struct_passwd:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the real home, and restore the environment after the test."""
    for name in ("HOME", "XDG_CACHE_HOME", "USER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", no_user)


def test_a_user_without_home_has_the_root_folder() -> None:
    assert (home(), cache()) == (Path("/"), Path("/.cache/mquant"))


@pytest.mark.parametrize("relative", ["", "rel", "./rel", "~"])
def test_a_relative_folder_is_none(monkeypatch: pytest.MonkeyPatch, relative: str) -> None:
    monkeypatch.setenv("HOME", relative)
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    assert (home(), cache()) == (Path("/"), Path("/.cache/mquant"))


def test_the_stated_cache_folder_needs_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache() == Path("/somewhere/mquant")


def test_libraries_get_the_same_folders() -> None:
    settle_folders()
    assert (os.environ["HOME"], os.environ["XDG_CACHE_HOME"]) == ("/", "/.cache")
    assert os.environ["USER"] == str(os.getuid())


def test_a_verb_needs_no_home_and_leaves_no_file_in_the_current_folder(tmp_path: Path) -> None:
    code = (
        "import pwd, sys, pathlib\n"
        "def none(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = none\n"
        "def closed(*_, **__): raise PermissionError(13, 'Permission denied')\n"
        "pathlib.Path.mkdir = closed\n"
        "from mquant.cli import main\n"
        "main()\n"
    )
    arguments = ["compare", str(TRAINED), "--against", str(TRAINED)]
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={**kept, "XDG_CACHE_HOME": "relative"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "/.cache/mquant/compare cannot keep the results (Permission denied): "
        "after an interruption, the comparison starts over.\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_machine_without_a_temporary_folder_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/none")
    with pytest.raises(
        OutputError, match="There is no temporary folder: Not a directory"
    ) as caught:
        temporary_folder()
    assert caught.value.fix == "Set TMPDIR to a folder that can be written."
