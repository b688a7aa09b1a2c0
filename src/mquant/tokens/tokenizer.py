"""The tokenizer and chat template of a checkpoint, used in a child process of bounded memory.

tokenizer.json is read, and of the other files what transformers adds to it: tokens, the special
tokens that a template may name, and the chat template. No tokenizer code of the checkpoint runs.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from mquant.checkpoint import Source
from mquant.errors import DataFileError, SourceError
from mquant.text import size
from mquant.tokens.in_child import FAILED, MARGIN, PART
from mquant.untrusted import MAX_TEXT_BYTES, parse_json

Integers = npt.NDArray[np.int64]
Row = Mapping[str, Any]
"""`text`, or `messages`, `tools` and perhaps the row's `number`: what `Tokenizer.encode` takes."""

TOKENIZER: Final = "tokenizer.json"
_CONFIG: Final = "tokenizer_config.json"
_TEMPLATE: Final = "chat_template.jinja"
_TEMPLATES: Final = "additional_chat_templates/"
_OF_CODE: Final = ("tiktoken.model", "tokenizer.model", "vocab.json", "vocab.txt")
_MOST_CONFIG: Final = 20_000_000

_NAMED: Final = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""The special tokens that transformers gives to chat templates."""
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")

_PROGRAM: Final = Path(__file__).with_name("in_child.py")
_SECONDS: Final = 300
# Bytes of memory that tokenizing may take, in all, for a byte of tokenizer.json (measured: 21), and
# for a byte that is tokenized at a time (measured: 200 for a text that is one word). A byte of a
# longer row takes its token of 8 bytes, and a character of 4 bytes, each some times over.
_MEMORY: Final = 100_000_000
_MEMORY_OF_TOKENIZER: Final = 30
_MEMORY_OF_TEXT: Final = 320
_MEMORY_OF_BYTE: Final = 32
_AT_ONCE: Final = 4 * (PART + 2 * MARGIN)
"""The most bytes that are tokenized at a time."""


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a checkpoint.

    `place` is the checkpoint's folder or repo, for messages. `raw` is tokenizer.json. `added` are
    tokens that other files add. `names` maps names such as `bos_token` to texts, for `templates`,
    which are chat templates by name: `default` and perhaps `tool_use`.
    """

    place: str
    raw: bytes
    added: tuple[Row, ...]
    names: Mapping[str, str]
    templates: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """The digest of all that decides the tokens of a text."""
        return _digest(hashlib.sha256(self.raw).hexdigest(), list(self.added))

    @property
    def template_sha256(self) -> str:
        """The digest of all that decides the text of messages."""
        return _digest(dict(self.templates), dict(self.names))

    def encode(self, rows: Sequence[Row], data: str, most: int | None = None) -> list[Integers]:
        """Return the ids of each row, or the first `most`; `data` names the rows in messages.

        Raises SourceError if tokenizer or template cannot be understood, DataFileError if they
        cannot take a row, or take too much memory or time.
        """
        return [ids for ids, _ in self._run(rows, data, most, ends=False)]

    def encode_with_ends(self, text: str, data: str) -> tuple[Integers, Integers]:
        """Return the ids of a text, and where each token ends, in characters. Raises as above."""
        ((ids, ends),) = self._run([{"text": text}], data, None, ends=True)
        return ids, ends

    def _run(
        self, rows: Sequence[Row], data: str, most: int | None, *, ends: bool
    ) -> Iterator[tuple[Integers, Integers]]:
        if any("messages" in row for row in rows) and "default" not in self.templates:
            raise SourceError(
                f"{self.place} has no chat template, which rows with `messages` need.",
                f"Copy {_TEMPLATE} from the model's repo, or give rows with `text`.",
            )
        request = {
            "bytes": len(self.raw),
            "added": self.added,
            "template": self.templates.get("default"),
            "tool_template": self.templates.get("tool_use"),
            "names": self.names,
            "most": most,
            "ends": ends,
        }
        lines = [json.dumps(row).encode() + b"\n" for row in rows]
        read = sum(len(r["text"].encode()) if "text" in r else len(json.dumps(r)) for r in rows)
        head = json.dumps(request).encode() + b"\n" + self.raw
        memory = _memory(len(head), max(map(len, lines)), whole=ends)
        answer = self._ask(head + b"".join(lines), memory, f"{read:,} bytes of {data}", data)
        at = 0
        for _ in rows:
            count = int(answer[at])
            ids = answer[at + 1 : at + 1 + count]
            at += 1 + count * (1 + ends)
            yield ids, answer[at - count : at] if ends else ids[:0]

    def _ask(self, request: bytes, memory: int, amount: str, data: str) -> Integers:
        """Return the answer of a child that may take `memory` bytes; `amount` is what it reads."""
        # -P: without this flag, imports would find files beside the program.
        command = [sys.executable, "-P", str(_PROGRAM), str(memory)]
        try:
            done = subprocess.run(  # noqa: S603 -- our own program; untrusted input goes to stdin
                command,
                input=request,
                capture_output=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise SourceError(
                f"The tokenizer in {self.place} takes more than {_SECONDS} s for {amount}.",
                "Get its files again, or give less text.",
            ) from None
        if done.returncode == FAILED:
            self._explain(json.loads(done.stderr.rpartition(b"\n")[2]), data)
        if done.returncode:
            raise SourceError(
                f"{TOKENIZER} cannot tokenize {amount} in {size(memory)}.",
                "Get the file again: a tokenizer that writes a long text for a short one is "
                "damaged.",
            )
        return np.frombuffer(done.stdout, np.int64)

    def _explain(self, failure: Mapping[str, Any], data: str) -> NoReturn:
        """Raise the error for a child that failed as it says."""
        reason = " ".join(failure["reason"].split())[:300].rstrip(".")
        if failure["what"] == "tokenizer":
            raise damaged(TOKENIZER, self.place, reason)
        if failure["what"] == "template":
            raise damaged("The chat template", self.place, reason)
        if failure["what"] == "text":
            raise DataFileError(
                f"{data} cannot be tokenized: {reason}.", "Give text that the tokenizer knows."
            )
        row = f", row {failure['number']:,}" if failure["number"] else ""
        if failure["what"] == "memory":
            reason = "it takes more memory than text of this length needs"
        raise DataFileError(
            f"The chat template cannot format the messages of {data}{row}: {reason}.",
            "Correct the messages, or give rows with `text`.",
        )


def read_tokenizer(sources: Sequence[Source]) -> Tokenizer:
    """Return the tokenizer of the first source that has one.

    Raises SourceError if no source has a tokenizer.json, or a file cannot be understood.
    """
    source = next((source for source in sources if TOKENIZER in source.files), None)
    if source is None:
        raise _missing(sources[0])
    place = str(source.folders[0]) if source.folders else source.name
    raw = _read(source, TOKENIZER, MAX_TEXT_BYTES)
    config = _table(source, _CONFIG, place)
    if "added_tokens_decoder" not in config:
        config |= _table(source, "special_tokens_map.json", place)
    try:
        return Tokenizer(
            place, raw, tuple(_added(config)), _names(config), _templates(source, config)
        )
    except (TypeError, ValueError, AttributeError, LookupError):
        raise damaged(_CONFIG, place, "its tokens or its chat template have another form") from None


def check_ids(ids: Sequence[Integers], vocabulary: int | None) -> None:
    """Raise SourceError for a token that a model of so many tokens does not have."""
    largest = max(int(each.max()) for each in ids)
    if vocabulary is not None and largest >= vocabulary:
        raise SourceError(
            f"The tokenizer produces token {largest:,}; the model has {vocabulary:,} tokens.",
            "Use the tokenizer of the model.",
        )


def damaged(file: str, place: str, reason: str) -> SourceError:
    """Return the error for a file of the tokenizer that cannot be understood."""
    return SourceError(
        f"{file} in {place} cannot be understood: {reason}.", "Get the tokenizer's files again."
    )


def _memory(head: int, row: int, *, whole: bool) -> int:
    """Return the bytes of memory for a request's head and its longest row, given in bytes.

    `whole`: the row is not tokenized in parts.
    """
    at_once = row if whole else min(row, _AT_ONCE)
    text = _MEMORY_OF_TEXT * at_once + _MEMORY_OF_BYTE * (row - at_once)
    return _MEMORY + _MEMORY_OF_TOKENIZER * head + text


def _missing(source: Source) -> SourceError:
    other = next((name for name in _OF_CODE if name in source.files), None)
    if other is None:
        return SourceError(
            f"{source.name} has no {TOKENIZER}.",
            "Copy the parent's file, or write it with AutoTokenizer(...).save_pretrained.",
        )
    return SourceError(
        f"{source.name} has {other} but no {TOKENIZER}, and mquant runs no tokenizer's code.",
        f"Put a {TOKENIZER} of the same tokenizer beside it: from another repo of the model, or "
        "written with transformers, by AutoTokenizer.from_pretrained(SRC).save_pretrained(FOLDER).",
    )


def _read(source: Source, name: str, most: int) -> bytes:
    if source.files[name] > most:
        raise SourceError(f"{name} is too large to be valid.", "Get the file again.")
    return source.read(name)


def _table(source: Source, name: str, place: str) -> dict[str, Any]:
    if name not in source.files:
        return {}
    try:
        value = parse_json(_read(source, name, _MOST_CONFIG), most={})
    except ValueError as error:
        raise damaged(name, place, str(error) or "it holds too much") from None
    if not isinstance(value, dict):
        raise damaged(name, place, "it holds no table of keys")
    return value


def _content(token: Any) -> str:
    """Return the text of a token, which is a string or a table with its `content`."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    return {name: _content(config[name]) for name in _NAMED if config.get(name) is not None}


def _added(config: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the tokens that transformers adds to those of tokenizer.json, in its order.

    Source: TokenizersBackend.__init__ and _from_pretrained of transformers 5.17. `exact`: a token
    of the same text with other flags is replaced.
    """
    by_id = config.get("added_tokens_decoder") or {}
    for _, token in sorted((int(number), token) for number, token in by_id.items()):
        yield {"token": _token(token), "exact": True}
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens")) or []
    named = [config[name] for name in _NAMED if config.get(name) is not None]
    others = [
        token
        for name, token in config.items()
        if name.endswith("_token") and name not in _NAMED and isinstance(token, str)
    ]
    for token in (*named, *others, *(extra.values() if isinstance(extra, dict) else extra)):
        yield {"token": {**_token(token), "special": True}, "exact": False}


def _token(token: Any) -> dict[str, Any]:
    if not isinstance(token, dict):
        return {"content": str(token)}
    flags = {name: bool(token[name]) for name in _FLAGS if name in token}
    return {"content": _content(token), **flags}


def _templates(source: Source, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name: those in files, else those in the config."""
    files = {"default": _TEMPLATE} if _TEMPLATE in source.files else {}
    for path in source.files:
        if path.startswith(_TEMPLATES) and path.endswith(".jinja"):
            files[path.removeprefix(_TEMPLATES).removesuffix(".jinja")] = path
    if files:
        return {name: _text(source, path) for name, path in files.items()}
    stated = config.get("chat_template")
    if stated is None:
        return {}
    if isinstance(stated, str):
        return {"default": stated}
    return {str(each["name"]): str(each["template"]) for each in stated}


def _text(source: Source, path: str) -> str:
    try:
        return _read(source, path, _MOST_CONFIG).decode("utf-8")
    except UnicodeDecodeError:
        raise damaged(path, source.name, "it is not UTF-8") from None


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
