"""Weights that a source stores quantized: the tensors of each weight, and its shape in BF16.

`loader_model.storage` recognizes the format. This module takes a weight only if its tensors fit
each other.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from mquant.checkpoint import Checkpoint, TensorInfo
from mquant.findings import Finding, rule
from mquant.loader_model.modules import by_module, method_of, quantized_suffixes
from mquant.loader_model.storage import E4M3S, FP4S, INTEGERS, SUFFIXES, StorageFormat, recognize
from mquant.plan.stored_bytes import INPUT_ZERO, stored_bytes
from mquant.plan.stored_floats import stored_floats
from mquant.plan.stored_integers import ORDER, IntegerGroups, stored_integers
from mquant.plan.stored_parts import PART_MISSING, PART_SHAPE, Stored

__all__ = [
    "PART_MISSING",
    "PART_SHAPE",
    "READABLE",
    "Stored",
    "StoredWeights",
    "find_stored",
]

# Scales of activations and of the KV cache: useless once the weight is dequantized.
_OF_CACHE: Final = (".k_scale", ".v_scale", ".q_scale", ".output_scale")

METHOD_DIFFERS: Final = rule(
    "method-differs",
    "quant_method of config.json is a method whose layout the quantized weights have.",
    "Loaders read the tensors as quant_method says, and the codes may mean something else.",
    "Correct quant_method in config.json, or get the checkpoint again.",
    needs="plan",
)
_METHODS: Final[dict[StorageFormat, tuple[str, ...]]] = {
    StorageFormat.NVFP4: ("compressed-tensors",),
    StorageFormat.MXFP4: ("compressed-tensors",),
    StorageFormat.INT: ("compressed-tensors",),
    StorageFormat.INT8: ("compressed-tensors",),
    StorageFormat.MXFP4_BLOCKS: ("mxfp4",),
}
"""The methods that have a layout of their own. `stored_floats` judges those of FP8."""

READABLE: Final = (*E4M3S, *FP4S, *INTEGERS)
"""The formats that mquant can dequantize."""


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """All stored weights of a checkpoint.

    `weights` maps the name of the codes to the weight that the codes hold (in BF16, at the place of
    the codes) and to how the weight is stored. `others` are the names of all other tensors that
    only a quantized checkpoint has.
    """

    weights: Mapping[str, tuple[TensorInfo, Stored]]
    others: frozenset[str]
    findings: tuple[Finding, ...]


def find_stored(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], formats: Collection[StorageFormat]
) -> StoredWeights | None:
    """Return the weights stored in `formats`; None if there are none, or one in another format.

    `tensors` are those of the checkpoint, with those of each expert instead of stacks.
    """
    method, declared = method_of(checkpoint)
    config: Mapping[str, Any] = {"quant_method": method, **declared}
    weights: dict[str, tuple[TensorInfo, Stored]] = {}
    others: set[str] = set()
    broken: list[Finding] = []
    modules = by_module(tensors)
    integers = IntegerGroups(config, modules.keys())
    for module, parts in modules.items():
        others.update(i.name for i in parts.values() if i.name.endswith(_OF_CACHE))
        storage = recognize(parts, config)
        if storage is None:
            continue
        twice = "weight" in parts and storage in SUFFIXES and SUFFIXES[storage].codes != "weight"
        if storage not in formats or twice:
            return None
        if method not in (*_METHODS.get(storage, (method,)), "", "unknown"):
            broken.append(_method_differs(module, storage, method))
            continue
        if storage is StorageFormat.INT:
            stored = stored_integers(module, parts, integers)
        elif storage is StorageFormat.INT8:
            stored = stored_bytes(module, parts, integers)
        else:
            stored = stored_floats(storage, module, parts, config)
        if stored is None:
            return None
        if isinstance(stored, Finding):
            broken.append(stored)
        else:
            weights[stored.codes.name] = (_in_bf16(f"{module}.weight", stored), stored)
        suffixes = (*quantized_suffixes(parts), ORDER, INPUT_ZERO)
        others.update(info.name for suffix, info in parts.items() if suffix in suffixes)
    if not weights and not broken:
        return None
    return StoredWeights(weights, frozenset(others - weights.keys()), _first(broken))


def _method_differs(module: str, storage: StorageFormat, method: str) -> Finding:
    return METHOD_DIFFERS.finding(
        module,
        f"config.json says quant_method {method[:40]!r}, but {module} is stored as {storage}.",
        "Correct quant_method in config.json, or get the checkpoint again.",
    )


def _in_bf16(name: str, stored: Stored) -> TensorInfo:
    """Return a weight in BF16, at the place of its codes."""
    codes = stored.codes
    held = replace(codes.held, by=_stack_in_bf16(codes.held.by)) if codes.held else None
    return replace(codes, name=name, dtype="BF16", shape=stored.shape, held=held)


@lru_cache(maxsize=8)  # the experts of a layer follow each other, and share one object
def _stack_in_bf16(blocks: TensorInfo) -> TensorInfo:
    """Return the tensor in BF16 that the codes of all experts stand for.

    Of MXFP4 it is [experts, in, rows]; FP8 lies as the weights lie.
    """
    if blocks.dtype != "U8":
        return replace(blocks, dtype="BF16")
    experts, rows, width = blocks.shape
    name = blocks.name.removesuffix("_blocks")
    return replace(blocks, name=name, dtype="BF16", shape=(experts, width * 2, rows))


def _first(broken: list[Finding]) -> tuple[Finding, ...]:
    """Return the first of many findings; its message then counts the others."""
    if len(broken) < 2:
        return tuple(broken)
    more = f" (and {len(broken) - 1:,} more modules like it)."
    return (replace(broken[0], message=broken[0].message.removesuffix(".") + more),)
