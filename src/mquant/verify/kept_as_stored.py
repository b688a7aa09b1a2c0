"""Quantized weights that a checkpoint stores as its parent stores them: bytes, not roundings."""

from typing import Final

import numpy as np
import numpy.typing as npt

from mquant.checkpoint import TensorInfo
from mquant.loader_model.modules import Module, ModuleView
from mquant.loader_model.storage import E8M0S, SUFFIXES, StorageFormat, format_of, weight_shape
from mquant.weights.decode import Floats, floats
from mquant.weights.stored_weight import read, scale_dtype

Pairs = list[tuple[TensorInfo, TensorInfo]]
Equal = npt.NDArray[np.bool_]
_OF_INTEGERS: Final = ("weight_zero_point", "weight_g_idx", "weight_shape")
_BYTES: Final = ("U8", "I8")
_MOST: Final = 0.5
"""The share of equal codes above which codes are the parent's: of others, one in 256 is equal."""


def stored_alike(
    view: ModuleView, module: Module, parent: ModuleView, origin: Module
) -> Pairs | None:
    """Return the tensors of a quantized module, each with the parent's tensor; the codes first.

    None if the parent stores the weight in another way: then its codes are not the parent's. The
    names of a layout may differ, and scales in F32 may stand for powers of two in E8M0.
    """
    kind, parent_kind = format_of(view, module), format_of(parent, origin)
    if kind is None or parent_kind is None or kind.short != parent_kind.short:
        return None
    own, theirs = _parts(module, kind), _parts(origin, parent_kind)
    shapes = weight_shape(kind, module, view), weight_shape(parent_kind, origin, parent)
    if own.keys() != theirs.keys() or "codes" not in own or shapes[0] != shapes[1]:
        return None
    pairs = [(info, theirs[part]) for part, info in own.items()]
    return pairs if all(_alike(*pair) for pair in pairs) else None


def differing(
    view: ModuleView, parent: ModuleView, pairs: Pairs, spans: dict[str, list[tuple[int, int]]]
) -> tuple[TensorInfo | None, bool]:
    """Return the first tensor that differs from the parent's, and whether most codes are equal.

    `spans` has the bytes of each tensor to compare. Raises SourceError if data cannot be read.
    """
    first, most = None, True
    for number, (info, original) in enumerate(pairs):
        equal = total = 0
        for start, end in spans[info.name]:
            same = _equal(view, parent, info, original, (start, end))
            equal, total = equal + int(np.count_nonzero(same)), total + same.size
        if equal < total:
            first = first or info
        if number == 0:
            most = equal > total * _MOST
    return first, most


def _equal(
    view: ModuleView,
    parent: ModuleView,
    info: TensorInfo,
    original: TensorInfo,
    span: tuple[int, int],
) -> Equal:
    """Return which bytes are equal; which numbers, if the dtypes of scales differ."""
    start, end = span
    if info.dtype == original.dtype or {info.dtype, original.dtype} <= {*_BYTES, *E8M0S}:
        own, theirs = read(view, info, start, end), read(parent, original, start, end)
        return np.equal(np.frombuffer(own, np.uint8), np.frombuffer(theirs, np.uint8))
    width = info.nbytes // original.nbytes  # F32 for E8M0
    mine = _scales(read(view, info, start, end), info)
    reference = _scales(read(parent, original, start // width, end // width), original)
    return np.equal(mine, reference)


def _scales(raw: bytes, info: TensorInfo) -> Floats:
    return floats(raw, scale_dtype(info))


def _parts(module: Module, kind: StorageFormat) -> dict[str, TensorInfo]:
    """Return the tensors of a module that define its weight, by what they are; the codes first."""
    suffixes = SUFFIXES.get(kind)
    if suffixes is None:
        return {}
    named = {"codes": suffixes.codes, "scale": suffixes.scale, "second": suffixes.second}
    named |= {each: each for each in _OF_INTEGERS}
    return {part: module.tensors[s] for part, s in named.items() if s in module.tensors}


def _alike(info: TensorInfo, original: TensorInfo) -> bool:
    """Return whether two tensors hold the same if their bytes, or the scales, are equal."""
    if info.shape != original.shape:
        return False
    dtypes = {info.dtype, original.dtype}
    if len(dtypes) == 1 or dtypes <= {*_BYTES, *E8M0S}:
        return True
    return info.dtype == "F32" and original.dtype in E8M0S
