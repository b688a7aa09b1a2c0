"""Copies of good checkpoints with one change: everything else is as in the good checkpoint.

bad = mutated(good, tmp_path, edit=without(".w1.weight_scale"))
bad = mutated(good, tmp_path, config={"rotary_dim": ...})
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from judges import data, opened, read_json
from make import Edit, Row, write_index, write_json, write_shard
from mquant.checkpoint import CONFIG_NAME, INDEX_NAME, Folder
from mquant.family_files import load_families
from mquant.findings import RULES, Severity
from mquant.output import RECORD
from mquant.verify.judge import Depth, verify

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def mutated(
    good: Path,
    folder: Path,
    *,
    edit: Edit | None = None,
    config: Mapping[str, Any | EllipsisType] | None = None,
    index: Callable[[dict[str, str]], dict[str, str] | None] | None = None,
    total_size: int | None = None,
) -> Path:
    """Copy a checkpoint to `folder`/bad with changed tensors, config keys or weight_map.

    After an `edit` every shard is written again and the index fits the shards; a new tensor is
    stored in the last shard. `...` removes a config key. `index` and `total_size` change the index
    last, so that the index may not fit the shards. mquant.json lists no files, so that its digests
    do not give the change away.
    """
    bad = forget_digests(Path(shutil.copytree(good, folder / "bad")))
    checkpoint = opened(good)
    weight_map = {name: info.shard for name, info in checkpoint.tensors.items()}
    total = checkpoint.nbytes
    if edit is not None:
        rows: list[Row] = [
            (info.name, info.dtype, info.shape, data(checkpoint, info.name))
            for info in checkpoint.tensors.values()
        ]
        rows = edit(rows) or rows
        last = checkpoint.shards[-1]
        weight_map = {row[0]: weight_map.get(row[0], last) for row in rows}
        total = sum(len(row[3]) for row in rows)
        for shard in checkpoint.shards:
            write_shard(bad / shard, [row for row in rows if weight_map[row[0]] == shard])
    if (bad / INDEX_NAME).exists():
        weight_map = (index(weight_map) or weight_map) if index else weight_map
        write_index(bad, weight_map, total if total_size is None else total_size)
    if config is not None:
        table = {**read_json(bad / CONFIG_NAME), **config}
        write_json(bad / CONFIG_NAME, {k: v for k, v in table.items() if v is not ...})
    return bad


def flip(path: Path) -> None:
    """Change a bit of a file's last byte; size and mtime stay."""
    content, status = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def forget_digests(folder: Path) -> Path:
    """Remove the list of files from mquant.json, if there is one, and return the folder."""
    if (folder / RECORD).exists():
        write_json(folder / RECORD, {**read_json(folder / RECORD), "files": {}})
    return folder


def changed(
    name: str,
    *,
    data: Callable[[Bytes], Bytes | None] | None = None,
    dtype: str = "",
    shape: tuple[int, ...] | None = None,
) -> Edit:
    """Return an `edit` of the tensor `name`: of its bytes, dtype or shape."""

    def edit(rows: list[Row]) -> None:
        (number,) = (n for n, row in enumerate(rows) if row[0] == name)
        _, old_dtype, old_shape, raw = rows[number]
        if data is not None:
            values = np.frombuffer(raw, np.uint8).copy()
            fresh = data(values)
            raw = (values if fresh is None else fresh).tobytes()
        rows[number] = (name, dtype or old_dtype, old_shape if shape is None else shape, raw)

    return edit


def setting(position: int | slice, value: int) -> Callable[[Bytes], None]:
    """Return a function that sets bytes of a tensor to a value."""

    def change(values: Bytes) -> None:
        values[position] = value

    return change


def scalar(value: float) -> Callable[[Bytes], Bytes]:
    """Return a function that replaces a tensor's bytes with one F32."""
    return lambda _: np.frombuffer(np.float32(value).tobytes(), np.uint8)


def judged(
    folder: Path,
    parent: Path | None = None,
    depth: Depth = Depth.STRUCTURE,
    severities: tuple[Severity, ...] = ("error", "warning"),
) -> dict[str, str]:
    """Return rule -> message of the first finding of `verify`, for findings of `severities`."""
    against = None if parent is None else Folder(parent)
    report = verify(Folder(folder), load_families(), depth, against)
    assert {finding.rule for finding in report.findings} <= RULES.keys()
    for finding in report.findings:
        assert finding.where
        assert finding.severity in RULES[finding.rule].severities
        assert finding.message.endswith(".")
        assert finding.fix
    messages: dict[str, str] = {}
    for finding in report.findings:
        if finding.severity in severities:
            messages.setdefault(finding.rule, finding.message)
    return messages


__all__ = ["changed", "judged", "mutated", "scalar", "setting"]
