"""What each verb says of a checkpoint if mquant does not know what loaders make of it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from judges import read_json
from mquant.cli.app import app
from mquant.data_files import folder
from mutate import forget_digests
from run import TRAINED, quantize_nvfp4


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("undecided") / "Q")


@pytest.fixture
def src(quantized: Path, tmp_path: Path) -> Path:
    """A checkpoint of another architecture than its family's."""
    copy = forget_digests(Path(shutil.copytree(quantized, tmp_path / "Q")))
    config = {**read_json(copy / "config.json"), "architectures": ["Olmo2ForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def mquant(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def own_family(path: Path) -> Path:
    data = yaml.safe_load((folder("configs") / "minimax_m2.yaml").read_text())
    path.write_text(yaml.safe_dump({**data, "name": "mine"}, sort_keys=False))
    return path


def test_verify_and_verify_ignore_give_no_verdict(src: Path) -> None:
    for verb in ("verify", "verify-ignore"):
        result = mquant(verb, src)
        assert result.exit_code == 1
        assert "what vLLM makes of architectures ['Olmo2ForCausalLM'] is not known" in result.stderr
        assert "mquant verify SRC --loader vllm" in result.stderr


def test_the_report_says_what_was_not_judged(src: Path, tmp_path: Path) -> None:
    result = mquant("report", src, "-o", tmp_path / "r.html", "--format", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    page = (tmp_path / "r.html").read_text()
    assert "Not judged: " in page
    assert "could not be judged" in page


def test_a_dry_run_of_push_reads_the_family_and_verifies_nothing(quantized: Path) -> None:
    refused = mquant("push", quantized, "org/x", "--dry-run", "--family", "none.yaml")
    assert "none.yaml cannot be read" in refused.stderr
    shown = mquant("push", quantized, "org/x", "--dry-run")
    assert shown.exit_code == 0
    assert "Nothing was verified" in shown.stdout


def test_a_card_claims_no_engine_for_a_family_of_ones_own(quantized: Path, tmp_path: Path) -> None:
    family = own_family(tmp_path / "mine.yaml")
    for arguments, claims in (((), True), (("--family", family), False)):
        card = tmp_path / "card.md"
        result = mquant("card", quantized, "-o", card, *arguments)
        assert result.exit_code == 0, result.output
        assert ("vllm serve" in card.read_text()) is claims
        assert ("library_name: vllm" in card.read_text()) is claims


def test_verify_ignore_does_not_keep_a_router_that_has_no_weight(
    quantized: Path, tmp_path: Path
) -> None:
    copy = forget_digests(Path(shutil.copytree(quantized, tmp_path / "Q")))
    for shard in copy.glob("*.safetensors"):
        raw = shard.read_bytes()
        shard.write_bytes(raw.replace(b"gate.weight", b"gate.blocks"))
    index = copy / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("gate.weight", "gate.blocks"))
    result = mquant("verify-ignore", copy)
    assert result.exit_code == 3
    assert "vLLM 0.32 refuses the checkpoint: " in " ".join(result.stdout.split())
