"""A file that the user names is read within bounds, or refused in a sentence."""

import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from fakehub import FakeHub, hub
from hostile_inputs import tokenizer_json
from make import make_checkpoint
from mquant.checkpoint import Folder
from mquant.cli.app import app
from mquant.errors import DataFileError, MquantError
from mquant.events import silent
from mquant.publish.card.parent import find_parent
from mquant.smoke.server import Server
from mquant.tokens import text_tokens
from mquant.tokens.text_tokens import read_tokens
from mquant.untrusted import open_named
from run import FIXTURES, TRAINED, plan_of, quantize_nvfp4

__all__ = ["hub"]

KEY = "model.layers.0.self_attn.k_proj.weight"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def told(result: Result) -> str:
    """Return the error of a verb that ended with exit code 1 or 2 and one sentence."""
    assert result.exit_code in (1, 2), result.output
    assert "failed unexpectedly" not in result.output
    return next(line for line in result.stderr.splitlines() if line.startswith("Error: "))


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("src") / "src", layers=1, experts=2)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return folder


@pytest.fixture(scope="module")
def quantized(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_nvfp4(src, tmp_path_factory.mktemp("nvfp4") / "nvfp4")


# --- files that are no regular files


def reading(src: Path, quantized: Path, file: Path) -> list[list[object]]:
    """Return a command line for each option that names a file to read."""
    out = file.parent / "out"
    opt = ["--recipe", "nvfp4-opt"]
    return [
        ["eval", src, "--text", file],
        ["report", src, "--text", file, "-o", out],
        ["report", quantized, "--eval", file, "-o", out],
        ["report", quantized, "--compare", file, "-o", out],
        ["card", quantized, "--eval", file, "-o", out],
        ["card", quantized, "--compare", file, "-o", out],
        ["card", quantized, "--about", file, "-o", out],
        ["plan", src, "--recipe", file],
        ["plan", src, "--recipe", "nvfp4", "--family", file],
        ["synth", out, "--family", file],
        ["families", "check", file],
        ["quantize", src, *opt, "--importance", file, "-o", out],
        ["repair", quantized, "--from", src, "--importance", file, "-o", out],
        ["quantize", src, "--recipe", "nvfp4-gptq", "--data", f"{file}.jsonl", "-o", out],
    ]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_every_verb_refuses_what_is_no_regular_file(
    src: Path, quantized: Path, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "file"
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case _:
            file.mkdir()
    (tmp_path / "file.jsonl").symlink_to("file")

    for command in reading(src, quantized, file):
        sentence = told(run(*command))
        known = ["not a regular file", "no such file", "There is no", "has no scales searched"]
        known.append("cannot be read: Is a directory")
        assert any(words in sentence for words in known), (command, sentence)
    assert not (tmp_path / "out").exists()


def test_a_path_longer_than_any_is_one_sentence(src: Path, tmp_path: Path) -> None:
    command = ("quantize", src, "--recipe", "nvfp4-opt", "-o", tmp_path / "out")
    assert "longer than a path can be" in told(run(*command, "--importance", "a/" * 2500))


def test_a_path_that_cannot_be_looked_up_is_one_sentence(src: Path, quantized: Path) -> None:
    for command in reading(src, quantized, Path("x" * 300)):
        told(run(*command))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not search")
def test_a_folder_that_may_not_be_searched_is_one_sentence(
    src: Path, quantized: Path, tmp_path: Path
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "file").write_text("a: 1")
    commands = reading(src, quantized, locked / "file")
    commands += [["inspect", locked / "src"], ["verify", quantized, "--junit", locked / "x.xml"]]
    commands += [["verify", quantized, "--against", locked], ["finish", locked / "out"]]
    for command in commands:  # imports what the user may not read
        run(*command)
    locked.chmod(0)
    os.seteuid(65534)
    try:
        results = [run(*command) for command in commands]
    finally:
        os.seteuid(0)
        locked.chmod(0o700)

    for result in results:
        told(result)


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**40)

    with (
        pytest.raises(DataFileError, match="large is too large: mquant reads 1,000 bytes"),
        open_named(tmp_path / "large", "Give a small file.", 1000),
    ):
        pass


# --- texts


@pytest.mark.parametrize("tokens", [2, 100, 3000])
def test_the_tokens_of_the_beginning_are_those_of_the_whole_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    text = tmp_path / "text"
    content = (FIXTURES / "heldout.txt").read_text("utf-8")[
        :40_000
    ] + "ein Straßenübergang 🙂 " * 500
    text.write_text(content, "utf-8")
    whole = read_tokens(text, [Folder(TRAINED)], 1)
    assert whole.whole

    # Every cut between 4,001 and 4,004 bytes, some in the middle of a character.
    for first in (4001, 4002, 4003, 4004):
        monkeypatch.setattr(text_tokens, "_FIRST", first)
        monkeypatch.setattr(text_tokens, "MARGIN", 200)
        part = read_tokens(text, [Folder(TRAINED)], tokens)
        assert len(part.ids) >= tokens
        assert (part.ids == whole.ids[: len(part.ids)]).all()
        assert part.bytes < whole.bytes


@pytest.fixture
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have 100 bytes of a text read first, of which the last 10 characters are the margin."""
    monkeypatch.setattr(text_tokens, "_FIRST", 100)
    monkeypatch.setattr(text_tokens, "MARGIN", 10)


@pytest.mark.usefixtures("short_reads")
def test_a_cut_in_the_middle_of_a_character_is_no_error(tmp_path: Path, src: Path) -> None:
    (tmp_path / "text").write_text("🙂 " * 1000)

    assert read_tokens(tmp_path / "text", [Folder(src)], 3).bytes in range(97, 101)


def test_a_tokenizer_that_cuts_and_fills_texts_does_neither(tmp_path: Path, src: Path) -> None:
    table = json.loads(tokenizer_json())
    table["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(table))
    (tmp_path / "text").write_text("w1 w2 w3 w4")

    assert read_tokens(tmp_path / "text", [Folder(folder)], 9).ids.tolist() == [1, 2, 3, 4]


def test_a_large_text_takes_little_memory(tmp_path: Path, src: Path) -> None:
    text = tmp_path / "text"
    with text.open("wb") as file:
        for _ in range(300):
            file.write(b"w1 w2 w3 w4 w5 w6 w7 w8 " * 41_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    read = read_tokens(text, [Folder(src)], 16_385)

    assert not read.whole
    assert read.bytes == 300_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_a_terabyte_that_is_one_token_is_not_read(tmp_path: Path, src: Path) -> None:
    text = tmp_path / "text"
    text.write_text("w1 ")
    os.truncate(text, 2**40)

    message = raises(read_tokens, text, [Folder(src)], 100)
    assert message == "The first 1,200,000 bytes of the text have only 1 tokens."


@pytest.mark.usefixtures("short_reads")
def test_the_document_says_how_much_of_the_text_was_read(tmp_path: Path, src: Path) -> None:
    (tmp_path / "text").write_text("w1 w2 " * 1000)

    result = run("eval", src, "--text", tmp_path / "text", "--tokens", 5, "--format", "json")

    text = json.loads(result.stdout)["text"]
    assert (text["bytes"], text["tokens"]) == (100, None)
    assert "5 of more tokens" in result.stderr


def test_yaml_of_infinity_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: .inf")

    assert "cannot hold" in told(run("families", "check", tmp_path / "x.yaml"))


# --- cards, tokens, calibration data


@pytest.mark.parametrize("front", ["license: !!bool maybe", "license: !!int ''", "a: !!omap 5"])
def test_a_card_with_hostile_metadata_has_no_facts(tmp_path: Path, front: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\ntext")

    assert find_parent(None, Folder(tmp_path), silent).license == ""


@pytest.mark.parametrize("token", ["hf_\x01", "hf_é", "hf_中", "a\tb", b"\xff\xfe"])
def test_a_malformed_token_is_one_sentence(
    hub: FakeHub, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | bytes
) -> None:
    from huggingface_hub import constants

    if isinstance(token, bytes):
        (tmp_path / "token").write_bytes(token)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    else:
        monkeypatch.setenv("HF_TOKEN", token)

    result = run("inspect", "org/model")

    assert told(result) == "Error: The Hugging Face token is malformed."
    assert str(token) not in result.output
    assert not hub.requests


def test_a_malformed_key_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-é")

    assert told(run("smoke", "http://127.0.0.1:9")) == "Error: OPENAI_API_KEY is malformed."


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'{"text": ' + b"[" * 100_000, "Line 1 of"),
        ("x.jsonl", b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}", "Line 1 of"),
        (
            "x.jsonl",
            b'{"messages": ' + b"[" * 40 + b"]" * 40 + b"}",
            "neither `text` nor `messages`",
        ),
        ("x.txt", b"\xff\xfe", "is damaged"),
        ("x.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", "is damaged"),
    ],
)
def test_hostile_calibration_data_is_one_sentence(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)

    result = run("calibrate", TRAINED, "--data", tmp_path / name, "-o", tmp_path / "out")

    assert words in told(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.upstream
@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_file_of_the_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    damaged = Path(shutil.copytree(TRAINED, tmp_path / "src"))
    (damaged / name).write_text('{"a": ')
    (tmp_path / "x.jsonl").write_text('{"text": "a b c"}')

    result = run("calibrate", damaged, "--data", tmp_path / "x.jsonl", "-o", tmp_path / "out")

    assert told(result).startswith(f"Error: {name} in {damaged} cannot be understood: ")


def raises(call: Any, *arguments: Any) -> str:
    with pytest.raises(MquantError) as caught:
        call(*arguments)
    return caught.value.message


def test_a_tokenizer_over_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    os.truncate(tmp_path / "tokenizer.json", 2**40)
    (tmp_path / "text").write_text("a")

    message = raises(read_tokens, tmp_path / "text", [Folder(tmp_path)], 1)
    assert message == "tokenizer.json is too large to be valid."


def test_an_importance_file_that_became_a_pipe_is_one_sentence(src: Path, tmp_path: Path) -> None:
    from mquant.engines.importance import open_importance
    from mquant.plan import Plan

    plan: Plan = plan_of(src, "nvfp4-opt")
    os.mkfifo(tmp_path / "pipe")

    assert raises(open_importance, tmp_path / "pipe", plan).endswith("is not a regular file.")


def test_a_server_that_answers_byte_by_byte_is_not_waited_for() -> None:
    def drip() -> Iterator[bytes]:
        while True:
            time.sleep(0.01)
            yield b" "

    server = Server("http://127.0.0.1:9", seconds=0.1)
    server._client = httpx.Client(
        transport=httpx.MockTransport(lambda _: httpx.Response(200, content=drip()))
    )

    assert raises(server.choose) == "127.0.0.1:9 did not answer within 0 s."
