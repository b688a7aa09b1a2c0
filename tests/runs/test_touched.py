"""Where only ctime or inode of a source file changed, the bytes decide, in every verb.

A real change keeps size and mtime, and no sample has the changed byte.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fakehub import FakeHub, hub, writable
from judges import hashes
from make import make_checkpoint, without
from mquant.checkpoint import Folder, open_checkpoint
from mquant.errors import SourceError
from mquant.events import Emit, Event, Note, Progress, silent
from mquant.family_files import load_families
from mquant.plan import Plan, make_plan
from mquant.recipe import find_recipe
from mquant.repair.diagnose import diagnose
from mquant.repair.repair import repair
from mquant.runs.hub_to_hub import quantize_to_hub
from mquant.runs.quantize import quantize
from mquant.runs.spec import Engine
from mutate import mutated
from run import quantize_nvfp4

__all__ = ["hub", "writable"]

REPO = "org/out"
SMALL = 20_000
SHARD = "model-00001-of-00003.safetensors"


def flip(path: Path) -> None:
    """Change a bit of a byte that no sample has; size and mtime stay."""
    status = path.stat()
    with path.open("r+b") as file:  # in place: a thread may be reading the file
        place = file.seek(status.st_size // 64 * 40 - 1)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_by_copy(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").rename(path)


TOUCHES = pytest.mark.parametrize(
    "touch",
    [lambda f: f.chmod(0o600), lambda f: os.link(f, f.parent.parent / "backup"), replace_by_copy],
    ids=["chmod", "hard link", "copy"],
)
Touch = Callable[[Path], object]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "src", layers=1, hidden=512, intermediate=256, shards=3)


def during(stage: str, action: Callable[[], object], notes: list[Event] | None = None) -> Emit:
    """Return an emit that calls `action` once, in the middle of a stage."""
    waiting = [action]

    def emit(event: Event) -> None:
        if notes is not None:
            notes.append(event)
        if isinstance(event, Progress) and event.stage == stage and 2 * event.done >= event.total:
            for act in [waiting.pop() for _ in waiting[:1]]:
                act()

    return emit


# --- quantize --push-to, from a folder


def plan_of(src: Path) -> Plan:
    checkpoint = open_checkpoint(Folder(src))
    return make_plan(checkpoint, find_recipe("nvfp4"), load_families(), max_shard_bytes=SMALL)


def shipped(hub: FakeHub, src: Path, out: Path, emit: Emit = silent) -> dict[str, str]:
    quantize_to_hub(plan_of(src), out, REPO, emit=emit)
    digests = hashes(hub.repos[REPO].folders[hub.repos[REPO].revisions["main"]])
    digests.pop(".gitattributes", None)
    return digests


def made(src: Path, out: Path) -> dict[str, str]:
    quantize(plan_of(src), out)
    return hashes(out)


def stopped_before_the_last_commit(src: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mquant.runs.hub_to_hub.seal", dies)
        quantize_to_hub(plan_of(src), out, REPO)


@pytest.mark.usefixtures("writable")
@TOUCHES
def test_a_source_that_is_touched_while_it_is_pushed_costs_no_byte(
    hub: FakeHub, src: Path, tmp_path: Path, touch: Touch
) -> None:
    expected = made(src, tmp_path / "new")
    emit = during("quantize", lambda: touch(src / SHARD))
    assert shipped(hub, src, tmp_path / "out", emit) == expected


@pytest.mark.usefixtures("writable")
def test_a_source_that_changes_while_it_is_pushed_gives_no_output_of_both(
    hub: FakeHub, src: Path, tmp_path: Path
) -> None:
    identity = Folder(src).identity()
    emit = during("quantize", lambda: flip(src / SHARD))
    digests = shipped(hub, src, tmp_path / "out", emit)
    assert Folder(src).identity() == identity, "no sample is taken there"
    assert digests == made(src, tmp_path / "new")


@pytest.mark.usefixtures("writable")
@TOUCHES
@pytest.mark.parametrize("elsewhere", [False, True])
def test_shards_in_the_repo_of_a_source_that_was_touched_since_are_not_sent_again(
    hub: FakeHub,
    src: Path,
    tmp_path: Path,
    touch: Touch,
    elsewhere: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, out = made(src, tmp_path / "new"), tmp_path / "out"
    stopped_before_the_last_commit(src, out, monkeypatch)
    touch(src / SHARD)
    sent = set(hub.stored)
    hub.forget()
    assert shipped(hub, src, tmp_path / "there" if elsewhere else out) == expected
    assert not [r.path for r in hub.requests if r.method == "PUT" and r.path[5:] in sent]


@pytest.mark.usefixtures("writable")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_shards_in_the_repo_of_a_source_that_changed_since_are_replaced(
    hub: FakeHub, src: Path, tmp_path: Path, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped_before_the_last_commit(src, out, monkeypatch)
    flip(src / SHARD)
    digests = shipped(hub, src, tmp_path / "there" if elsewhere else out)
    assert digests == made(src, tmp_path / "new")


# --- repair


@pytest.fixture
def bad(src: Path, tmp_path: Path) -> Path:
    """NVFP4 in three shards; a tensor of the first is lost."""
    right = quantize_nvfp4(src, tmp_path / "right", shard_bytes=800_000)
    return mutated(right, tmp_path, edit=without(".experts.1.w1.weight_scale"))


def repaired(bad: Path, src: Path, out: Path, emit: Emit = silent) -> Path:
    return repair(diagnose(Folder(bad), Folder(src), load_families()), out, emit=emit).out


@TOUCHES
@pytest.mark.parametrize("which", ["broken", "parent"])
def test_a_checkpoint_that_is_touched_during_a_repair_costs_no_byte(
    src: Path, bad: Path, tmp_path: Path, touch: Touch, which: str
) -> None:
    expected = hashes(repaired(bad, src, tmp_path / "new"))

    def act() -> None:
        for shard in sorted((bad if which == "broken" else src).glob("*.safetensors")):
            (tmp_path / "backup").unlink(missing_ok=True)
            touch(shard)

    out = repaired(bad, src, tmp_path / "out", during("repair", act))
    assert hashes(out) == expected


def test_a_broken_checkpoint_that_changes_during_a_repair_stops_it(
    src: Path, bad: Path, tmp_path: Path
) -> None:
    def act() -> None:
        for shard in sorted(bad.glob("*.safetensors")):
            flip(shard)

    with pytest.raises(SourceError, match=r"changed while it was read|has changed"):
        repaired(bad, src, tmp_path / "out", during("repair", act))
    assert not (tmp_path / "out/config.json").exists()


# --- the oneshot engine


@pytest.mark.upstream
@TOUCHES
def test_a_source_that_is_touched_under_oneshot_is_not_read_twice(
    tmp_path: Path, touch: Touch
) -> None:
    src = make_checkpoint(tmp_path / "src", layers=1, experts=2, shards=3)
    new = quantize_nvfp4(src, tmp_path / "new", silent, engine=Engine.ONESHOT)
    notes: list[Event] = []
    emit = during("quantize", lambda: touch(src / SHARD), notes)
    out = quantize_nvfp4(src, tmp_path / "out", emit, engine=Engine.ONESHOT)
    assert hashes(out) == hashes(new)
    assert not [n for n in notes if isinstance(n, Note) and "made again" in n.message]


@pytest.mark.upstream
def test_a_source_that_changes_under_oneshot_stops_the_run(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", layers=1, experts=2, shards=3)
    emit = during("quantize", lambda: flip(src / SHARD))
    with pytest.raises(SourceError, match="changed while it was read"):
        quantize_nvfp4(src, tmp_path / "out", emit, engine=Engine.ONESHOT)
