"""`--data` may name a dataset on the hub: which of its files are read, and what is recorded."""

import json
from pathlib import Path

import pytest

from fakehub import FakeHub, hub
from mquant.checkpoint import Folder
from mquant.errors import DataFileError
from mquant.recipe import Calibration
from mquant.tokens.calibration_data import find_data
from mquant.tokens.samples import load_samples
from run import TRAINED

__all__ = ["hub"]

FEW = Calibration(samples=9, length=64)


def rows(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_the_training_rows_of_a_dataset_are_read_at_its_commit(
    hub: FakeHub, tmp_path: Path
) -> None:
    rows(tmp_path / "d/data/train-00000.jsonl", "Not far.")
    rows(tmp_path / "d/data/test-00000.jsonl", "Far.")
    commit = hub.add("datasets/org/texts", tmp_path / "d")

    samples = load_samples("org/texts", Folder(TRAINED), FEW)

    rows(tmp_path / "same.jsonl", "Not far.")
    same = load_samples(str(tmp_path / "same.jsonl"), Folder(TRAINED), FEW)
    assert samples.record["tokens_sha256"] == same.record["tokens_sha256"]
    data = samples.record["data"]
    assert (data["name"], data["commit"]) == ("org/texts", commit)
    assert list(data["files"]) == ["data/train-00000.jsonl"]


def test_a_dataset_is_the_same_until_another_commit(hub: FakeHub, tmp_path: Path) -> None:
    rows(tmp_path / "d/train.jsonl", "Not far.")
    commit = hub.add("datasets/org/texts", tmp_path / "d", revision="v1")

    assert find_data("org/texts@v1").identity == f"org/texts@{commit}:"


def test_parquet_files_of_a_dataset_are_read(hub: FakeHub, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"text": ["Not far."]}), tmp_path / "d/train.parquet")
    hub.add("datasets/org/texts", tmp_path / "d")

    assert len(load_samples("org/texts", Folder(TRAINED), FEW).ids) == 1


def test_a_dataset_in_another_form_is_read_from_the_hubs_own_copy(
    hub: FakeHub, tmp_path: Path
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/rows.csv").write_text("text\nFar.\n")
    hub.add("datasets/org/texts", tmp_path / "d")
    (tmp_path / "copy/default/train").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["Far."]}), tmp_path / "copy/default/train/0000.parquet")
    copied = hub.add("datasets/org/texts", tmp_path / "copy", revision="refs/convert/parquet")

    assert load_samples("org/texts", Folder(TRAINED), FEW).record["data"]["commit"] == copied


def test_one_of_several_configurations_is_named_by_its_path(hub: FakeHub, tmp_path: Path) -> None:
    rows(tmp_path / "d/en/train-0.jsonl", "Far.")
    rows(tmp_path / "d/fr/train-0.jsonl", "Loin.")
    hub.add("datasets/org/texts", tmp_path / "d")

    assert find_data("org/texts:fr").files == ["fr/train-0.jsonl"]
    with pytest.raises(DataFileError) as caught:
        find_data("org/texts")
    assert caught.value.message == "The dataset org/texts has several configurations: en, fr."
    assert caught.value.fix.endswith("--data org/texts:en")


def test_no_more_files_than_a_billion_bytes_are_read(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mquant.tokens import calibration_data

    monkeypatch.setattr(calibration_data, "_MOST_BYTES", 40)
    for number in range(3):
        rows(tmp_path / f"d/train-{number}.jsonl", "Far.")  # 17 bytes each
    hub.add("datasets/org/texts", tmp_path / "d")

    assert find_data("org/texts").files == ["train-0.jsonl", "train-1.jsonl"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("org/none", "There is no repo org/none on 127.0.0.1, or it is private."),
        ("org/texts@v9", "org/texts has no revision 'v9'."),
    ],
)
def test_a_dataset_that_cannot_be_read_is_one_sentence(
    hub: FakeHub, tmp_path: Path, name: str, reason: str
) -> None:
    rows(tmp_path / "d/train.jsonl", "Far.")
    hub.add("datasets/org/texts", tmp_path / "d")
    with pytest.raises(DataFileError) as caught:
        find_data(name)
    assert caught.value.message == (
        f"{name} is no file, and cannot be read as a dataset of the hub: {reason}"
    )


def test_a_dataset_without_rows_is_one_sentence(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/rows.csv").write_text("text\nFar.\n")
    hub.add("datasets/org/texts", tmp_path / "d")
    with pytest.raises(DataFileError) as caught:
        find_data("org/texts")
    assert caught.value.message == (
        "The dataset org/texts has no file that ends with .parquet or .jsonl or .jsonl.gz."
    )
