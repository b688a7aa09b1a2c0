"""`mquant eval` shows both models, writes a JSON document, and requires a text."""

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from mquant.cli.app import app
from run import FIXTURES, TRAINED

TEXT = ("--text", FIXTURES / "heldout.txt", "--tokens", 400, "--context", 100)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_a_person_sees_both_models_and_their_routers(trained: Path) -> None:
    result = run(trained, "--against", TRAINED, *TEXT)
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    assert "Text heldout.txt: 400 tokens, windows of 100" in shown
    assert "tiny-minimax-m2 " in shown
    assert "nats a token" in shown
    assert "Experts unused 0 of 30" in shown
    assert result.stdout.count("%)") >= 4, "a change of perplexity, and each layer's busiest expert"
    assert "hidden states take 819.2 kB of memory" in result.stderr


def test_the_json_document_has_perplexity_and_routing(trained: Path) -> None:
    result = run(trained, "--against", TRAINED, *TEXT, "--format", "json")
    document = json.loads(result.stdout)
    assert (document["schema"], document["ok"]) == ("mquant.eval/1", True)
    assert document["perplexity"] > document["parent_perplexity"] > 10
    assert document["text"]["name"] == "heldout.txt"
    assert len(document["routing"][0]["usage"]) == 10


def test_the_text_must_be_given() -> None:
    result = run(TRAINED)
    assert result.exit_code == 2
    assert "--text is missing." in result.stderr
