"""Experts that lie in one tensor on disk: the tensors of each expert, and what is wrong with them.

A family's `stacks` say which tensors hold the experts of a layer. Everything else sees a tensor for
each expert, under the name that the tensor has in a checkpoint with a tensor for each expert.

gpt-oss stores a stack in MXFP4 as two tensors: `NAME_blocks`, [experts, rows, groups, 16] bytes of
two codes each, and `NAME_scales`, [experts, rows, groups]. The rows are those of the weights, never
transposed. An expert's `weight` is then its `blocks`, [out, in / 2], and its `scales`, [out, in /
32].

A stack in FP8 keeps its name, and has its scales in a second tensor: `NAME_scale_inv` (FP8 of
transformers), `NAME_scale` (its FBGEMM) or `NAME_weight_scale` (ModelOpt). The tensor has a scale
for each expert, for each row of `out`, or for each block, which lies as the codes lie.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from mquant.checkpoint import Checkpoint, Held, TensorInfo
from mquant.dtypes import BITS
from mquant.errors import SourceError
from mquant.family import Family
from mquant.family_rows import Stack
from mquant.loader_model.declared import declared_config
from mquant.untrusted import MAX_TENSORS

CODED: Final = ("blocks", "scales")
"""The ends of the names of the two tensors that store a stack in MXFP4."""
_BLOCK: Final = 16
_ENDS: Final = {
    "_activation_scale": "activation_scale",
    "_input_scale": "input_scale",
    "_weight_scale": "weight_scale",
    "_scale_inv": "weight_scale_inv",
    "_scale": "weight_scale",
}
"""The end of the name of a tensor of scales -> the suffix of an expert's tensor. Longest first."""

Found = tuple[Stack, int | None]
"""A stack, and its layer."""


def unstacked(checkpoint: Checkpoint, family: Family | None) -> Mapping[str, TensorInfo]:
    """Return the tensors of a checkpoint by name, with those of each expert instead of stacks.

    A stack of another shape than [experts, rows, columns] stays. Raises SourceError if there are
    more tensors than a model can have.
    """
    if family is None or not family.stacks:
        return checkpoint.tensors
    left, in_blocks = (
        MAX_TENSORS,
        bool((declared_config(checkpoint) or {}).get("weight_block_size")),
    )
    tensors: dict[str, TensorInfo] = {}
    for info in checkpoint.tensors.values():
        if scales := _scales(info, checkpoint.tensors, family, in_blocks=in_blocks):
            left -= len(scales)
            tensors |= {scale.name: scale for scale in scales}
            continue
        whole, found = _coded(info, family) or (info, family.stack_of(info.name))
        if found is None or not is_stack(whole, found[0]):
            tensors[info.name] = info
            continue
        stack, layer = found
        left -= info.shape[0] * len(stack.holds)
        if left < 0:
            raise SourceError(
                f"{checkpoint.source.name} has more than {MAX_TENSORS:,} tensors of experts.",
                "Remove the tensors that do not belong to the model.",
            )
        for tensor in _experts(whole, stack, layer):
            if tensor.name not in checkpoint.tensors:
                tensors[tensor.name] = tensor
    return tensors


def _coded(info: TensorInfo, family: Family) -> tuple[TensorInfo, Found] | None:
    """Return blocks or scales as [experts, rows, bytes], with their stack and layer; else None."""
    stem, _, end = info.name.rpartition("_")
    found = family.stack_of(stem) if end in CODED and info.dtype == "U8" else None
    if found is None or len(info.shape) != (4 if end == "blocks" else 3):
        return None
    experts, rows, groups = info.shape[:3]
    if end == "blocks" and info.shape[3] != _BLOCK:
        return None
    stack, layer = found
    holds = tuple(f"{name.removesuffix('.weight')}.{end}" for name in stack.holds)
    stack = stack.model_copy(update={"holds": holds, "transposed": False})
    width = groups * (_BLOCK if end == "blocks" else 1)
    return replace(info, shape=(experts, rows, width)), (stack, layer)


def stack_beside(name: str, family: Family) -> Found | None:
    """Return the stack whose codes or scales a tensor holds, by its name; else None."""
    ends = (f"_{end}" for end in (*CODED, *(end.removeprefix("_") for end in _ENDS)))
    stems = (name.removesuffix(end) for end in ends if name.endswith(end))
    return next(filter(None, map(family.stack_of, stems)), None)


def _scales(
    info: TensorInfo, tensors: Mapping[str, TensorInfo], family: Family, *, in_blocks: bool
) -> list[TensorInfo]:
    """Return the scales of each expert that a tensor beside a stack in FP8 holds; else nothing.

    A lone scale of an expert is [1, 1] if the scales are those of blocks.
    """
    end = next((end for end in _ENDS if info.name.endswith(end)), None)
    codes = tensors.get(info.name.removesuffix(end)) if end else None
    found = family.stack_of(codes.name) if codes else None
    if end is None or codes is None or found is None or not codes.dtype.startswith("F8_E"):
        return []
    stack, layer = found
    count, shape = len(stack.holds), info.shape
    if not is_stack(codes, stack) or len(codes.shape) != 3 or BITS[info.dtype] % 8:
        return []
    holds = tuple(f"{name.removesuffix('.weight')}.{_ENDS[end]}" for name in stack.holds)
    stack = stack.model_copy(update={"holds": holds})
    experts = codes.shape[0]
    if info.elements == 1 or (info.elements == experts == shape[0]):
        alone = (1, 1) if in_blocks and len(shape) == 3 else (1,)
        return list(_of_each(info, stack, layer, experts, alone))
    if len(shape) != 3 or shape[0] != experts or 0 in shape:
        return []
    if stack.transposed and end == "_scale" and shape[1:] == (codes.shape[2], 1):
        stack = stack.model_copy(update={"transposed": False})  # FBGEMM's, for each row of `out`
    across, along = shape[:0:-1] if stack.transposed else shape[1:]
    if across == 1 and count > 1:
        return list(_of_each(info, stack, layer, experts, (1, along)))
    rows = codes.shape[2] if stack.transposed else codes.shape[1]
    if across % count or (stack.interleaved and across != rows):
        return []
    return list(_experts(info, stack, layer))


def _of_each(
    info: TensorInfo, stack: Stack, layer: int | None, experts: int, shape: tuple[int, ...]
) -> Iterator[TensorInfo]:
    """Yield the scales of each expert; all its weights share them."""
    shared = info.elements == 1
    size = info.nbytes if shared else info.nbytes // experts
    for expert in range(experts):
        start = info.start + (0 if shared else expert * size)
        for name in stack.holds:
            own = name.replace("{layer}", str(layer)).replace("{expert}", str(expert))
            held = Held(info, *shape) if len(shape) == 2 else Held(info, 1, 1)
            yield TensorInfo(own, info.dtype, shape, info.shard, start, start + size, held)


def is_stack(info: TensorInfo, stack: Stack) -> bool:
    """Return whether a tensor's shape can be that of a stack: rows of each tensor, or numbers."""
    if len(info.shape) not in (2, 3) or 0 in info.shape or BITS[info.dtype] % 8:
        return False
    across = info.shape[-1] if stack.transposed or len(info.shape) == 2 else info.shape[1]
    return across % len(stack.holds) == 0


def in_two_layouts(tensors: Mapping[str, TensorInfo], family: Family) -> Iterator[tuple[str, str]]:
    """Yield a stack and a tensor of one expert, for each layer that has both."""
    if not family.stacks:
        return
    stacks: dict[int | None, str] = {}
    experts: dict[int | None, str] = {}
    for name in tensors:
        if found := family.stack_of(name):
            stacks.setdefault(found[1], name)
            continue
        role = family.classify(name) or family.classify(f"{name.rpartition('.')[0]}.weight")
        if role and role.row.name in family.stacked_rows:
            experts.setdefault(role.layer, name)
    for layer in stacks.keys() & experts.keys():
        yield stacks[layer], experts[layer]


def _experts(info: TensorInfo, stack: Stack, layer: int | None) -> Iterator[TensorInfo]:
    """Yield the tensors that a stack holds, expert by expert."""
    count, matrix = len(stack.holds), len(info.shape) == 3
    # A vector of each expert is a matrix of one column.
    rows, columns = info.shape[1:] if matrix else (info.shape[1], 1)
    transposed = stack.transposed and matrix
    across, along = (columns, rows) if transposed else (rows, columns)
    size = across // count
    shape = (size, along) if matrix else (size,)
    nbytes = info.nbytes // info.shape[0]
    step = count if stack.interleaved else 1
    if transposed or step > 1:
        firsts = range(count) if step > 1 else range(0, across, size)
        helds = [Held(info, rows, columns, first, step, transposed) for first in firsts]
        lengths = [0] * count
    else:
        helds, lengths = [Held(info, rows, columns)] * count, [nbytes // count] * count
    for expert in range(info.shape[0]):
        start = info.start + expert * nbytes
        for name, held, (number, length) in zip(
            stack.holds, helds, enumerate(lengths), strict=True
        ):
            first = start + number * length
            own = name.replace("{layer}", str(layer)).replace("{expert}", str(expert))
            end = first + (length or nbytes)
            yield TensorInfo(own, info.dtype, shape, info.shard, first, end, held)
