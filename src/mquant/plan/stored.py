"""Weights that a source stores quantized: the tensors of each weight, and its shape in BF16.

`loader_model.storage` recognizes the format. This module takes a weight only if its tensors fit
each other.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from mquant.checkpoint import Checkpoint, TensorInfo
from mquant.findings import Finding, Rule, rule
from mquant.loader_model.modules import FP8_DTYPES, by_module, declared_config, quantized_suffixes
from mquant.loader_model.storage import (
    E4M3S,
    E8M0S,
    FP4S,
    GROUP,
    MX_GROUP,
    MXFP4S,
    NVFP4S,
    SCALAR,
    SUFFIXES,
    StorageFormat,
    block_of,
    groups,
    recognize,
    says_nvfp4,
)

# llmcompressor writes F16 scales for models in F16; nobody writes them as weight_scale_inv.
_SCALES: Final = {
    StorageFormat.FP8: ("F32", "BF16", "F16"),
    StorageFormat.FP8_BLOCK: ("F32", "BF16"),
}
_CODES: Final = {
    **dict.fromkeys(FP4S, ("U8",)),
    StorageFormat.MXFP4_SCALE: ("I8", "U8"),
    **dict.fromkeys(E4M3S, ("F8_E4M3",)),
}
# Scales of activations and of the KV cache: useless once the weight is dequantized.
_OF_CACHE: Final = (".k_scale", ".v_scale", ".q_scale", ".output_scale")

READABLE: Final = (StorageFormat.FP8_BLOCK, StorageFormat.FP8, *NVFP4S, *MXFP4S)
"""The formats that mquant can dequantize."""
PART_MISSING: Final = rule(
    "part-missing",
    "A quantized module has its codes and all its scales.",
    "vLLM turns its missing-weight check off for quantized models: missing weights stay "
    "uninitialised, and the model generates nonsense.",
    "Quantize again, with a tool that writes the whole module.",
    knowing=("layout",),
    if_loads="warning",
)
PART_SHAPE: Final = rule(
    "part-shape",
    "Codes and scales of a module fit each other.",
    "vLLM copies the part of an expert's scales that fits, without an error.",
    "Quantize again, with a tool that writes the whole module.",
    knowing=("layout",),
    if_loads="nothing",
)


@dataclass(frozen=True, slots=True)
class Stored:
    """How the source stores one quantized weight.

    `codes` and `scale` are [out, ...] also where one tensor on disk holds those of all experts.
    `block` are the rows and columns that share an element of `scale`. `second` is the scale of the
    whole weight, or None; `input` is the scale of the activations, or None.
    """

    format: StorageFormat
    codes: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]
    second: TensorInfo | None = None
    input: TensorInfo | None = None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensors that are read besides the codes: the scales of the weight."""
        return (self.scale, self.second) if self.second else (self.scale,)

    @property
    def whole(self) -> "Stored":
        """How the tensors on disk that hold the weights of all experts store these weights.

        Codes and scales are [experts, rows, ...]; the experts' weights are in BF16 [experts, in,
        rows], as transformers' `convert_moe_packed_tensors` makes them.
        """
        codes, scale = self.codes.held, self.scale.held
        if codes is None or scale is None:
            raise TypeError(f"{self.codes.name} is a tensor of its own")
        return Stored(self.format, codes.by, scale.by, self.block)

    def under(self, prefix: str) -> "Stored":
        """Return the same weight, with `prefix` before the names of its files."""

        def moved(info: TensorInfo) -> TensorInfo:
            return replace(info, shard=prefix + info.shard)

        return replace(
            self,
            codes=moved(self.codes),
            scale=moved(self.scale),
            second=moved(self.second) if self.second else None,
            input=moved(self.input) if self.input else None,
        )


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
    config = declared_config(checkpoint) or {}
    weights: dict[str, tuple[TensorInfo, Stored]] = {}
    others: set[str] = set()
    broken: list[Finding] = []
    for module, parts in by_module(tensors).items():
        others.update(i.name for i in parts.values() if i.name.endswith(_OF_CACHE))
        storage = recognize(parts, config)
        if storage is None:
            continue
        if storage not in formats or not _readable(storage, parts, config):
            return None
        stored = _stored(storage, module, parts, config)
        if isinstance(stored, Finding):
            broken.append(stored)
        else:
            weights[stored.codes.name] = (_in_bf16(f"{module}.weight", stored), stored)
        others.update(parts[suffix].name for suffix in quantized_suffixes(parts))
    if not weights and not broken:
        return None
    return StoredWeights(weights, frozenset(others - weights.keys()), _first(broken))


def _in_bf16(name: str, stored: Stored) -> TensorInfo:
    """Return a weight in BF16, at the place of its codes."""
    codes = stored.codes
    shape = (codes.shape[0], codes.shape[1] * (2 if stored.format in FP4S else 1))
    held = replace(codes.held, by=_stack_in_bf16(codes.held.by)) if codes.held else None
    return replace(codes, name=name, dtype="BF16", shape=shape, held=held)


@lru_cache(maxsize=8)  # the experts of a layer follow each other, and share one object
def _stack_in_bf16(blocks: TensorInfo) -> TensorInfo:
    """Return the tensor in BF16 [experts, in, rows] that the codes of all experts stand for."""
    experts, rows, width = blocks.shape
    name = blocks.name.removesuffix("_blocks")
    return replace(blocks, name=name, dtype="BF16", shape=(experts, width * 2, rows))


def _first(broken: list[Finding]) -> tuple[Finding, ...]:
    """Return the first of many findings; its message then counts the others."""
    if len(broken) < 2:
        return tuple(broken)
    more = f" (and {len(broken) - 1:,} more modules like it)."
    return (replace(broken[0], message=broken[0].message.removesuffix(".") + more),)


def _readable(
    storage: StorageFormat, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> bool:
    """Return whether tensors and config.json define a module's weight for certain.

    This check is stricter than `verify`, which must report on any module: config.json has to
    declare what the tensors leave open, and a module with other quantized tensors (zero points, an
    order of the columns) is not readable, because these tensors change what codes mean.
    """
    match storage:
        case StorageFormat.FP8_BLOCK:
            block = block_of(config.get("weight_block_size"))
            certain = config.get("quant_method") == "fp8" and block is not None
        case StorageFormat.FP8:
            codes = "weight" in tensors and tensors["weight"].dtype in FP8_DTYPES
            certain = codes and config.get("quant_method") == "compressed-tensors"
        case StorageFormat.NVFP4:
            certain = says_nvfp4(tensors, config)
        case _:
            certain = True
    return certain and {*quantized_suffixes(tensors)} <= {*SUFFIXES[storage], "weight"}


def _stored(
    storage: StorageFormat,
    module: str,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
) -> Stored | Finding:
    """Return how a module's weight is stored, or a finding if its parts do not fit each other."""
    suffix, scale_suffix, second_suffix, input_suffix = SUFFIXES[storage]
    for needed in filter(None, (suffix, scale_suffix, second_suffix)):
        if needed not in tensors:
            present = ", ".join(sorted(tensors))
            return _broken(module, PART_MISSING, f"{module} has no {needed} beside {present}")
    codes, scale, second = tensors[suffix], tensors[scale_suffix], tensors.get(second_suffix)
    dtypes = _CODES[storage]
    if codes.dtype not in dtypes or len(codes.shape) != 2 or 0 in codes.shape:
        return _misfit(codes, f"{' or '.join(dtypes)} with two dimensions")
    if storage in MXFP4S:
        expected = (codes.shape[0], codes.shape[1] * 2 // MX_GROUP)
        if codes.shape[1] * 2 % MX_GROUP or scale.dtype not in E8M0S or scale.shape != expected:
            fit = f"{' or '.join(E8M0S)} {list(expected)} for codes {list(codes.shape)}"
            return _misfit(scale, fit)
        block = (1, MX_GROUP)
    elif storage in NVFP4S:
        expected = (codes.shape[0], codes.shape[1] * 2 // GROUP)
        if codes.shape[1] * 2 % GROUP or (scale.dtype, scale.shape) != ("F8_E4M3", expected):
            return _misfit(scale, f"F8_E4M3 {list(expected)} for codes {list(codes.shape)}")
        for scalar in filter(None, (second, tensors.get(input_suffix))):
            if scalar.dtype != "F32" or scalar.shape not in SCALAR:
                return _misfit(scalar, "F32 [1]")
        block = (1, GROUP)
    else:
        fp8 = _fp8_block(storage, codes, scale, config)
        if fp8 is None:
            kinds = " or ".join(_SCALES[storage])
            return _misfit(scale, f"{kinds}, one for each block of {list(codes.shape)}")
        block = fp8
    return Stored(storage, codes, scale, block, second, tensors.get(input_suffix))


def _fp8_block(
    storage: StorageFormat, codes: TensorInfo, scale: TensorInfo, config: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Return the block of FP8 codes that shares a scale; None if no block fits the scales."""
    rows, columns = codes.shape
    if scale.dtype not in _SCALES[storage]:
        return None
    if storage is StorageFormat.FP8:
        by_shape = {(1,): (rows, columns), (): (rows, columns), (rows, 1): (1, columns)}
        if scale.shape in by_shape:
            return by_shape[scale.shape]
        weight_args = [group.get("weights") for group in groups(config)]
        blocks = [
            block_of(args.get("block_structure")) for args in weight_args if isinstance(args, dict)
        ]
    else:
        blocks = [block_of(config.get("weight_block_size"))]
    for block in filter(None, blocks):
        if scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
            return block
    return None


def _misfit(info: TensorInfo, expected: str) -> Finding:
    module = info.name.rpartition(".")[0]
    sentence = f"{info.name} is {info.dtype} {list(info.shape)}, but must be {expected}"
    return _broken(module, PART_SHAPE, sentence)


def _broken(module: str, rule: Rule, sentence: str) -> Finding:
    return rule.finding(module, f"{sentence}.", "Get the checkpoint again.")
