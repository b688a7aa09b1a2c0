"""Small MiniMax-M2 checkpoints for tests, with the names and the config.json of the hub."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import EllipsisType
from typing import Any, TypedDict, Unpack, cast

import ml_dtypes
import numpy as np

from mquant.checkpoint import CONFIG_NAME, INDEX_NAME, build_header
from mquant.family import Family
from mquant.family_files import load_families
from mquant.family_rows import Role, TensorRow

Row = tuple[str, str, tuple[int, ...], bytes]
"""name, dtype, shape, data"""

Edit = Callable[[list[Row]], list[Row] | None]
"""A function that changes the rows in place, or returns other rows."""

NUMPY = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
}

# A cut after a tensor with such a name splits a fused set: q|k|v of a layer, w1|w3 of an expert.
_INSIDE_A_SET = (".q_proj.weight", ".k_proj.weight", ".w1.weight", ".w2.weight")


@cache
def minimax_m2() -> Family:
    """Return the family of the checkpoints."""
    return load_families()["minimax_m2"]


class Sizes(TypedDict, total=False):
    """The sizes of a checkpoint; SIZES has the sizes that are left out."""

    layers: int
    experts: int
    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int


SIZES = {
    "layers": 2,
    "experts": 4,
    "hidden": 64,
    "intermediate": 32,
    "vocab": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
}


def make_checkpoint(
    path: Path,
    *,
    dtype: str = "BF16",
    shards: int = 2,
    config: Mapping[str, Any | EllipsisType] | None = None,
    edit: Edit | None = None,
    index: bool = True,
    seed: int = 0,
    **sizes: Unpack[Sizes],
) -> Path:
    """Write a checkpoint and return its folder.

    `config` overrides keys of config.json after the weights' shapes are fixed (`...` removes a
    key). `edit` changes the tensors before the shards are written. Every cut between shards splits
    a fused set. A single shard is `model.safetensors` without an index, as on the hub.
    """
    size = {**SIZES, **cast(dict[str, int], sizes)}
    layers, experts = size["layers"], size["experts"]
    table = make_config(
        num_hidden_layers=layers,
        num_local_experts=experts,
        hidden_size=size["hidden"],
        intermediate_size=size["intermediate"],
        vocab_size=size["vocab"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        head_dim=size["head_dim"],
        rotary_dim=size["head_dim"] // 2,
        num_experts_per_tok=min(2, experts),
        max_position_embeddings=2048,
    )
    random = np.random.default_rng(seed)
    rows = [
        make_row(name, dtype if row.dtype == "BF16" else row.dtype, _shape(row, table), random)
        for row, name in make_names(layers, experts)
    ]
    if edit is not None:
        rows = edit(rows) or rows
    table = {key: value for key, value in {**table, **(config or {})}.items() if value is not ...}
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / CONFIG_NAME, table)
    parts = list(_cut(rows, shards))
    files = (
        ["model.safetensors"]
        if len(parts) == 1
        else [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    )
    for file, part in zip(files, parts, strict=True):
        write_shard(path / file, part)
    if index and len(parts) > 1:
        weight_map = {row[0]: file for file, part in zip(files, parts, strict=True) for row in part}
        total = sum(len(row[3]) for row in rows)
        write_index(path, dict(sorted(weight_map.items())), total)
    return path


def make_larger(path: Path, shards: int) -> Path:
    """Write a checkpoint of 26 MB, with the names and config.json of the small checkpoints."""
    return make_checkpoint(path, layers=2, experts=8, hidden=512, intermediate=512, shards=shards)


def make_config(**overrides: Any) -> dict[str, Any]:
    """Return a config.json as on the hub: the family's real sizes, except for `overrides`."""
    synth = minimax_m2().synth
    table = {**synth.config, **overrides}
    layers = table["num_hidden_layers"]
    return {**table, **{key: [value] * layers for key, value in synth.per_layer.items()}}


def make_names(layers: int, experts: int) -> Iterator[tuple[TensorRow, str]]:
    """Yield the family's row and the name of every tensor, in the order of the hub's files."""
    rows = minimax_m2().tensors
    inner = [row for row in rows if "{layer}" in row.name]
    first = rows.index(inner[0])
    for row in rows[:first]:
        yield row, row.name
    for layer in range(layers):
        for row in inner:
            if row.role is not Role.EXPERT:
                yield row, row.format(layer, None)
        for expert in range(experts):
            for row in inner:
                if row.role is Role.EXPERT:
                    yield row, row.format(layer, expert)
    for row in rows[first + len(inner) :]:
        yield row, row.name


def make_row(
    name: str, dtype: str, shape: tuple[int, ...], random: np.random.Generator | int = 0
) -> Row:
    """Return a tensor of small random values."""
    values = np.random.default_rng(random).standard_normal(shape, np.float32)
    scale = 0.05 if NUMPY[dtype].kind not in "iu" else 16
    return name, dtype, shape, (values * scale).astype(NUMPY[dtype]).tobytes()


def renamed(rows: list[Row], old: str, new: str) -> list[Row]:
    """Return the rows with `old` replaced in every name."""
    return [(name.replace(old, new), *rest) for name, *rest in rows]  # type: ignore[misc]


def without(*parts: str) -> Edit:
    """Return an `edit` that drops every tensor whose name contains one of `parts`."""
    return lambda rows: [row for row in rows if not any(part in row[0] for part in parts)]


def adding(*names: str, dtype: str = "BF16", shape: tuple[int, ...] = (16, 16)) -> Edit:
    """Return an `edit` that adds tensors."""
    return lambda rows: [*rows, *(make_row(name, dtype, shape) for name in names)]


def write_shard(path: Path, rows: list[Row]) -> None:
    """Write a .safetensors file."""
    first, places = build_header([(name, dtype, shape) for name, dtype, shape, _ in rows])
    data = {name: data for name, _, _, data in rows}
    ordered = sorted((row[0] for row in rows), key=lambda name: (places[name], len(data[name])))
    path.write_bytes(first + b"".join(data[name] for name in ordered))


def write_index(path: Path, where: Mapping[str, str], total: int = 0) -> None:
    """Write a checkpoint's index."""
    write_json(path / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(where)})


def write_json(path: Path, value: object) -> None:
    """Write JSON in the format of the hub's files."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _shape(row: TensorRow, config: Mapping[str, Any]) -> tuple[int, ...]:
    shape = minimax_m2().shape(row, config)
    assert shape is not None
    return shape


def _cut(rows: list[Row], count: int) -> Iterator[list[Row]]:
    start = 0
    for number in range(1, count):
        end = max(start, number * len(rows) // count)
        while end < len(rows) and not rows[end - 1][0].endswith(_INSIDE_A_SET):
            end += 1
        yield rows[start:end]
        start = end
    yield rows[start:]
