"""`verify` and `card` compare files with the sizes and digests in mquant.json."""

import shutil
from pathlib import Path

import pytest

from fakehub import FakeHub, hub
from judges import hashes, read_json
from make import write_json
from mquant.checkpoint import Folder
from mquant.checkpoint.hub import HubRepo
from mquant.errors import SourceError
from mquant.events import silent
from mquant.family_files import load_families
from mquant.findings import Finding
from mquant.publish.card import gather, render
from mquant.verify.digests import check_digests
from mquant.verify.judge import Depth, Report, verify
from mutate import flip

__all__ = ["hub"]

FAMILIES = load_families()


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def shard_of(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def judged(folder: Path, depth: Depth = Depth.NUMBERS) -> Report:
    return verify(Folder(folder), FAMILIES, depth)


def found(folder: Path, depth: Depth = Depth.STRUCTURE) -> list[Finding]:
    return [f for f in judged(folder, depth).findings if "not-as-recorded" in f.rule]


def test_a_shard_with_a_changed_bit_is_broken(copy: Path) -> None:
    shard = shard_of(copy)
    before = hashes(copy)[shard.name]
    flip(shard)
    (finding,) = found(copy, Depth.NUMBERS)
    assert (finding.rule, finding.severity) == ("shard-not-as-recorded", "error")
    now = hashes(copy)[shard.name]
    assert finding.message == (
        f"{shard.name} has changed: its sha256 is {now}; mquant.json says {before}."
    )
    assert judged(copy).verdict.startswith("Broken for vLLM 0.32: 1 error in ")


def test_shards_that_were_not_read_are_not_judged(copy: Path) -> None:
    flip(shard_of(copy))
    why = judged(copy, Depth.STRUCTURE).not_judged["shard-not-as-recorded"]
    assert why == "the shards were not read at this depth"
    assert found(copy) == []


def test_a_parent_that_is_read_whole_and_has_changed_is_no_measure(copy: Path) -> None:
    flip(shard_of(copy))
    with pytest.raises(SourceError, match=f"In copy, {shard_of(copy).name} has changed"):
        verify(Folder(copy), FAMILIES, Depth.FULL, Folder(copy))


def test_a_shard_of_another_size_is_found_without_reading(copy: Path) -> None:
    shard = shard_of(copy)
    size = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(b"0")
    messages = [finding.message for finding in found(copy)]
    assert messages == [f"{shard.name} has {size + 1:,} bytes; mquant.json says {size:,}."]


def test_a_changed_config_is_an_error_and_a_changed_side_file_a_warning(copy: Path) -> None:
    table = read_json(copy / "config.json")
    write_json(copy / "config.json", {**table, "note": 1})
    (copy / "recipe.yaml").write_text("{}")
    rules = {finding.rule: finding.severity for finding in found(copy)}
    assert rules == {"config-not-as-recorded": "error", "side-file-not-as-recorded": "warning"}


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "recipe.yaml").unlink()
    messages = [finding.message for finding in found(copy)]
    assert messages == ["recipe.yaml, which mquant.json lists, is missing."]


def test_a_card_of_another_day_is_no_finding(copy: Path) -> None:
    (copy / "README.md").write_text("# Other")
    assert found(copy) == []


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (None, "no mquant.json says what the files were"),
        ({"files": {}}, "no mquant.json says what the files were"),
        ({"files": {"config.json": {"bytes": 1, "sha256": "x"}}}, "mquant.json is invalid"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "mquant.json is invalid"),
    ],
)
def test_without_a_record_nothing_is_judged(
    copy: Path, record: dict[str, object] | None, why: str
) -> None:
    (copy / "mquant.json").unlink()
    if record is not None:
        write_json(copy / "mquant.json", record)
    report = judged(copy)
    assert report.not_judged["shard-not-as-recorded"] == why
    assert report.not_judged["config-not-as-recorded"] == why
    assert not report.undecided


def test_the_digests_that_a_hub_lists_are_compared_without_a_download(
    hub: FakeHub, copy: Path
) -> None:
    hub.add("org/good", copy)
    report = verify(HubRepo("org/good"), FAMILIES)
    assert report.findings == judged(copy, Depth.STRUCTURE).findings
    assert "shard-not-as-recorded" not in report.not_judged
    shard = shard_of(copy)
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    hub.add("org/bad", copy)
    hub.forget()
    compared = check_digests(HubRepo("org/bad"), silent, data=False)
    assert [finding.where for finding in compared.findings] == [shard.name]
    assert compared.shards == {shard.name}
    assert not [r for r in hub.requests if r.path.endswith(".safetensors")]


def test_a_card_states_the_digests_that_were_compared(copy: Path) -> None:
    shard = shard_of(copy).name
    digest = hashes(copy)[shard]
    line = f"{digest}  {shard}"
    (copy / "recipe.yaml").write_text("{}")
    assert line in render(gather(Folder(copy), FAMILIES))
    card = render(gather(Folder(copy), FAMILIES, depth=Depth.STRUCTURE))
    assert line not in card
    assert f"{hashes(copy)['config.json']}  config.json" in card
    assert "  recipe.yaml\n" not in card
