"""Calibration data as token ids: the samples that go through a model."""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np

from mquant.checkpoint import CONFIG_NAME, Source, read_json
from mquant.errors import DataFileError
from mquant.events import Emit, Note, silent
from mquant.recipe import Calibration
from mquant.tokens.calibration_data import CalibrationData, find_data
from mquant.tokens.in_child import CHARACTERS, MARGIN
from mquant.tokens.overlap import sketch
from mquant.tokens.rows import FIX, Rows, open_rows, read_text
from mquant.tokens.tokenizer import (
    Integers,
    Row,
    Tokenizer,
    check_ids,
    read_tokenizer,
)

_AT_ONCE: Final = 512
"""The rows that go to the tokenizer at a time."""
_NO_TEXT: Final = ("image", "audio", "video", "input_image", "input_audio")
"""What the type of a part of a message begins with if the part is no text."""
_NESTED: Final = ("text_config", "llm_config")


@dataclass(frozen=True)
class Samples:
    """The samples, each a vector of token ids as int64, and what mquant.json says of them."""

    ids: list[Integers]
    record: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """The number of tokens in all samples."""
        return sum(map(len, self.ids))

    @property
    def note(self) -> Note:
        """What a person is told before the samples are used."""
        return Note("info", f"Calibrating with {len(self.ids):,} samples, {self.tokens:,} tokens.")


def load_samples(
    data: str | CalibrationData, source: Source, spec: Calibration, emit: Emit = silent
) -> Samples:
    """Return at most `spec.samples` samples, each of at most `spec.length` tokens.

    `data` is what `find_data` takes or returns. Rows are drawn in an order that the seed decides;
    `messages` go through the chat template in `source`; a .txt file is one text, cut into samples.

    Raises DataFileError if the data cannot be read or tokenized, has changed since it was found,
    or holds no text; SourceError if the tokenizer or the template cannot be understood, or writes
    tokens that the model does not have; MissingExtra for Parquet without pyarrow.
    """
    found = find_data(data) if isinstance(data, str) else data
    tokenizer = read_tokenizer([source])
    paths = found.paths(emit)
    if found.shown.endswith(".txt"):
        ids = _pieces(read_text(paths[0], found.shown), found.shown, tokenizer, spec)
        templated = False
    else:
        with open_rows(paths, found.shown) as rows:
            ids, templated = _from_rows(rows, found.shown, tokenizer, spec)
    found.check_unchanged()
    if not ids:
        raise DataFileError(f"{found.shown} holds no text.", FIX)
    check_ids(ids, _vocabulary(source))
    record = {
        "data": found.record(),
        "samples": len(ids),
        "length": spec.length,
        "seed": spec.seed,
        "tokens": sum(map(len, ids)),
        "tokens_sha256": _digest(ids),
        "tokenizer_sha256": tokenizer.sha256,
        **({"chat_template_sha256": tokenizer.template_sha256} if templated else {}),
        "sketch": sketch(ids),
    }
    return Samples(ids, record)


def _vocabulary(source: Source) -> int | None:
    """Return the number of tokens that config.json states; None if it states none."""
    if CONFIG_NAME not in source.files:
        return None
    config = read_json(source, CONFIG_NAME)
    for table in (*(config.get(key, {}) for key in _NESTED), config):
        count = table.get("vocab_size") if isinstance(table, dict) else None
        if isinstance(count, int) and count > 0:
            return count
    return None


def _pieces(text: str, shown: str, tokenizer: Tokenizer, spec: Calibration) -> list[Integers]:
    (ids,) = tokenizer.encode([{"text": text}], shown)
    starts = range(0, len(ids), spec.length)
    drawn = islice(_drawn(len(starts), spec), spec.samples)
    return [ids[starts[number] : starts[number] + spec.length] for number in drawn]


def _from_rows(
    rows: Rows, shown: str, tokenizer: Tokenizer, spec: Calibration
) -> tuple[list[Integers], bool]:
    """Return the samples from rows, and whether the chat template wrote any of them."""
    drawn, ids, templated = _drawn(len(rows), spec), list[Integers](), False
    while len(ids) < spec.samples:
        numbers = [*islice(drawn, min(_AT_ONCE, spec.samples - len(ids)))]
        if not numbers:
            break
        read = [_checked(row, shown, spec.length) for row in rows.read(numbers)]
        numbered = [{**row, "number": n + 1} for n, row in zip(numbers, read, strict=True)]
        batch = [row for row in numbered if row.get("text") or row.get("messages")]
        if batch:
            ids += filter(len, tokenizer.encode(batch, shown, spec.length))
            templated |= any("messages" in row for row in batch)
    return ids, templated


def _drawn(count: int, spec: Calibration) -> Iterator[int]:
    """Return the numbers below `count`, in an order that the seed decides."""
    order = list(range(count))
    random.Random(spec.seed).shuffle(order)  # noqa: S311 -- no secret
    return iter(order)


def _checked(row: object, shown: str, length: int) -> Row:
    """Return what the tokenizer needs of a row. Raises DataFileError for a row without text."""
    table = row if isinstance(row, dict) else {}
    text, messages = table.get("text"), table.get("messages")
    if messages is not None:
        _check_messages(messages, shown)
        return {"messages": messages, "tools": _tools(table.get("tools"), shown)}
    if not isinstance(text, str):
        raise DataFileError(f"A row of {shown} has neither `text` nor `messages`.", FIX)
    # One character more than the tokenizer reads says that the text goes on.
    return {"text": text[: CHARACTERS * length + MARGIN + 1]}


def _check_messages(messages: object, shown: str) -> None:
    listed: list[Any] = messages if isinstance(messages, list) else [None]
    if not all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in listed):
        raise DataFileError(
            f"A row of {shown} has neither `text` nor `messages` that are a list of tables with a "
            "`role`.",
            FIX,
        )
    contents = (each.get("content") for each in listed)
    parts = (part for each in contents if isinstance(each, list) for part in each)
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind.startswith(_NO_TEXT):
            raise DataFileError(
                f"A message of {shown} has a part of type {kind!r}; calibration reads text only.",
                "Leave out rows with images, sound or video.",
            )


def _tools(tools: object, shown: str) -> list[Any] | None:
    """Return a row's tools, which may be written as JSON: Parquet has no tables of any keys."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            tools = {}
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataFileError(
            f"A row of {shown} has `tools` that are no list of tables.",
            "Write `tools` as JSON schemas, as the API of OpenAI takes them.",
        )
    return tools


def _digest(ids: Sequence[Integers]) -> str:
    """Return the sha256 of the length and the tokens of each sample, as int64, little-endian."""
    digest = hashlib.sha256()
    for each in ids:
        digest.update(np.int64(len(each)).astype("<i8").tobytes() + each.astype("<i8").tobytes())
    return digest.hexdigest()
