"""`mquant verify-ignore` judges checkpoints that upstream writes, in folders and on a hub."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fakehub import FakeHub, hub
from judges import model_free_ptq, one_shard, oneshot_and_save
from make import make_checkpoint, write_json
from mquant.cli.app import app
from run import TRAINED, quantize_nvfp4

__all__ = ["hub"]

GATES = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(3)]
PACKED = ["weight_global_scale", "weight_packed", "weight_scale"]
GOOD = (
    "All 3 routers, lm_head and the embeddings are kept: nothing in ignore stops vLLM 0.32 from "
    "loading this checkpoint."
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify-ignore", *map(str, arguments)])


def document(*arguments: object, code: int) -> dict[str, Any]:
    result = run(*arguments, "--format", "json")
    assert result.exit_code == code, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    assert (value["schema"], value["ok"]) == ("mquant.verify-ignore/1", code == 0)
    return value


def found_rules(value: dict[str, Any]) -> dict[str, str]:
    return {finding["rule"]: finding["severity"] for finding in value["findings"]}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint, quantized by mquant."""
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("good") / "out")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint in one shard, unquantized."""
    return one_shard(TRAINED, tmp_path_factory.mktemp("one") / "out")


@pytest.fixture(scope="module")
def saved_by_oneshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint, quantized by plain `oneshot` and saved with `save_pretrained`."""
    return oneshot_and_save(TRAINED, tmp_path_factory.mktemp("upstream") / "out")


def from_folder_and_hub(
    hub: FakeHub,
    folder: Path,
    code: int,
) -> dict[str, Any]:
    """Return the document on a folder, and assert that its hub repo gives the same from headers."""
    local = document(folder, code=code)
    hub.add("org/model", folder)
    repo = document("org/model", code=code)
    same = {"source": None, "bytes_read": None, "requests": None}
    assert {**repo, **same} == {**local, **same}
    assert (local["bytes_read"], local["requests"]) == (None, None)
    assert (repo["bytes_read"] <= hub.bytes_served, repo["requests"]) == (True, len(hub.requests))
    assert f"in {repo['requests']} requests from the hub." in run("org/model").stdout
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    # At most 200 kB of a file (one read of 64 KiB of a shard), and 20 kB for the listing.
    limit = sum(min(path.stat().st_size, 200_000) for path in folder.iterdir())
    assert 0 < hub.bytes_served < min(limit + 20_000, weights / 2)
    for source in (str(folder), "org/model"):  # `verify` comes to the same verdict
        assert CliRunner().invoke(app, ["verify", source]).exit_code == code
    return local


# --- checkpoints of mquant and of upstream


def test_a_checkpoint_of_mquant_passes(hub: FakeHub, good: Path) -> None:
    report = from_folder_and_hub(hub, good, code=0)
    assert report["verdict"] == GOOD
    assert report["findings"] == report["quantized"] == report["uncovered"] == []
    assert report["kinds"]["router"] == {"found": 3, "kept": 3, "quantized": 0, "covered": 3}
    assert [entry["entry"] for entry in report["ignore"]] == [
        "lm_head",
        "model.embed_tokens",
        *GATES,
    ]
    assert document(good, "--strict", code=0)["findings"] == []


@pytest.mark.upstream
def test_model_free_ptq_that_ignores_lm_head_only(
    hub: FakeHub,
    plain: Path,
    tmp_path: Path,
) -> None:
    facts = from_folder_and_hub(hub, model_free_ptq(plain, tmp_path / "out", ["lm_head"]), code=3)
    assert facts["verdict"] == (
        "3 of 3 routers and the embeddings are quantized: vLLM 0.32 will refuse to load this "
        "checkpoint."
    )
    assert found_rules(facts) == {"router-quantized": "error", "embedding-quantized": "error"}
    assert {entry["module"]: entry["suffixes"] for entry in facts["quantized"]} == dict.fromkeys(
        [*GATES, "model.embed_tokens"], PACKED
    )


@pytest.mark.upstream
def test_model_free_ptq_that_forgets_the_routers(
    hub: FakeHub,
    plain: Path,
    tmp_path: Path,
) -> None:
    out = model_free_ptq(plain, tmp_path / "out", ["lm_head", "model.embed_tokens"])
    report = from_folder_and_hub(hub, out, code=3)
    assert (
        report["verdict"]
        == "3 of 3 routers are quantized: vLLM 0.32 will refuse to load this checkpoint."
    )
    assert found_rules(report) == {"router-quantized": "error"}


@pytest.mark.upstream
def test_model_free_ptq_with_the_right_ignore_list(plain: Path, tmp_path: Path) -> None:
    report = document(model_free_ptq(plain, tmp_path / "out"), code=0)
    assert (report["verdict"], report["findings"]) == (GOOD, [])


@pytest.mark.upstream
def test_a_checkpoint_saved_by_plain_oneshot(hub: FakeHub, saved_by_oneshot: Path) -> None:
    report = from_folder_and_hub(hub, saved_by_oneshot, code=3)
    assert found_rules(report) == {"expert-names": "error", "ignore-uncovered": "warning"}
    assert report["uncovered"] == ["model.embed_tokens"]
    judged = CliRunner().invoke(app, ["verify", str(saved_by_oneshot), "--format", "json"])
    assert judged.exit_code == 3
    assert found_rules(json.loads(judged.stdout)) == {
        **found_rules(report),
        "mtp-without-tensors": "info",
    }


def test_an_unquantized_checkpoint_has_no_ignore_list(plain: Path) -> None:
    report = document(plain, "--strict", code=0)
    assert report["verdict"].startswith("Nothing is quantized, so there is no ignore list")
    assert report["method"] is None


# --- output


def test_the_verdict_comes_first(good: Path) -> None:
    result = run(good)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert " ".join(lines[:2]) == GOOD
    assert "router         3     3          0          3" in lines
    assert "  1     1  lm_head" in lines
    assert max(map(len, lines)) <= 80


def test_warnings_fail_only_if_strict(good: Path, tmp_path: Path) -> None:
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((good / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["re:nothing", "\x1b[2J"]
    write_json(tmp_path / "config.json", config)
    report = document(tmp_path, code=0)
    assert set(found_rules(report).items()) == {
        ("ignore-uncovered", "warning"),
        ("ignore-unmatched", "warning"),
    }
    assert found_rules(document(tmp_path, "--strict", code=3)) == found_rules(report)
    assert "\x1b" not in run(tmp_path).stdout


# --- unreadable checkpoints


def one_sentence(result: Result) -> str:
    assert result.exit_code == 1
    assert result.stdout == ""
    error, _, fix = result.stderr.partition("\n")
    assert error.startswith("Error: ")
    assert fix.count("\n") == 1
    return error


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "does not exist" in one_sentence(run(tmp_path / "nothing"))


def test_no_such_repo_no_such_revision_and_gated(
    hub: FakeHub,
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(tmp_path / "model")
    hub.add("org/model", folder)
    hub.add("org/gated", folder, access="gated")
    assert "There is no repo org/nothing" in one_sentence(run("org/nothing"))
    error = one_sentence(run("org/model", "--revision", "v9"))
    assert "org/model has no revision 'v9'" in error
    assert "org/gated is gated" in one_sentence(run("org/gated"))


def test_a_truncated_shard(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", shards=1)
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "model.safetensors" in one_sentence(run(folder))


# --- speed


def test_verify_ignore_imports_no_torch(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "model")
    code = (
        "import atexit, sys; from mquant.cli import main\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "verify-ignore", str(src)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"
