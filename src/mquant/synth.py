"""Synthetic checkpoints with a family's hub names: any size, reproducible, random weights.

There are two kinds. With weights: tiny by default, written tensor by tensor in bounded memory.
Shapes only: names, headers, index and file sizes are the real model's, and the data are holes that
take no disk space.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np

from mquant.checkpoint import CONFIG_NAME, INDEX_NAME, build_header
from mquant.errors import DataFileError, UsageError
from mquant.events import Emit, Note, Progress, silent
from mquant.family import Family
from mquant.family_rows import Role, TensorRow
from mquant.loader_model.vllm.predict import VERSION, predict_of
from mquant.loader_model.vllm.tensors import Loaded
from mquant.loader_model.vllm.words import in_words
from mquant.output.disk import open_own, out_of_space, write_whole
from mquant.output.staging import staging
from mquant.plan import DEFAULT_SHARD_BYTES, cut_shards
from mquant.synth_formats import (
    FP8_BLOCK,
    SCALES_OF_STACKS,
    STACKED,
    STD,
    Precision,
    SynthTensor,
    check_groups,
    in_blocks,
    is_quantized,
    stored_weight,
    value_table,
)
from mquant.synth_quantization import quantization
from mquant.synth_side_files import side_files
from mquant.synth_tower import tower_tensors

__all__ = [
    "Precision",
    "Sizes",
    "SynthTensor",
    "Synthetic",
    "make_config",
    "make_tensors",
    "synth",
]

_CHUNK: Final = 1 << 20  # elements computed at once: a few MB for a tensor of any size
_NORM: Final = (1.0, 0.05)
# The safetensors dtype of weights that are not quantized, and its name in config.json.
_DTYPES: Final = {
    Precision.FP16: ("F16", "float16"),
    Precision.FP32: ("F32", "float32"),
}
_BF16: Final = ("BF16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The dimensions that replace the family's; None keeps a dimension."""

    layers: int | None = None
    experts: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    vocab: int | None = None


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A written synthetic checkpoint. `parameters` counts elements, scales included."""

    path: Path
    tensors: int
    parameters: int
    nbytes: int
    shards: int


def synth(
    out: Path,
    family: Family,
    *,
    sizes: Sizes | None = None,
    precision: Precision = Precision.BF16,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    seed: int = 0,
    shapes_only: bool = False,
    emit: Emit = silent,
) -> Synthetic:
    """Write a synthetic checkpoint of `family` into `out`, which must be empty or not exist.

    The dimensions are the family's tiny ones, or with `shapes_only` its real ones, changed by
    `sizes`. If vLLM does not load FP8 blocks with `sizes`, a warning says why. The same arguments
    give the same bytes. Files appear in `out` when all files are complete, config.json last. A
    failure leaves `out` unchanged. Raises UsageError for dimensions that the family lacks,
    OutputError if `out` cannot be written.
    """
    sizes = sizes or Sizes()
    config = make_config(family, sizes, precision, tiny=not shapes_only)
    tensors = list(make_tensors(family, config, precision))
    if precision is Precision.FP8_BLOCK and sizes != Sizes():
        _warn_if_refused(family, config, tensors, emit)
    shards = cut_shards(tensors, lambda tensor: tensor.nbytes, max_shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors)
    side = side_files(family.value(family.config.vocabulary, config) or 0)
    names = (*shards, *side, INDEX_NAME, CONFIG_NAME)
    with staging(out, 0 if shapes_only else total, names) as folder:
        done = 0
        for name, shard in shards.items():
            for written in _write_shard(folder / name, shard, seed, shapes_only=shapes_only):
                done += written
                emit(Progress("synth", done, total))
        for name, content in side.items():
            _write_json(folder / name, content)
        _write_json(folder / INDEX_NAME, _index(shards, total))
        _write_json(folder / CONFIG_NAME, config)
    return Synthetic(
        out, len(tensors), sum(_elements(tensor.shape) for tensor in tensors), total, len(shards)
    )


def _warn_if_refused(
    family: Family, config: Mapping[str, Any], tensors: list[SynthTensor], emit: Emit
) -> None:
    """Emit a warning if vLLM does not load a checkpoint: its sizes may cut a block."""
    loaded = (Loaded(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
    outcome = predict_of(config, family, loaded)
    if not (outcome.loads or outcome.unknown):
        emit(Note("warning", f"vLLM {VERSION} {in_words(outcome, 'this checkpoint')[1]}."))


def make_config(
    family: Family, sizes: Sizes, precision: Precision, *, tiny: bool
) -> dict[str, Any]:
    """Return the config.json of `synth`. Raises UsageError for sizes that the family lacks."""
    tiny_changes = dict(family.synth.tiny) if tiny else {}
    if tiny and precision in (Precision.FP8_BLOCK, Precision.FP8_STACKS, Precision.MXFP4_FP8):
        tiny_changes |= family.synth.tiny_in_blocks
    config = family.with_settings(family.synth.config, tiny_changes)
    changes: dict[str, Any] = {}
    for option, key, value in (
        ("--layers", family.config.layers, sizes.layers),
        ("--experts", family.config.experts, sizes.experts),
        ("--hidden", family.config.hidden, sizes.hidden),
        ("--intermediate", family.config.intermediate, sizes.intermediate),
        ("--vocab", family.config.vocabulary, sizes.vocab),
    ):
        if value is None:
            continue
        if not key:
            raise UsageError(f"{family.title} has no experts.", f"Leave {option} out.")
        if value < 1:
            raise UsageError(f"{option} is {value}; it must be 1 or more.", f"Correct {option}.")
        changes[key] = value
    config = family.with_settings(config, changes)
    experts, top_k = (
        family.value(key, config) if key else None
        for key in (family.config.experts, family.config.top_k)
    )
    if experts and top_k and top_k > experts:
        config = family.with_settings(config, {family.config.top_k: experts})
    layers = family.value(family.config.layers, config) or 0
    config = family.with_settings(config, _kinds(family.settings(config), layers))
    per_layer = {key: [value] * layers for key, value in family.synth.per_layer.items()}
    config = family.with_settings(config, per_layer)
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = _DTYPES.get(precision, _BF16)[1]
    declared = quantization(precision, family, config, layers)
    if declared and family.nested and declared["quant_method"] == "compressed-tensors":
        config = family.with_settings(config, {"quantization_config": declared})
    elif declared:
        config["quantization_config"] = declared
    return dict(sorted(config.items()))


def _kinds(settings: Mapping[str, Any], layers: int) -> dict[str, list[Any]]:
    """Return the lists of the layers' types, as many as there are layers: repeated, or cut."""
    lists = {
        key: value
        for key, value in settings.items()
        if key.endswith("layer_types") and isinstance(value, list) and value
    }
    return {key: (value * layers)[:layers] for key, value in lists.items()}


def make_tensors(
    family: Family, config: Mapping[str, Any], precision: Precision
) -> Iterator[SynthTensor]:
    """Yield every tensor of a synthetic checkpoint, in the order of real releases.

    Tensors that hold all experts of a layer are written instead of tensors for each expert.
    """
    family = family.named_for(config)
    yield from _outside(family, config, precision)
    experts = family.value(family.config.experts, config) or 0 if family.config.experts else 0
    tensors = _each(family, config, precision, experts)
    stacked = family.stacks and precision in STACKED
    yield from _stacked(family, tensors, experts, precision) if stacked else tensors


def _outside(
    family: Family, config: Mapping[str, Any], precision: Precision
) -> Iterator[SynthTensor]:
    """Yield the tensors of a larger model outside the text model, which no release quantizes."""
    for tensor in tower_tensors(family, config):
        dtype = "F32" if tensor.dtype == "F32" else _DTYPES.get(precision, _BF16)[0]
        mean, std = _NORM if tensor.norm else (0.0, STD)
        yield SynthTensor(tensor.name, dtype, tensor.shape, mean, std)


def _each(
    family: Family, config: Mapping[str, Any], precision: Precision, experts: int
) -> Iterator[SynthTensor]:
    """Yield every tensor, with tensors for each expert."""
    layers = (family.value(family.config.layers, config) or 0) + family.mtp_layers(config)
    for per_layer, rows in groupby(family.tensors, key=lambda row: "{layer}" in row.name):
        group = [row for row in rows if not family.may_lack(row, config)]
        for layer in range(layers) if per_layer else (None,):
            present = [r for r in group if family.has_block(r.block, layer, config) is not False]
            for per_expert, inner in groupby(present, key=lambda row: "{expert}" in row.name):
                members = list(inner)
                for expert in range(experts) if per_expert else (None,):
                    for row in members:
                        name = row.format(layer, expert)
                        shape = family.shape(row, config, layer)
                        yield from _tensor(family, row, name, shape, precision)


def _stacked(
    family: Family, tensors: Iterable[SynthTensor], experts: int, precision: Precision
) -> Iterator[SynthTensor]:
    """Yield the tensors; of those that one tensor on disk holds, yield that tensor once."""
    holders = {name: stack for stack in family.stacks for name in stack.holds}
    height: dict[str, int] = {}  # of the codes of a stack, by the name of each of its tensors
    for tensor in tensors:
        own = tensor.name.removesuffix(SCALES_OF_STACKS)
        end = tensor.name.removeprefix(own)
        role = family.classify(own) if holders else None
        stack = holders.get(role.row.name) if role else None
        if role is None or stack is None:
            yield tensor
            continue
        name = stack.name.replace("{layer}", str(role.layer)) + end
        if name in height:
            continue
        rows, *columns = tensor.shape
        height[name] = rows * len(stack.holds)
        if precision is Precision.MXFP4_BLOCKS and columns:
            check_groups(name, columns[0])
            yield from in_blocks(tensor, name, experts, height[name])
            continue
        if end:  # a block may hold rows of two weights
            height[name] = -(-height[name.removesuffix(end)] // FP8_BLOCK)
        part = (height[name], *columns)
        shape = part[::-1] if stack.transposed else part
        yield replace(tensor, name=name, shape=(experts, *shape))


def _tensor(
    family: Family, row: TensorRow, name: str, shape: tuple[int, ...] | None, precision: Precision
) -> Iterator[SynthTensor]:
    if shape is None or min(shape) < 1:
        raise DataFileError(
            f"{family.name}.yaml: synth.config does not give the shape of {row.name}.",
            f"Add {' and '.join(row.shape) or 'a shape'} to the family file.",
        )
    mean, std = _NORM if row.role is Role.NORM else (0.0, STD)
    quantized = name.endswith(".weight") and is_quantized(precision, family, row)
    coded = precision is Precision.FP8_STACKS or precision not in STACKED
    if coded and quantized and len(shape) == 2 and row.dtype != "F32":
        module = name.removesuffix(".weight")
        yield from stored_weight(precision, family, row, module, (shape[0], shape[1]))
        return
    if row.dtype == "I64":
        yield SynthTensor(name, row.dtype, shape, 0.0, 0.0, "zeros")
        return
    dtype = "F32" if row.dtype == "F32" else _DTYPES.get(precision, _BF16)[0]
    yield SynthTensor(name, dtype, shape, mean, std)


def _write_shard(
    path: Path, tensors: list[SynthTensor], seed: int, *, shapes_only: bool
) -> Iterator[int]:
    """Write one shard; yield the number of bytes of each write."""
    header, offsets = build_header([(t.name, t.dtype, t.shape) for t in tensors])
    size = sum(tensor.nbytes for tensor in tensors)
    # Not `write_whole`: a file with holes has no pieces. `staging` renames the file.
    with (
        out_of_space(path, len(header) + size),
        os.fdopen(open_own(path, os.O_TRUNC), "wb") as file,
    ):
        file.write(header)
        if shapes_only:
            file.truncate(len(header) + size)
            yield size
        else:
            for tensor in sorted(tensors, key=lambda tensor: offsets[tensor.name]):
                for chunk in _values(tensor, seed):
                    yield file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _values(tensor: SynthTensor, seed: int) -> Iterator[memoryview]:
    """Yield a tensor's data in chunks. A chunk is valid until the next one is requested.

    The data depend only on the seed and the tensor's name. 16 random bits choose one of 65,536
    quantiles: several times faster than exact normals, and no coarser than 16-bit floats.
    """
    digest = hashlib.sha256(f"{seed}\0{tensor.name}".encode()).digest()
    random = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
    table = value_table(tensor.dtype, tensor.mean, tensor.std, tensor.kind)
    if tensor.kind == "shape":
        yield table.data.cast("B")
        return
    left = tensor.nbytes // table.itemsize
    values = np.empty(min(left, _CHUNK), table.dtype)
    while left:
        values = values[:left]
        words = random.integers(0, 2**64, -(-len(values) // 4), dtype=np.uint64)
        indexes = words.astype("<u8", copy=False).view("<u2")[: len(values)]
        # No index is out of bounds; "clip" only spares `take` a copy.
        np.take(table, indexes, out=values, mode="clip")
        yield values.data.cast("B")
        left -= len(values)


def _index(shards: Mapping[str, list[SynthTensor]], total: int) -> dict[str, Any]:
    table = {tensor.name: shard for shard, tensors in shards.items() for tensor in tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    raw = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    with out_of_space(path, len(raw)):
        write_whole(path, [raw])


def _elements(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
