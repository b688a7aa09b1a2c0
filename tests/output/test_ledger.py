"""The ledger records the work of a run, locks OUT, and survives damage."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mquant.checkpoint import Stamp
from mquant.errors import OutputError
from mquant.output import LEDGER, Ledger, Recorded
from mquant.output.ledger import Front, read_ledger

RUN = {"source": "aa", "plan": "bb"}
SOURCES = {"model.safetensors": Stamp(100, 5, 6, 7)}


def begun(out: Path) -> Ledger:
    ledger = Ledger(out)
    ledger.begin(RUN, ["a.safetensors", "config.json"], afresh=True)
    ledger.read_from(SOURCES)
    return ledger


def recorded(out: Path) -> Recorded:
    record = read_ledger(out)
    assert record is not None
    return record


def test_recorded_work_is_read_back(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    ledger.count([4, 0, 1, 2, 9])
    ledger.complete_shard("a.safetensors", "cafe", range(20, 23))
    ledger.release()
    record = recorded(tmp_path)
    assert record.fingerprint == RUN
    assert record.files == ("a.safetensors", "config.json")
    assert record.units == dict.fromkeys([0, 1, 2, 4, 9, 20, 21, 22], SOURCES)
    assert record.shards == {"a.safetensors": "cafe"}


def test_consecutive_work_units_take_one_entry(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    ledger.count(range(1000))
    ledger.release()
    assert (tmp_path / LEDGER).read_text().endswith('\n{"jobs": [[0, 999]]}\n')


def test_work_units_keep_their_sources(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    ledger.count([0])
    ledger.release()
    ledger = Ledger(tmp_path)
    ledger.begin(RUN, [], afresh=False)
    ledger.read_from({"model.safetensors": Stamp(100, 6, 7, 8)})
    ledger.count([1])
    ledger.release()
    assert recorded(tmp_path).units == {0: SOURCES, 1: {"model.safetensors": Stamp(100, 6, 7, 8)}}


def test_an_incomplete_line_is_ignored_and_spoils_no_other_line(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    ledger.count([0])
    ledger.release()
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"jobs": [[1, 1]]}')
    assert recorded(tmp_path).units.keys() == {0}
    ledger = Ledger(tmp_path)
    ledger.begin(RUN, [], afresh=False)
    ledger.count([2])
    ledger.release()
    assert {0, 2} <= recorded(tmp_path).units.keys()


def test_a_run_that_begins_afresh_deletes_earlier_records(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    ledger.count([0])
    ledger.begin({"source": "zz"}, ["b"], afresh=True)
    ledger.release()
    assert recorded(tmp_path) == Recorded({"source": "zz"}, ("b",))


def test_the_last_front_of_a_partial_shard_is_read_back(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    ledger.count([0], {"a.safetensors": Front(100, "aa"), "b.safetensors": Front(8, "bb")})
    ledger.count([1], {"a.safetensors": Front(200, "cc")})
    ledger.release()
    assert recorded(tmp_path).fronts == {
        "a.safetensors": Front(200, "cc"),
        "b.safetensors": Front(8, "bb"),
    }


def test_a_complete_shard_has_no_front(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    ledger.count([0], {"a.safetensors": Front(100, "aa")})
    ledger.complete_shard("a.safetensors", "cafe", range(2))
    ledger.release()
    assert recorded(tmp_path).fronts == {}


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    with pytest.raises(OutputError, match="Another mquant is writing into") as caught:
        Ledger(tmp_path)
    assert caught.value.fix == "Wait for the other mquant, or give another -o."
    ledger.release()
    Ledger(tmp_path).release()


def test_a_complete_run_leaves_no_ledger(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    ledger.complete()
    ledger.release()
    assert list(tmp_path.iterdir()) == []


def test_a_release_without_a_claim_leaves_no_file(tmp_path: Path) -> None:
    Ledger(tmp_path / "out").release()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_release_of_a_claim_leaves_the_ledger(tmp_path: Path) -> None:
    begun(tmp_path).release()
    assert [path.name for path in tmp_path.iterdir()] == [LEDGER]


@pytest.mark.parametrize("again", [False, True])
def test_an_output_folder_that_vanishes_is_one_sentence(tmp_path: Path, *, again: bool) -> None:
    out = tmp_path / "out"
    ledger = begun(out)
    shutil.rmtree(out)
    if again:  # with another ledger
        begun(out).release()
    with pytest.raises(OutputError, match="was deleted or replaced during the run"):
        ledger.count([1])
    ledger.release()


def test_a_folder_without_a_ledger_has_no_record(tmp_path: Path) -> None:
    assert read_ledger(tmp_path) is None


NUMBERS = st.one_of(st.integers(), st.integers(0, 5), st.booleans(), st.floats(), st.text())
VALUES = st.recursive(
    st.one_of(NUMBERS, st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner)),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["schema", "fingerprint", "files", "sources", "jobs", "shard", "sha256", "fronts"]
)
LINES = st.one_of(
    st.binary(max_size=40),
    st.dictionaries(KEYS, VALUES, max_size=4).map(lambda entry: json.dumps(entry).encode()),
    st.lists(st.lists(NUMBERS, max_size=3), max_size=3).map(
        lambda spans: json.dumps({"jobs": spans}).encode()
    ),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(LINES, max_size=6))
def test_a_damaged_ledger_never_fails(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    out = tmp_path_factory.getbasetemp() / "damaged"
    out.mkdir(exist_ok=True)
    (out / LEDGER).write_bytes(b"\n".join(lines) + b"\n")
    record = recorded(out)
    assert all(isinstance(number, int) and number >= 0 for number in record.units)


def test_an_absurd_span_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text('{"jobs": [[0, 1000000000000000000]]}\n')
    assert recorded(tmp_path).units == {}


def test_stamps_of_an_earlier_release_equal_no_stamp(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    ledger.release()
    with (tmp_path / LEDGER).open("ab") as file:
        file.write(b'{"sources": {"model.safetensors": [100, 5]}}\n{"jobs": [[3, 3]]}\n')
    assert recorded(tmp_path).units[3] == {"model.safetensors": Stamp(-1)}
