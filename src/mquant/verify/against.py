"""What the parent tells: whether only the quantized weights changed, and no more than they may."""

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from typing import Any, Final

import numpy as np

import mquant.verify.against_rules  # noqa: F401 -- registers the rules
from mquant.checkpoint import Source, TensorInfo, has_chat_template
from mquant.checkpoint.hub import HubRepo
from mquant.events import Emit, Progress, silent
from mquant.family import Role
from mquant.findings import Finding
from mquant.loader_model.formats import format_of
from mquant.loader_model.modules import Module, ModuleView
from mquant.text import names
from mquant.verify.awq import Scaling, scaled
from mquant.verify.numbers import PIECE, THREADS, in_order
from mquant.verify.rules import finding
from mquant.verify.tally import Tally
from mquant.weights.decode import Floats
from mquant.weights.stored_weight import TYPICAL, StoredWeight, decodable, read, weight_of

SAMPLED_ROWS: Final = 64
_SAMPLED_BYTES: Final = 64 * 1024
# What every writer stamps, and what newer writers rename: no loader decides by them.
_STAMPS: Final = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")
_NEEDED: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "tiktoken.model",
    "chat_template*",
    "generation_config.json",
    "*.py",
)
_LICENCE: Final = ("LICENSE*", "LICENCE*", "NOTICE*")

Break = tuple[str, str, str]
WorkUnit = tuple[int, Callable[[], list[Break]]]


def check_against(
    view: ModuleView,
    parent: ModuleView,
    *,
    everything: bool,
    to_nearest: bool = True,
    smoothed: bool = False,
    emit: Emit = silent,
) -> tuple[Finding, ...]:
    """Compare a checkpoint with the one it was made from.

    Unless `everything` is wanted, quantized weights are sampled: all but experts in the first and
    last layer, one expert in each layer, and 64 rows of each; the same ones every time. What is
    not quantized is compared whole, but for hub repos, where large tensors are sampled too.
    Unless weights were rounded `to_nearest` (GPTQ makes up for each column's error in the next),
    they are held against the parent's as a whole, not one by one. What AWQ `smoothed` is compared
    where a norm tells how columns were scaled.
    Raises SourceError where data cannot be read.
    """
    tally = Tally()
    scaling = Scaling(view, parent) if smoothed else None
    units = list(_jobs(view, parent, everything, to_nearest, scaling, tally))
    done, total = 0, sum(size for size, _ in units)
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        try:
            results = in_order(pool, [unit for _, unit in units])
            for (size, _), breaks in zip(units, results, strict=True):
                for found in breaks:
                    tally.add(*found)
                done += size
                emit(Progress("compare", done, total))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    config, theirs = view.checkpoint.config, parent.checkpoint.config
    return (*tally.findings(), *_config(config, theirs), *_side_files(view, parent))


def _jobs(
    view: ModuleView,
    parent: ModuleView,
    everything: bool,
    to_nearest: bool,
    scaling: Scaling | None,
    tally: Tally,
) -> Iterator[WorkUnit]:
    local = not any(isinstance(each.checkpoint.source, HubRepo) for each in (view, parent))
    for name in sorted(view.modules.keys() - parent.modules.keys()):
        tally.add("parent-lacks-tensor", name, f"The parent has no {name}")
    layers = [
        m.tensor_role.layer for m in view.modules.values() if m.tensor_role and m.tensor_role.layer
    ]
    last = max(layers, default=0)
    for name, theirs in parent.modules.items():
        mine = view.modules.get(name)
        if mine is None:
            lost = next(iter(theirs.tensors.values())).name
            tally.add("parent-tensor-missing", lost, f"{lost} of the parent is missing")
        elif scaling and theirs in scaling:
            if not mine.quantized:
                deque(_kept(view, parent, mine, theirs, False, tally), maxlen=0)  # dtype, shape
            if (factors := scaling.factors(theirs)) is None:
                message = f"{name} was scaled by AWQ: not compared"
                tally.add("scaled-not-compared", name, message)
            elif everything or _in_sample(mine, last, parent):
                yield from _rounded(view, parent, mine, theirs, everything, to_nearest, factors)
        elif format_of(view, mine) is None and format_of(parent, theirs) is None:
            yield from _kept(view, parent, mine, theirs, everything or local, tally)
        elif foreign := _undecodable(view, mine) or _undecodable(parent, theirs):
            message = f"{name} was not compared: {foreign} cannot be dequantized here"
            tally.add("weight-not-compared", name, message)
        elif everything or _in_sample(mine, last, parent):
            yield from _rounded(view, parent, mine, theirs, everything, to_nearest)


def _undecodable(view: ModuleView, module: Module) -> str:
    kind = format_of(view, module)
    if kind is None or decodable(kind, module, view):
        return ""
    parts = ", ".join(f"{suffix} {module.tensors[suffix].dtype}" for suffix in module.quantized)
    return f"its layout ({parts})"


def _in_sample(module: Module, last: int, parent: ModuleView) -> bool:
    tensor_role = module.tensor_role
    if tensor_role is None or tensor_role.layer is None:
        return True
    if tensor_role.row.role is not Role.EXPERT:
        return tensor_role.layer in (0, last)
    experts = parent.checkpoint.config.get(parent.family.config.experts) if parent.family else None
    count = experts if type(experts) is int and experts > 0 else 1
    return tensor_role.expert == zlib.crc32(str(tensor_role.layer).encode()) % count


def _kept(
    view: ModuleView, parent: ModuleView, mine: Module, theirs: Module, whole: bool, tally: Tally
) -> Iterator[WorkUnit]:
    for suffix, original in theirs.tensors.items():
        info = mine.tensors.get(suffix)
        if info is None:
            tally.add(
                "parent-tensor-missing", original.name, f"{original.name} of the parent is missing"
            )
        elif (info.dtype, info.shape) != (original.dtype, original.shape):
            tally.add(
                "kept-tensor-differs",
                info.name,
                f"{info.name} is {info.dtype} {list(info.shape)}; the parent's is "
                f"{original.dtype} {list(original.shape)}",
            )
        else:
            spans = list(_spans(info.nbytes, whole))
            size = sum(end - start for start, end in spans)
            yield size, partial(_equal, view, parent, info, original, spans)
    for suffix in mine.tensors.keys() - theirs.tensors.keys():
        tally.add(
            "parent-lacks-tensor",
            f"{mine.name}.{suffix}",
            f"The parent has no {mine.name}.{suffix}",
        )


def _spans(size: int, whole: bool) -> Iterator[tuple[int, int]]:
    if whole or size <= 16 * _SAMPLED_BYTES:
        for start in range(0, size, PIECE):
            yield start, min(start + PIECE, size)
    else:
        for number in range(4):
            start = number * (size - _SAMPLED_BYTES) // 3
            yield start, start + _SAMPLED_BYTES


def _equal(
    view: ModuleView,
    parent: ModuleView,
    info: TensorInfo,
    original: TensorInfo,
    spans: list[tuple[int, int]],
) -> list[Break]:
    for start, end in spans:
        if read(view, info, start, end) != read(parent, original, start, end):
            return [
                ("kept-tensor-differs", info.name, f"{info.name} is not bit-equal to the parent's")
            ]
    return []


def _rounded(
    view: ModuleView,
    parent: ModuleView,
    mine: Module,
    theirs: Module,
    everything: bool,
    to_nearest: bool,
    factors: Floats | None = None,
) -> Iterator[WorkUnit]:
    weight, original = weight_of(view, mine), weight_of(parent, theirs)
    if weight is None or original is None:
        return
    if factors is not None:
        original = scaled(original, factors)
    if weight.shape != original.shape:
        message = f"{mine.name} is {list(weight.shape)}; the parent's is {list(original.shape)}"
        yield 0, lambda: [("weight-beyond-bound", mine.name, message)]
        return
    rows, columns = weight.shape
    if columns > PIECE:  # no model has such a row, and it could not be held
        message = f"{mine.name} was not compared: its rows have {columns:,} elements"
        yield 0, lambda: [("weight-not-compared", mine.name, message)]
        return
    first, last = 0, rows
    if not everything and rows > SAMPLED_ROWS:
        # Neighbours, since they are one read; where, is drawn from the name.
        first = zlib.crc32(mine.name.encode()) % (rows - SAMPLED_ROWS + 1)
        last = first + SAMPLED_ROWS
    yield (last - first) * columns, partial(_compare, weight, original, first, last, to_nearest)


def _compare(
    weight: StoredWeight, original: StoredWeight, first: int, last: int, to_nearest: bool
) -> list[Break]:
    with np.errstate(all="ignore"):  # broken scales overflow, and are out of bounds then
        return _differences(weight, original, first, last, to_nearest)


def _differences(
    weight: StoredWeight, original: StoredWeight, first: int, last: int, to_nearest: bool
) -> list[Break]:
    columns = weight.shape[1]
    step = max(1, PIECE // 4 // columns)
    error = power = 0.0
    name = weight.module.name
    storage = weight.format or original.format
    kind = storage.short if storage else "scaling"
    for start in range(first, last, step):
        end = min(start + step, last)
        mine, theirs = weight.rows(start, end), original.rows(start, end).values
        off = np.abs(mine.values - theirs)
        allowed = mine.allowed(theirs)
        # Written so that NaN on either side is out of bounds, too.
        beyond = ~(off <= (allowed if to_nearest else np.float32(np.inf)))
        if beyond.any():
            row, column = np.unravel_index(int(np.argmax(beyond)), beyond.shape)
            said = f"{mine.values[row, column]:.4g} for the parent's {theirs[row, column]:.4g}"
            where = f"row {start + row:,}, column {column:,}"
            return [
                (
                    "weight-beyond-bound",
                    name,
                    f"{name} is further from the parent than {kind} explains: {said} ({where})",
                )
            ]
        error += float(np.sum(np.square(off, dtype=np.float64)))
        power += float(np.sum(np.square(theirs, dtype=np.float64)))
    relative = (error / power) ** 0.5 if power else 0.0
    if relative > TYPICAL[weight.format]:
        message = f"{name} has a relative error of {relative:.2f}; {kind} stays below "
        rule = "weight-error-high" if to_nearest else "weight-beyond-bound"
        return [(rule, name, f"{message}{TYPICAL[weight.format]}")]
    return []


def _config(config: Mapping[str, Any], parent: Mapping[str, Any]) -> Iterator[Finding]:
    keys = [key for key in parent if key not in (*_STAMPS, "quantization_config")]
    lost = [key for key in keys if key not in config]
    changed = [key for key in keys if key in config and config[key] != parent[key]]
    if lost:
        yield finding("config-key-lost", "config.json", f"config.json lost {names(lost)}.")
    if changed:
        yield finding(
            "config-key-differs",
            "config.json",
            f"config.json differs from the parent's in {names(changed)}.",
        )


def _side_files(view: ModuleView, parent: ModuleView) -> Iterator[Finding]:
    mine, theirs = view.checkpoint.source, parent.checkpoint.source
    needed = [path for path in theirs.files if _like(path, _NEEDED)]
    missing = [path for path in needed if path not in mine.files]
    if has_chat_template(mine):  # newer tools keep it in a file of its own, older ones did not
        missing = [path for path in missing if not path.startswith("chat_template")]
    if missing:
        yield finding(
            "side-file-missing", missing[0], f"The parent's {names(missing)} did not come along."
        )
    changed = [path for path in needed if path in mine.files and not _same(mine, theirs, path)]
    if changed:
        yield finding(
            "side-file-differs", changed[0], f"Other than in the parent: {names(changed)}."
        )
    licence = [path for path in theirs.files if _like(path, _LICENCE)]
    if licence and not any(_like(path, _LICENCE) for path in mine.files):
        yield finding(
            "licence-missing", licence[0], f"The parent's {names(licence)} did not come along."
        )


def _like(path: str, patterns: tuple[str, ...]) -> bool:
    return "/" not in path and any(fnmatch(path, pattern) for pattern in patterns)


def _same(mine: Source, theirs: Source, path: str) -> bool:
    size = mine.files[path]
    spans = ((start, min(start + PIECE, size)) for start in range(0, size, PIECE))
    return size == theirs.files[path] and all(
        mine.read(path, *span) == theirs.read(path, *span) for span in spans
    )


__all__ = ["SAMPLED_ROWS", "check_against"]
