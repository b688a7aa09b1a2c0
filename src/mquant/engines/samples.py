"""Calibration data: texts and conversations, as token ids."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from mquant.errors import DataFileError, MquantError, SourceError
from mquant.recipe import Calibration, data_file
from mquant.text import names
from mquant.untrusted import open_named, parse_json

_FIX: Final = (
    "Give a .jsonl or .parquet file whose rows have `text` or `messages`, a .txt file, or the id "
    "of a dataset on the hub."
)
_TOKENIZER: Final = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_MOST_TEXT: Final = 50_000_000
"""The most bytes of a .txt file: all of it is tokenized, in 20 times its size of memory."""
_MOST_ROWS: Final = 1_000_000_000


def load_samples(data: str, folder: Path, spec: Calibration) -> list[list[int]]:
    """Return the token ids of at most `spec.samples` samples, each at most `spec.length` tokens.

    Rows are drawn in an order that the seed decides. `messages` go through the chat template of
    the tokenizer in `folder`; a .txt file is one text, cut into samples. Raises DataFileError if
    the data cannot be read or tokenized, or holds no text, SourceError if the tokenizer cannot be
    loaded.
    """
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # no warnings of texts longer than the context
    try:
        samples = [*_samples(data, _load_tokenizer(folder), spec)]
    except MquantError:
        raise
    except Exception as error:  # transformers and tokenizers raise anything for a damaged file
        reason = str(error).partition("\n")[0][:200]
        raise DataFileError(f"{data} cannot be tokenized: {reason}", _FIX) from error
    finally:
        transformers_logging.set_verbosity(before)
    if not samples:
        raise DataFileError(f"{data} holds no text.", _FIX)
    return samples


def _load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers names no file, and raises anything
        damaged = [name for name in _TOKENIZER if not _is_table(folder / name)]
        reason = str(error).partition("\n")[0][:200].rstrip(".")
        raise SourceError(
            f"{names(damaged) or 'The tokenizer'} in {folder} cannot be understood: {reason}.",
            "Get the tokenizer's files again.",
        ) from error


def _is_table(path: Path) -> bool:
    """Return whether a file holds a JSON object, or does not exist."""
    try:
        return isinstance(parse_json(path.read_bytes(), most={}), dict)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def _samples(data: str, tokenizer: Any, spec: Calibration) -> Iterator[list[int]]:
    rows = list(_rows(data))
    if data.endswith(".txt"):
        ids = _ids(rows[0], tokenizer, data)
        pieces = [ids[start : start + spec.length] for start in range(0, len(ids), spec.length)]
    else:
        pieces = []
    order = list(range(len(pieces) or len(rows)))
    random.Random(spec.seed).shuffle(order)  # noqa: S311 -- no secret
    taken = 0
    for number in order:
        piece = pieces[number] if pieces else _ids(rows[number], tokenizer, data)[: spec.length]
        if piece and taken < spec.samples:
            taken += 1
            yield piece


def _rows(data: str) -> Iterable[dict[str, Any]]:
    path = data_file(data)
    if path is None:
        return _dataset(data)
    most = _MOST_TEXT if path.suffix == ".txt" else _MOST_ROWS
    with open_named(path, _FIX, most) as file:
        if path.suffix == ".parquet":
            return _table(file, data)
        if path.suffix == ".jsonl":
            return [*_parsed(file, data)]
        try:
            return [{"text": file.read().decode("utf-8")}]
        except UnicodeDecodeError as error:
            raise DataFileError(f"{data} is damaged: {error}.", _FIX) from error


def _table(file: BinaryIO, data: str) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise DataFileError(f"{data} is damaged: {reason}.", _FIX) from error
    return rows


def _parsed(file: BinaryIO, data: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        try:
            row = parse_json(line) if line.strip() else None
        except ValueError:
            raise DataFileError(f"Line {number:,} of {data} is no JSON.", _FIX) from None
        if row is not None:
            yield row


def _dataset(name: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return list(load_dataset(name, split="train"))
    except Exception as error:  # the hub and the dataset's code may raise anything
        reason = str(error).partition("\n")[0][:200].rstrip(".")
        raise DataFileError(
            f"{name} is no file, and cannot be loaded as a dataset from the hub: {reason}.", _FIX
        ) from error


def _ids(row: object, tokenizer: Any, data: str) -> list[int]:
    text = row.get("text") if isinstance(row, dict) else None
    messages = row.get("messages") if isinstance(row, dict) else None
    if messages is not None:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template is a program: it may raise anything
            raise DataFileError(
                f"The chat template cannot format the messages of {data}: {error}.",
                "Correct the messages, or give rows with `text`.",
            ) from error
    if not isinstance(text, str):
        raise DataFileError(f"A row of {data} has neither `text` nor `messages`.", _FIX)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
