"""`mquant smoke` passes right answers, names wrong answers, and runs no code from an answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fakeserver import MODEL, FakeServer, server
from mquant.cli.app import app
from mquant.smoke.prompts import prompts
from run import TRAINED

__all__ = ["server"]

RIGHT = {
    "coding": "```python\ndef is_prime(n):\n    return all(n % d for d in range(2, n))\n```",
    "maths": "17 * 24 = 408, and 408 + 13 = **421**.",
    "translation": "Die Katze schläft auf dem Tisch.",
    "recall": "740-193",
    "json": '```json\n{"capital": "Paris", "digits": [3, 1, 4]}\n```',
}
MARKS = {
    "is_prime": "coding",
    "crate": "maths",
    "German": "translation",
    "safe": "recall",
    "JSON": "json",
}


def answering(**other: str | None) -> Callable[[str], str | None]:
    """Return the answers of a server: the right answers, except those in `other`."""
    answers: dict[str, str | None] = {**RIGHT, **other}
    return lambda prompt: next(answers[i] for mark, i in MARKS.items() if mark in prompt)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["smoke", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def document(*arguments: object, code: int = 0) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(run(*arguments, "--format", "json", code=code).stdout)
    assert (value["schema"], value["ok"]) == ("mquant.smoke/1", code == 0)
    return value


def wrong(server: FakeServer, name: str, answer: str | None) -> str:
    """Return the message on a wrong answer, if all other answers are right."""
    server.answer = answering(**{name: answer})
    report = document(server.url, code=3)
    assert report["passed"] == 4
    (finding,) = report["findings"]
    assert finding["rule"] == f"smoke-{name}"
    return str(finding["message"])


def test_right_answers_pass(server: FakeServer) -> None:
    server.answer = answering()
    report = document(server.url)
    assert (report["passed"], report["model"]) == (5, MODEL)
    assert {prompt["id"]: prompt["answer"] for prompt in report["prompts"]} == RIGHT
    assert "5 of 5 answers are right." in run(f"{server.url}/v1/").stdout


def test_prompts_use_the_sampling_of_generation_config(server: FakeServer) -> None:
    server.answer = answering()
    document(server.url, "--checkpoint", TRAINED, "--max-tokens", "512")
    sampling = {"temperature": 1.0, "top_p": 0.95, "top_k": 40}
    for body in server.bodies:
        del body["messages"]
        assert body == {"model": MODEL, "max_tokens": 512, "seed": 0, **sampling}


def test_sampling_is_greedy_if_generation_config_says(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "top_k": 40}')
    server.answer = answering()
    options = document(server.url, "--checkpoint", tmp_path)["options"]
    assert options == {"max_tokens": 4096, "seed": 0, "temperature": 0}


def test_without_a_checkpoint_the_servers_own_sampling_holds(server: FakeServer) -> None:
    server.answer = answering()
    assert document(server.url)["options"] == {"max_tokens": 4096, "seed": 0}


@pytest.mark.parametrize(
    ("name", "answer", "sentence"),
    [
        ("coding", "def is_prime(n): return (", "Coding: the code is not Python."),
        ("coding", "def prime(n):\n    return n", "Coding: there is no function is_prime."),
        ("coding", "def is_prime(n):\n    pass", "Coding: is_prime returns nothing."),
        ("maths", "It is 420.", "Maths: the answer ends with 420, not 421."),
        ("maths", "Many.", "Maths: the answer ends with no number, not 421."),
        ("translation", "Die Katze schläft.", "Translation: the translation has no Tisch."),
        ("recall", "740-139", "Recall: the answer lacks 740-193, the code in the prompt."),
        ("json", "Paris, 3.14", "JSON: the answer is not JSON."),
        ("json", '{"capital": "Lyon"}', "JSON: the JSON is not what was asked for."),
        ("maths", "!" * 200 + " 421", "Maths: one character is repeated over and over."),
        ("maths", "the " * 30 + "421", "Maths: one word is repeated over and over."),
        ("maths", "\ufffd 421", "Maths: the answer has characters that are no text."),
        ("maths", "", "Maths: there is no answer."),
        ("maths", None, "Maths: there is no answer."),
    ],
)
def test_a_wrong_answer_is_named(
    server: FakeServer, name: str, answer: str | None, sentence: str
) -> None:
    assert wrong(server, name, answer) == sentence


def test_the_thinking_before_an_answer_does_not_count(server: FakeServer) -> None:
    server.answer = answering(maths="<think>420? No.</think>\n\n421")
    assert document(server.url)["passed"] == 5
    assert wrong(server, "maths", "421</think>") == "Maths: there is no answer."


def test_an_answer_that_was_cut_off_while_thinking_is_named(server: FakeServer) -> None:
    server.finish = "length"
    assert wrong(server, "maths", None).endswith("the answer was cut off while thinking.")


def test_code_is_read_and_never_run(server: FakeServer, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'x')!r}, 'w')\ndef is_prime(n):\n    return n"
    server.answer = answering(coding=code)
    assert document(server.url)["passed"] == 5
    assert not list(tmp_path.iterdir())


def test_the_long_text_fits_into_the_servers_context(server: FakeServer) -> None:
    server.answer = answering()
    document(server.url)
    longest = max(len(body["messages"][0]["content"]) for body in server.bodies)
    assert longest > 8_000
    server.bodies.clear()
    server.context = 2_000
    document(server.url, "--max-tokens", "1000")
    longest = max(len(body["messages"][0]["content"]) for body in server.bodies)
    assert longest < 3_000
    assert all("740-193" in p.text for p in (*prompts(), *prompts(1)) if p.id == "recall")


def test_an_answer_is_shown_and_never_obeyed(server: FakeServer) -> None:
    server.answer = answering(recall="740-193 \x1b[31m[bold]x")
    assert "740-193 \\x1b[31m[bold]x" in run(server.url).stdout


def test_a_key_is_sent_and_never_shown(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.answer = answering()
    assert "secret" not in run(server.url, "--format", "json").output
    assert server.keys == ["Bearer sk-secret"]
    server.status = 401
    assert "secret" not in run(server.url, code=1).output


@pytest.mark.parametrize(
    ("status", "raw", "sentence"),
    [
        (401, None, "requires a key (HTTP 401)."),
        (500, None, "answers HTTP 500 to /models."),
        (200, b"<html>", "does not answer as an OpenAI-compatible server does."),
        (200, b'{"data": []}', "does not answer as an OpenAI-compatible server does."),
        (200, b"[" * 100_000, "does not answer as an OpenAI-compatible server does."),
        (200, b" " * 10_000_001, "does not answer as an OpenAI-compatible server does."),
    ],
    ids=["key", "trouble", "page", "no model", "deep", "large"],
)
def test_a_server_that_fails_is_a_sentence(
    server: FakeServer, status: int, raw: bytes | None, sentence: str
) -> None:
    server.status, server.raw = status, raw
    assert f"127.0.0.1:{server.port} {sentence}" in run(server.url, code=1).stderr


def test_an_unreachable_server_is_a_sentence() -> None:
    gone = FakeServer()
    gone.close()
    result = run(f"http://me:pass@127.0.0.1:{gone.port}", code=1)
    assert f"127.0.0.1:{gone.port} cannot be reached." in result.stderr
    assert "pass" not in result.output


def test_a_model_that_is_not_served_is_named(server: FakeServer) -> None:
    result = run(server.url, "--model", "other", code=1)
    assert f"does not serve other, but {MODEL}." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "URL is missing."),
        (["localhost:8000"], "'localhost:8000' is no address of a server."),
        (["http://["], "'http://[' is no address of a server."),
        (["http://x", "--revision", "main"], "--revision is for --checkpoint."),
    ],
)
def test_a_wrong_command_line_is_a_sentence(arguments: list[str], sentence: str) -> None:
    assert sentence in run(*arguments, code=2).stderr
