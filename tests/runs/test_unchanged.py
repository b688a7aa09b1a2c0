"""No checkpoint is made from a source that changed; no changed file passes for the recorded file.

Every change keeps size and mtime.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from judges import hashes, read_json
from make import make_checkpoint, write_json
from mquant.checkpoint import Folder, open_checkpoint
from mquant.errors import OutputError, SourceError
from mquant.events import Event, Note, Progress, silent
from mquant.family_files import load_families
from mquant.plan import Target, make_bf16_plan
from mquant.runs.convert import convert
from mquant.runs.export import export
from run import quantize_nvfp4

SMALL = 20_000
SHARD = "model-00001-of-00003.safetensors"


def flip(path: Path) -> None:
    """Change a bit of a byte that no sample has; size and mtime stay."""
    content, status = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 64 * 40 - 1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def src(tmp_path: Path) -> Path:
    src = make_checkpoint(tmp_path / "src", layers=1, experts=2, shards=3)
    (src / "tokenizer.json").write_text("{}")
    return src


def when(part: float, action: Callable[[], object]) -> Callable[[Event], None]:
    """Return an emit that calls `action` once, when this part of the source is quantized."""
    waiting = [action]

    def emit(event: Event) -> None:
        if not isinstance(event, Progress) or event.stage != "quantize":
            return
        if waiting and event.done >= part * event.total:
            waiting.pop()()

    return emit


def stop() -> None:
    raise KeyboardInterrupt


# --- the source of a run


def test_work_made_from_a_file_that_changed_since_is_made_again(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", layers=1, hidden=512, intermediate=256, shards=3)
    out, identity = tmp_path / "out", Folder(src).identity()
    with pytest.raises(KeyboardInterrupt):
        quantize_nvfp4(src, out, when(0.5, stop), SMALL, workers=1)
    flip(src / SHARD)
    assert Folder(src).identity() == identity, "no sample is taken there"
    quantize_nvfp4(src, out, shard_bytes=SMALL)
    assert hashes(out) == hashes(quantize_nvfp4(src, tmp_path / "new", shard_bytes=SMALL))


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json"])
def test_a_file_that_changes_during_the_run_stops_it(src: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(SourceError) as caught:
        quantize_nvfp4(src, out, when(1, lambda: flip(src / name)), SMALL, workers=1)
    assert caught.value.message == f"{name} changed while it was read."
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    "touch", [lambda f: f.chmod(0o600), lambda f: os.link(f, f.with_suffix(".backup"))]
)
def test_a_chmod_or_a_hard_link_costs_time_and_no_byte(
    src: Path, tmp_path: Path, touch: Callable[[Path], object]
) -> None:
    out, expected = tmp_path / "out", hashes(quantize_nvfp4(src, tmp_path / "new", silent, SMALL))
    with pytest.raises(KeyboardInterrupt):
        quantize_nvfp4(src, out, when(0.5, stop), SMALL, workers=1)
    touch(src / SHARD)
    (src / SHARD).with_suffix(".backup").unlink(missing_ok=True)
    quantize_nvfp4(src, out, shard_bytes=SMALL)
    assert hashes(out) == expected


def replace_by_copy(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").rename(path)


@pytest.mark.parametrize(
    "touch",
    [lambda f: f.chmod(0o600), lambda f: os.link(f, f.with_suffix(".backup")), replace_by_copy],
    ids=["chmod", "hard link", "copy"],
)
@pytest.mark.parametrize("part", [0.5, 1])
def test_a_chmod_a_hard_link_or_a_copy_of_a_file_during_the_run_costs_time_and_no_byte(
    src: Path, tmp_path: Path, touch: Callable[[Path], object], part: float
) -> None:
    out, expected = tmp_path / "out", hashes(quantize_nvfp4(src, tmp_path / "new", silent, SMALL))
    notes: list[Event] = []
    act = when(part, lambda: touch(src / SHARD))

    def emit(event: Event) -> None:
        notes.append(event)
        act(event)

    quantize_nvfp4(src, out, emit, SMALL, workers=1)
    assert hashes(out) == expected
    warnings = [n.message for n in notes if isinstance(n, Note) and n.level == "warning"]
    assert warnings == [
        f"{SHARD}: ctime or inode changed (a chmod, a hard link or a copy?); what was made from "
        "changed shards is made again."
    ]


def all_shards_are_written(event: Event) -> bool:
    """Return whether this is the event between the last shard and config.json."""
    return isinstance(event, Note) and event.message.startswith("The source has no licence")


@pytest.mark.parametrize("times", [1, 2])
def test_a_chmod_while_the_result_is_judged_costs_time_and_no_byte(
    src: Path, tmp_path: Path, times: int
) -> None:
    expected = hashes(quantize_nvfp4(src, tmp_path / "new", silent, SMALL))
    touched = 0

    def emit(event: Event) -> None:
        nonlocal touched
        if all_shards_are_written(event) and touched < times:
            touched += 1
            (src / SHARD).chmod(0o600)

    out = quantize_nvfp4(src, tmp_path / "out", emit, SMALL)
    assert touched == times
    assert hashes(out) == expected


def test_a_file_that_is_touched_at_every_judgement_stops_the_run(src: Path, tmp_path: Path) -> None:
    def emit(event: Event) -> None:
        if all_shards_are_written(event):
            (src / SHARD).chmod(0o600)

    with pytest.raises(SourceError) as caught:
        quantize_nvfp4(src, tmp_path / "out", emit, SMALL)
    assert caught.value.message == f"{SHARD} changed while it was read."
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_chmod_of_all_files_during_the_run_costs_no_byte(src: Path, tmp_path: Path) -> None:
    expected = hashes(quantize_nvfp4(src, tmp_path / "new", silent, SMALL))

    def touch() -> None:
        for path in src.iterdir():
            path.chmod(0o600)

    out = quantize_nvfp4(src, tmp_path / "out", when(0.5, touch), SMALL)
    assert hashes(out) == expected


def test_bytes_that_no_sample_has_and_that_change_during_the_run_are_all_read_again(
    tmp_path: Path,
) -> None:
    src = make_checkpoint(tmp_path / "src", layers=1, hidden=512, intermediate=256, shards=3)
    identity = Folder(src).identity()
    out = quantize_nvfp4(src, tmp_path / "out", when(0.5, lambda: flip(src / SHARD)), SMALL)
    assert Folder(src).identity() == identity, "no sample is taken there"
    assert hashes(out) == hashes(quantize_nvfp4(src, tmp_path / "new", shard_bytes=SMALL))


def test_a_header_that_changes_during_the_run_stops_it(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", layers=1, hidden=512, intermediate=256, shards=3)

    def rename_tensor() -> None:
        content, status = (src / SHARD).read_bytes(), (src / SHARD).stat()
        (src / SHARD).write_bytes(content.replace(b"q_proj", b"x_proj", 1))
        os.utime(src / SHARD, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(SourceError) as caught:
        quantize_nvfp4(src, tmp_path / "out", when(0.5, rename_tensor), SMALL)
    assert caught.value.message == f"{SHARD} changed while it was read."


def test_a_file_that_is_touched_all_the_time_stops_the_run(src: Path, tmp_path: Path) -> None:
    def emit(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "quantize":
            (src / SHARD).chmod(0o600)

    with pytest.raises(SourceError) as caught:
        quantize_nvfp4(src, tmp_path / "out", emit, SMALL, workers=1)
    assert caught.value.message == f"{SHARD} changed while it was read."


def test_a_partial_shard_that_changed_since_is_made_again(src: Path, tmp_path: Path) -> None:
    out, expected = tmp_path / "out", hashes(quantize_nvfp4(src, tmp_path / "new", silent, SMALL))
    with pytest.raises(KeyboardInterrupt):
        quantize_nvfp4(src, out, when(0.5, stop), SMALL, workers=1)
    (partial,) = out.glob("*.partial")
    content = bytearray(partial.read_bytes())
    content[int.from_bytes(content[:8], "little") + 8] ^= 1  # the first byte of the first tensor
    partial.write_bytes(content)
    notes: list[Event] = []
    quantize_nvfp4(src, out, notes.append, SMALL)
    sentence = f"{partial.name} is not as an earlier run left it; its tensors are made again."
    assert Note("warning", sentence) in notes
    assert hashes(out) == expected


def test_a_finished_shard_that_changed_since_is_made_again(src: Path, tmp_path: Path) -> None:
    out, expected = tmp_path / "out", hashes(quantize_nvfp4(src, tmp_path / "new", silent, SMALL))

    def spoil() -> None:
        if done := sorted(out.glob("*.safetensors")):
            flip(done[0])
            stop()

    with pytest.raises(KeyboardInterrupt):
        quantize_nvfp4(src, out, lambda _: spoil(), SMALL, workers=1)
    quantize_nvfp4(src, out, shard_bytes=SMALL)
    assert hashes(out) == expected


# --- a source that mquant made


@pytest.fixture
def made(src: Path, tmp_path: Path) -> Path:
    return quantize_nvfp4(src, tmp_path / "made", shard_bytes=SMALL)


def exported(made: Path, out: Path) -> None:
    export(Folder(made), load_families(), Target.MODELOPT, out)


def dequantized(made: Path, out: Path, emit: Callable[[Event], None] = silent) -> None:
    plan = make_bf16_plan(open_checkpoint(Folder(made)), load_families())
    convert(plan, out, "dequantize", emit=emit)


def test_a_chmod_during_another_verb_costs_no_byte(made: Path, tmp_path: Path) -> None:
    dequantized(made, tmp_path / "new")
    shard = sorted(made.glob("*.safetensors"))[0]

    def emit(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "dequantize" and not stages:
            stages.append(event.stage)
            shard.chmod(0o600)

    stages: list[str] = []
    dequantized(made, tmp_path / "out", emit)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "new")


@pytest.mark.parametrize("verb", [exported, dequantized])
def test_a_shard_unlike_its_record_is_refused(
    made: Path, tmp_path: Path, verb: Callable[[Path, Path], None]
) -> None:
    shard = sorted(made.glob("*.safetensors"))[1]
    before = hashes(made)[shard.name]
    flip(shard)
    with pytest.raises(SourceError) as caught:
        verb(made, tmp_path / "out")
    now = hashes(made)[shard.name]
    assert caught.value.message == (
        f"In {made.name}, {shard.name} has changed: its sha256 is {now}; mquant.json says {before}."
    )
    assert not (tmp_path / "out").exists()


def test_a_side_file_that_was_edited_is_a_warning_and_its_own_digest_is_recorded(
    made: Path, tmp_path: Path
) -> None:
    (made / "tokenizer.json").write_text("[1]")
    notes: list[Event] = []
    dequantized(made, tmp_path / "out", notes.append)
    warnings = [n.message for n in notes if isinstance(n, Note) and n.level == "warning"]
    assert warnings == [f"In {made.name}, tokenizer.json has 3 bytes; mquant.json says 2."]
    recorded = read_json(tmp_path / "out/mquant.json")["files"]["tokenizer.json"]["sha256"]
    assert recorded == hashes(tmp_path / "out")["tokenizer.json"]


# --- an OUT that is done


def test_a_finished_folder_with_a_changed_file_is_not_already_done(src: Path, made: Path) -> None:
    shard = sorted(made.glob("*.safetensors"))[0]
    before = hashes(made)[shard.name]
    flip(shard)
    with pytest.raises(OutputError) as caught:
        quantize_nvfp4(src, made, shard_bytes=SMALL)
    now = hashes(made)[shard.name]
    assert caught.value.message == (
        f"{shard.name} in {made} has changed since mquant wrote it: its sha256 was {before} and "
        f"is {now}."
    )
    assert "--restart" in caught.value.fix


def test_no_time_of_a_file_proves_that_the_folder_is_as_it_was_made(src: Path, made: Path) -> None:
    flip(sorted(made.glob("*.safetensors"))[0])
    shutil.copy(made / "config.json", made / "copy")
    (made / "copy").rename(made / "config.json")  # the newest file, as in a copied folder
    with pytest.raises(OutputError, match="has changed since mquant wrote it"):
        quantize_nvfp4(src, made, shard_bytes=SMALL)


def test_already_done_claims_nothing_of_bytes_that_were_not_read(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", layers=1, hidden=512, intermediate=256, shards=3)
    made = quantize_nvfp4(src, tmp_path / "made", shard_bytes=SMALL)
    notes: list[Event] = []
    quantize_nvfp4(src, made, notes.append, SMALL)
    told = Note("info", "The source's names, sizes and samples were compared, not every byte.")
    assert [note for note in notes if isinstance(note, Note)] == [told]

    identity = Folder(src).identity()
    flip(src / SHARD)
    assert Folder(src).identity() == identity, "no sample is taken there"
    notes.clear()
    quantize_nvfp4(src, made, notes.append, SMALL)
    assert [note for note in notes if isinstance(note, Note)] == [
        told,
        Note(
            "warning",
            f"{SHARD} may have changed after {made} was made: the times say so. If so, give "
            "--restart.",
        ),
    ]


def test_a_finished_folder_that_was_copied_is_already_done(
    src: Path, made: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    quantize_nvfp4(src, copy, shard_bytes=SMALL)
    assert hashes(copy) == hashes(made)


def test_a_record_without_digests_is_refused(src: Path, made: Path) -> None:
    table = read_json(made / "mquant.json")
    table["files"] = {name: {"bytes": e["bytes"]} for name, e in table["files"].items()}
    write_json(made / "mquant.json", table)
    with pytest.raises(OutputError, match="has changed since mquant wrote it: its sha256 was None"):
        quantize_nvfp4(src, made, shard_bytes=SMALL)
