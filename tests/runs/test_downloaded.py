"""A download is compared with the digests that the hub lists before a byte of it is used."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fakehub import FakeHub, hub
from judges import hashes
from make import make_checkpoint
from mquant.checkpoint import Folder, open_checkpoint
from mquant.checkpoint.hub import HubRepo
from mquant.errors import SourceError
from mquant.events import Emit, Event, Progress, silent
from mquant.family_files import load_families
from mquant.plan import make_plan
from mquant.recipe import find_recipe
from mquant.runs.quantize import quantize

__all__ = ["hub"]

REPO = "org/parent"
SHARD = "model-00002-of-00003.safetensors"
LAST = "model-00003-of-00003.safetensors"


@pytest.fixture
def src(hub: FakeHub, tmp_path: Path) -> Path:
    src = make_checkpoint(tmp_path / "src", layers=1, experts=2, shards=3)
    (src / "tokenizer.json").write_text("{}")
    hub.add(REPO, src)
    return src


def run(out: Path, emit: Emit = silent) -> Path:
    plan = make_plan(open_checkpoint(HubRepo(REPO)), find_recipe("nvfp4"), load_families())
    quantize(plan, out, emit=emit, workers=1)
    return out


def refusal(out: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        run(out)
    assert not out.exists()
    return caught.value


def cached(name: str) -> Path:
    """Return the file in the hub's cache, not the link to it."""
    folder = HubRepo(REPO).materialize(silent)
    return folder.path(name).resolve()


def flip(path: Path, place: int = -1) -> None:
    """Change one bit of a file; size and mtime stay."""
    content, status = bytearray(path.read_bytes()), path.stat()
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_a_byte_that_changes_on_the_wire_stops_the_run(
    hub: FakeHub, src: Path, tmp_path: Path, name: str
) -> None:
    hub.flips = name
    error = refusal(tmp_path / "out")
    assert error.message.startswith(f"{name} of {REPO} in the cache is not what 127.0.0.1 lists: ")
    hub.flips = None
    file = Path(error.message.split(": ")[1].removesuffix(" has another digest."))
    assert error.fix.startswith(f"Run: rm {file}; then run the same command again")
    file.unlink()
    expected = run_local(src, tmp_path / "local")
    assert shards(run(tmp_path / "out")) == shards(expected)


def shards(folder: Path) -> dict[str, str]:
    return {name: sha for name, sha in hashes(folder).items() if name.endswith(".safetensors")}


def run_local(src: Path, out: Path) -> Path:
    recipe = find_recipe("nvfp4")
    quantize(make_plan(open_checkpoint(Folder(src)), recipe, load_families()), out)
    return out


def test_a_config_that_changes_on_the_wire_stops_the_plan(
    hub: FakeHub, src: Path, tmp_path: Path
) -> None:
    hub.flips = "config.json"
    error = refusal(tmp_path / "out")
    assert error.message == f"127.0.0.1 sent another config.json of {REPO} than it lists."


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_a_byte_that_rots_in_the_cache_stops_the_run(src: Path, tmp_path: Path, name: str) -> None:
    file = cached(name)
    flip(file)
    error = refusal(tmp_path / "out")
    assert f": {file} has another digest." in error.message


def test_all_rotten_files_are_named_and_the_named_command_mends_the_cache(
    src: Path, tmp_path: Path
) -> None:
    files = [cached(name) for name in (SHARD, "tokenizer.json")]
    for file in files:
        flip(file)
    error = refusal(tmp_path / "out")
    assert f"{SHARD}, tokenizer.json of {REPO} in the cache are not what " in error.message
    assert all(file.exists() for file in files), "mquant deletes nothing by itself"
    command = error.fix.removeprefix("Run: ").partition(";")[0]
    subprocess.run(command, shell=True, check=True)  # noqa: S602 -- as a user does
    assert shards(run(tmp_path / "out")) == shards(run_local(src, tmp_path / "local"))


def test_a_run_stops_if_the_cache_changes_while_it_is_read(src: Path, tmp_path: Path) -> None:
    folder = HubRepo(REPO).materialize(silent)
    flip(folder.path(SHARD).resolve())
    with pytest.raises(SourceError, match=f"{SHARD} changed while it was read"):
        folder.check(folder.files)


def once(action: Callable[[], object]) -> Emit:
    """Return an emit that calls `action` when the first work unit is done."""
    waiting = [action]

    def emit(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "quantize" and event.done and waiting:
            waiting.pop()()

    return emit


def test_a_chmod_of_a_file_in_the_cache_during_the_run_costs_no_byte(
    src: Path, tmp_path: Path
) -> None:
    file, expected = cached(LAST), run_local(src, tmp_path / "local")
    assert shards(run(tmp_path / "out", once(lambda: file.chmod(0o600)))) == shards(expected)


def test_a_byte_that_changes_in_the_cache_during_the_run_stops_it(
    src: Path, tmp_path: Path
) -> None:
    file = cached(LAST)
    with pytest.raises(SourceError) as caught:
        run(tmp_path / "out", once(lambda: flip(file)))
    assert caught.value.message == f"{LAST} changed while it was read."


def test_a_file_of_a_stopped_scratch_is_compared_again(
    hub: FakeHub, src: Path, tmp_path: Path
) -> None:
    expected, out, repo = run_local(src, tmp_path / "local"), tmp_path / "out", HubRepo(REPO)
    recipe = find_recipe("nvfp4")
    plan = make_plan(open_checkpoint(repo), recipe, load_families())

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "quantize" and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(plan, out, scratch=10**9, emit=stop, workers=1)
    left = out / ".mquant-scratch" / repo.commit / "model-00003-of-00003.safetensors"
    left.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(src / left.name, left)
    flip(left)
    quantize(plan, out, scratch=10**9)
    assert shards(out) == shards(expected)
