"""`mquant repair` reports the damage, writes the repaired files, and downloads little."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from corpus import OF_NVFP4A16
from fakehub import FakeHub, hub
from judges import hashes, opened, read_json
from mquant.checkpoint import FIRST_READ
from mquant.cli.app import app
from mquant.output import WORK
from mutate import flip
from run import TRAINED, quantize_nvfp4

__all__ = ["hub"]

BAD, PARENT = "org/bad", "org/parent"


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("right") / "good", shard_bytes=400_000)


def broken(right: Path, folder: Path, name: str) -> Path:
    return next(case for case in OF_NVFP4A16 if case.name == name).make(right, folder)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["repair", *map(str, arguments)])


def document(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = run(*arguments, "--format", "json")
    assert result.exit_code == code, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    assert (value["schema"], value["ok"]) == ("mquant.repair/1", code == 0)
    return value


def shown(result: Result) -> str:
    return " ".join(result.stdout.split())


def test_a_changed_shard_is_made_again_whole_and_the_output_says_why(
    right: Path, tmp_path: Path
) -> None:
    why = "all tensors of a changed shard are made again"
    bad = Path(shutil.copytree(right, tmp_path / "bad"))
    flip(sorted(bad.glob("*.safetensors"))[1])
    assert why in shown(run(bad, "--from", TRAINED, "--dry-run"))
    routers = broken(right, tmp_path / "other", "the origin bug: all routers quantized")
    assert why not in shown(run(routers, "--from", TRAINED, "--dry-run"))


def test_the_output_names_the_damage_and_the_repairs(right: Path, tmp_path: Path) -> None:
    bad = broken(right, tmp_path, "the origin bug: all routers quantized")
    result = run(bad, "--from", TRAINED, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    text = shown(result)
    assert "3 router modules are quantized" in text
    assert "From the parent: router 3 tensors, 30.72 kB" in text
    assert "Left out 9 tensors that are wrong or do not belong" in text
    assert f"Repaired {tmp_path / 'out'}" in text


def test_a_dry_run_reports_the_repairs_and_writes_nothing(right: Path, tmp_path: Path) -> None:
    bad = broken(right, tmp_path, "an expert missing")
    before = hashes(tmp_path)
    report = document(bad, "--from", TRAINED, "-o", tmp_path / "out", "--dry-run")
    assert len(report["replaced"]) == 3
    sizes = {name: info.nbytes for name, info in opened(TRAINED).tensors.items()}
    assert report["parent_bytes"] == sum(sizes[name] for name in report["replaced"])
    assert len(report["shards"]["rewritten"]) == 1
    assert report["needed"]
    assert "out" not in report
    assert hashes(tmp_path) == before


def test_a_sound_checkpoint_is_reported_and_nothing_is_written(right: Path, tmp_path: Path) -> None:
    result = run(right, "--from", TRAINED, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert (
        "Nothing to repair: vLLM 0.32 loads every tensor of SRC; a sample of its weights is as "
        "near to the parent's as rounding allows (--depth full compares all)." in shown(result)
    )
    assert not (tmp_path / "out").exists()


def test_an_unrepairable_checkpoint_is_refused_before_anything_is_written(
    right: Path, tmp_path: Path
) -> None:
    bad = broken(right, tmp_path, "an expert missing")
    stranger = Path(shutil.copytree(TRAINED, tmp_path / "stranger"))
    config = read_json(stranger / "config.json")
    (stranger / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    result = run(bad, "--from", stranger, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "Refused: " in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--from is missing: the checkpoint SRC was made from."),
        (["--from", "x", "-o", "y", "--in-place"], "-o and --in-place exclude each other."),
    ],
)
def test_a_wrong_command_line_is_a_sentence(
    right: Path, arguments: list[str], sentence: str
) -> None:
    result = run(right, *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_a_folder_is_repaired_in_place(right: Path, tmp_path: Path) -> None:
    bad = broken(right, tmp_path, "one router quantized")
    report = document(bad, "--from", TRAINED, "--in-place")
    assert report["out"] == str(bad)
    assert not (bad / WORK).exists()
    assert not document(bad, "--from", TRAINED, "--dry-run")["needed"]


def test_only_headers_and_replaced_tensors_of_a_hub_parent_are_downloaded(
    right: Path, tmp_path: Path, hub: FakeHub
) -> None:
    bad = broken(right, tmp_path, "the origin bug: all routers quantized")
    hub.add(PARENT, TRAINED)
    report = document(bad, "--from", PARENT, "-o", tmp_path / "out")
    routers = report["parent_bytes"]
    assert report["read_of_parent"] == routers
    files = {path.name: path.stat().st_size for path in TRAINED.iterdir()}
    shards = [size for name, size in files.items() if name.endswith(".safetensors")]
    headers = sum(min(size, 65_536) for size in shards)
    norms = 3 * 1024
    small = files["config.json"] + files["model.safetensors.index.json"] + 20_000  # the listing
    assert hub.bytes_served <= routers + headers + norms + small
    assert hashes(tmp_path / "out").keys() == hashes(right).keys()


def test_repair_of_a_hub_repo_writes_and_downloads_only_the_files_to_upload(
    right: Path, tmp_path: Path, hub: FakeHub
) -> None:
    bad = broken(right, tmp_path, "a tensor in two shards, with other values")
    hub.add(BAD, bad)
    out = tmp_path / "out"
    facts = document(BAD, "--from", TRAINED, "-o", out)
    shards = {path.name for path in out.glob("*.safetensors")}
    assert shards == set(facts["shards"]["rewritten"]) < {p.name for p in bad.glob("*.safetensors")}
    whole = {r.path.rpartition("/")[2] for r in hub.requests if r.method == "GET" and not r.range}
    large = {path.name for path in bad.glob("*.safetensors") if path.stat().st_size > FIRST_READ}
    assert whole & large == shards & large

    upload, verify = facts["commands"]
    assert shlex.split(upload) == [
        *("hf", "upload", BAD, str(out), "."),
        *("--delete", "model-99999-of-99999.safetensors"),
        *("--commit-message", "Repair"),
    ]
    assert shlex.split(verify) == ["mquant", "verify", BAD]
    (bad / "model-99999-of-99999.safetensors").unlink()
    shutil.copytree(out, bad, dirs_exist_ok=True)
    hub.add(BAD, bad)
    judged = CliRunner().invoke(app, ["verify", BAD, "--depth", "numbers", "--format", "json"])
    assert (judged.exit_code, json.loads(judged.stdout)["warnings"]) == (0, 0)
    assert document(BAD, "--from", TRAINED, "-o", out, "--depth", "numbers")["needed"] is False
    files = read_json(bad / "mquant.json")["files"]
    assert {name: entry["sha256"] for name, entry in files.items()} == {
        name: digest for name, digest in hashes(bad).items() if name != "mquant.json"
    }


def test_a_second_repair_of_a_hub_repo_is_already_done(
    right: Path, tmp_path: Path, hub: FakeHub
) -> None:
    hub.add(BAD, broken(right, tmp_path, "one router quantized"))
    out = tmp_path / "out"
    assert not document(BAD, "--from", TRAINED, "-o", out)["already_done"]
    assert document(BAD, "--from", TRAINED, "-o", out)["already_done"]


def test_a_hub_repo_cannot_be_repaired_in_place(right: Path, hub: FakeHub) -> None:
    hub.add(BAD, right)
    result = run(BAD, "--from", TRAINED, "--in-place")
    assert result.exit_code == 2
    assert "--in-place is for folders; org/bad is a hub repo." in result.stderr
