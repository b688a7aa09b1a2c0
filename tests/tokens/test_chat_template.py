"""Messages become the tokens that transformers makes of them; a template is bounded code."""

import json
import shutil
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mquant.checkpoint import Folder
from mquant.errors import DataFileError, MquantError, SourceError
from mquant.tokens import tokenizer as tokenizer_module
from mquant.tokens.tokenizer import Tokenizer, read_tokenizer
from run import TRAINED
from tokens.chat_templates import CONVERSATIONS, TEMPLATES, TOOLS

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "tools": None}


def folder_with(
    folder: Path, template: str | None = None, config: dict[str, Any] | None = None
) -> Path:
    """Write the fixture's tokenizer, with a chat template and other keys of its config."""
    folder.mkdir(exist_ok=True)
    shutil.copy(TRAINED / "tokenizer.json", folder)
    stated = json.loads((TRAINED / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | (config or {})))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


def ours(folder: Path) -> Tokenizer:
    return read_tokenizer([Folder(folder)])


def upstream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return transformers' tokenizer, on the day that mquant's templates are rendered."""
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Then":
            return cls(2024, 7, 26, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Then)
    hf: Any = AutoTokenizer
    return hf.from_pretrained(folder)


def by_transformers(tokenizer: Any, row: dict[str, Any]) -> list[int] | None:
    """Return the tokens of a conversation, or None if the template refuses it."""
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            deepcopy(row["messages"]), tools=row["tools"], return_dict=False
        )
    except Exception:  # noqa: BLE001 -- templates raise anything
        return None
    return ids


def by_mquant(tokenizer: Tokenizer, row: dict[str, Any]) -> list[int] | None:
    try:
        ids: list[int] = tokenizer.encode([row], "DATA")[0].tolist()
    except DataFileError:
        return None
    return ids


@pytest.mark.upstream
@pytest.mark.parametrize("style", [*TEMPLATES, "the fixture's"])
def test_conversations_have_the_tokens_of_transformers(
    tmp_path: Path, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"unk_token": "<unk>", "pad_token": {"content": "<pad>", "__type": "AddedToken"}}
    fixture = (TRAINED / "chat_template.jinja").read_text()
    folder = folder_with(tmp_path / "src", TEMPLATES.get(style, fixture), config)
    tokenizer, hf = ours(folder), upstream(folder, monkeypatch)

    agreed = 0
    for name, row in CONVERSATIONS.items():
        expected = by_transformers(hf, row)
        if name == "parts" and style in ("dated", "strict", "the fixture's"):
            continue  # these templates write the list as Python does, or raise: a test below
        assert by_mquant(tokenizer, row) == expected, name
        agreed += expected is not None
    assert agreed >= 2


@pytest.mark.upstream
@pytest.mark.parametrize("place", ["config", "named in the config", "files"])
def test_rows_with_tools_take_the_template_for_tools(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, tools = TEMPLATES["strict"], TEMPLATES["chatml"]
    if place == "config":
        folder = folder_with(tmp_path / "src", None, {"chat_template": tools})
    elif place == "named in the config":
        named = [
            {"name": "default", "template": plain},
            {"name": "tool_use", "template": tools},
        ]
        folder = folder_with(tmp_path / "src", None, {"chat_template": named})
    else:
        folder = folder_with(tmp_path / "src", plain, {"chat_template": "not this"})
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool_use.jinja").write_text(tools)
    tokenizer, hf = ours(folder), upstream(folder, monkeypatch)

    for name in ("question", "tools"):
        row = CONVERSATIONS[name]
        assert by_mquant(tokenizer, row) == by_transformers(hf, row) is not None, name


@pytest.mark.upstream
@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]},
        {"extra_special_tokens": {"image_token": "<image>"}, "video_token": "<video>"},
        {
            "added_tokens_decoder": {
                "0": {"content": "]~!b[", "special": True},
                "9000": {"content": "<think>", "special": False, "normalized": False},
                "9001": {"content": "<|im_end|>", "lstrip": True, "special": True},
            }
        },
    ],
    ids=["named", "extra", "by id"],
)
def test_tokens_that_the_config_adds_are_the_tokens_of_transformers(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path / "src", None, config)
    text = "]~!b[ It is <|im_start|>far <|im_end|> <think> <image><video> and ]~b] [e~["
    expected = upstream(folder, monkeypatch)(text, add_special_tokens=False)["input_ids"]

    assert ours(folder).encode([{"text": text}], "DATA")[0].tolist() == expected


def failing(folder: Path, row: dict[str, Any] = HELLO) -> MquantError:
    with pytest.raises(MquantError) as caught:
        ours(folder).encode([row], "DATA")
    return caught.value


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Give\n a system message.') }}", "Give a system message"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
        ("{% for x in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'x' * 10**10 }}", "it takes more memory than text of this length needs"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_one_sentence(
    tmp_path: Path, template: str, reason: str
) -> None:
    error = failing(folder_with(tmp_path / "src", template))
    sentence = "The chat template cannot format the messages of DATA: "
    assert error.message.startswith(sentence)
    assert reason in error.message
    assert "\n" not in error.message


def test_a_template_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_SECONDS", 2)
    loop = "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}"

    error = failing(folder_with(tmp_path / "src", loop))

    assert "takes more than 2 s for" in error.message


def test_a_template_that_is_no_template_is_one_sentence(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "src", "\n{% for x in %}")
    error = failing(folder)
    assert isinstance(error, SourceError)
    assert error.message == (
        f"The chat template in {folder} cannot be understood: Expected an expression, got 'end of "
        "statement block', line 2."
    )


def test_a_model_without_a_template_takes_text_only(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "src")
    assert len(ours(folder).encode([{"text": "It is far."}], "DATA")[0])
    assert failing(folder).message == (
        f"{folder} has no chat template, which rows with `messages` need."
    )


def test_parts_that_a_template_would_write_as_pythons_text_are_refused(tmp_path: Path) -> None:
    fixture = (TRAINED / "chat_template.jinja").read_text()
    error = failing(folder_with(tmp_path / "src", fixture), CONVERSATIONS["parts"])
    assert error.message.endswith("it writes a `content` with parts as Python's text of a list.")


def test_the_date_of_a_template_is_the_same_every_day(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "src", "{{ strftime_now('%Y-%m-%d') }}")
    (ids,) = ours(folder).encode([{"messages": HELLO["messages"], "tools": TOOLS}], "DATA")
    (same,) = ours(folder).encode([{"text": "2024-07-26"}], "DATA")
    assert ids.tolist() == same.tolist()


@pytest.mark.parametrize("file", ["tiktoken.model", "tokenizer.model"])
def test_a_tokenizer_that_only_code_can_read_is_one_sentence(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(SourceError) as caught:
        read_tokenizer([Folder(tmp_path)])
    assert caught.value.message == (
        f"{tmp_path.name} has {file} but no tokenizer.json, and mquant runs no tokenizer's code."
    )


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": 5},
        {"chat_template": [{"name": "default"}]},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"bos_token": {}},
    ],
)
def test_a_config_in_another_form_is_one_sentence(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = folder_with(tmp_path / "src", None, config)
    with pytest.raises(SourceError, match=r"tokenizer_config.json in .* cannot be understood"):
        ours(folder)
