"""Repair in place gives the same checkpoint, also after a kill, and stays inside the folder."""

import json
import shutil
from pathlib import Path

import pytest

from corpus import EXPERT
from judges import hashes, opened
from killed import repair_and_die
from make import Row, without, write_json
from mquant.errors import OutputError
from mquant.events import Event, Note
from mquant.output import JOURNAL, WORK, apply
from mquant.repair.repair import finish_in_place, repair_in_place
from mutate import mutated
from repairs import case_of, diagnosis_of, problems, repaired, right, tensors
from run import TRAINED

__all__ = ["right"]


@pytest.fixture
def bad(right: Path, tmp_path: Path) -> Path:
    """A checkpoint with quantized routers and a spare shard, without an expert and a side file."""

    def edit(rows: list[Row]) -> list[Row]:
        case = case_of("the origin bug: all routers quantized")
        assert case.edit
        return without(EXPERT)(case.edit(rows) or rows) or rows

    folder = mutated(right, tmp_path, edit=edit)
    (folder / "tokenizer.json").unlink()
    shutil.copy(folder / opened(folder).shards[0], folder / "model-spare.safetensors")
    return folder


def test_repair_in_place_gives_the_same_checkpoint(bad: Path, right: Path, tmp_path: Path) -> None:
    out = repaired(bad, tmp_path / "out")
    events: list[Event] = []
    repair_in_place(diagnosis_of(bad), emit=events.append)
    assert not [e for e in events if isinstance(e, Note) and "is missing" in e.message]
    assert tensors(bad) == tensors(right)
    assert hashes(bad).keys() == hashes(out).keys()
    assert not [path for path in bad.iterdir() if path.name.startswith(".")]
    assert not problems(bad)
    assert not diagnosis_of(bad).needed


def test_a_rerun_finishes_after_a_kill_at_any_change_of_the_folder(
    bad: Path, right: Path, tmp_path: Path
) -> None:
    expected, broken = tensors(right), tensors(bad)
    for most in range(200):
        copy = Path(shutil.copytree(bad, tmp_path / f"copy-{most}"))
        stopped = repair_and_die(copy, TRAINED, most) != 0
        if (copy / "config.json").exists() and not (copy / JOURNAL).exists():
            assert tensors(copy) in (expected, broken)
        if not finish_in_place(copy):
            diagnosis = diagnosis_of(copy)
            if diagnosis.needed:
                repair_in_place(diagnosis)
        assert tensors(copy) == expected
        assert not [path for path in copy.iterdir() if path.name.startswith(".")]
        shutil.rmtree(copy)
        if not stopped:
            break
    assert not stopped
    assert most > 15


def test_a_rerun_repairs_after_a_kill_before_the_ledger(bad: Path, right: Path) -> None:
    (bad / WORK).mkdir()
    assert not finish_in_place(bad)
    repair_in_place(diagnosis_of(bad))
    assert tensors(bad) == tensors(right)


def test_a_link_in_a_path_of_the_journal_is_not_followed(bad: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (bad / "sub").symlink_to(elsewhere)
    (bad / WORK / "sub").mkdir(parents=True)
    (bad / WORK / "sub/file").write_text("x")
    table = {"schema": "mquant.apply/1", "files": ["sub/file"], "obsolete": []}
    write_json(bad / JOURNAL, table)
    with pytest.raises(
        OutputError, match=r"sub/file would be outside of .*by its name, or by a link"
    ):
        apply(bad)
    assert not any(elsewhere.iterdir())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "other"}'])
def test_a_strange_journal_is_refused(bad: Path, text: str) -> None:
    (bad / JOURNAL).write_text(text)
    before = hashes(bad)
    with pytest.raises(OutputError, match="is not a journal of mquant"):
        finish_in_place(bad)
    assert hashes(bad) == before


def test_a_journal_cannot_name_a_file_outside_the_folder(bad: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    names = ["../precious", str(precious)]
    table = {"schema": "mquant.apply/1", "files": names, "obsolete": names}
    (bad / JOURNAL).write_text(json.dumps(table))
    with pytest.raises(OutputError, match="would be outside of"):
        apply(bad)
    assert precious.read_text() == "x"
