"""Compare a checkpoint with its parent: only rounding may change weights."""

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import numpy as np

from mquant.checkpoint import TensorInfo
from mquant.checkpoint.hub import HubRepo
from mquant.events import Emit, Progress, silent
from mquant.family_rows import Role
from mquant.findings import Finding, Rule, rule
from mquant.loader_model.modules import Module, ModuleView
from mquant.loader_model.storage import format_of
from mquant.output import as_table, known_table
from mquant.verify.after_loading import KV_SCALES
from mquant.verify.against_parent_files import check_config, check_side_files
from mquant.verify.awq import Scaling, scaled
from mquant.verify.kept_as_stored import Pairs, differing, stored_alike
from mquant.verify.numbers import PIECE, THREADS, in_order
from mquant.verify.tally import Tally
from mquant.weights.decode import Floats
from mquant.weights.stored_weight import TYPICAL, StoredWeight, decodable, read, weight_of

SAMPLED_ROWS: Final = 64
_MAX: Final = np.finfo(np.float32).max
_SAMPLED_BYTES: Final = 64 * 1024

PARENT_TENSOR_MISSING: Final = rule(
    "parent-tensor-missing",
    "The checkpoint has every tensor of the parent, plain or quantized.",
    "A missing tensor stays uninitialised: vLLM does not check quantized models.",
    "Quantize again, or copy the tensors from the parent.",
    needs="against",
)
PARENT_LACKS_TENSOR: Final = rule(
    "parent-lacks-tensor",
    "Every tensor belongs to a tensor of the parent.",
    "The parent is another model, or loaders drop the tensor.",
    "Give the parent that the checkpoint was made from, or remove the tensor.",
    needs="against",
)
KEPT_TENSOR_DIFFERS: Final = rule(
    "kept-tensor-differs",
    "Every tensor that is not quantized anew is bit-identical to the parent's, dtype included.",
    "A router cast from F32 to BF16 sends tokens to other experts. Codes that the parent has too "
    "are the parent's bytes, and no rounding changes bytes.",
    "Copy the tensor from the parent.",
    needs="against",
)
WEIGHT_BEYOND_BOUND: Final = rule(
    "weight-beyond-bound",
    "Dequantized weights are as close to the parent's as rounding allows: in NVFP4, within "
    "amax/3 * 17/16 of each block.",
    "Swapped nibbles, rows, experts or scales load without an error.",
    "Quantize again. Weights that other tools change on purpose (AWQ, SmoothQuant) "
    "cannot be compared with the parent's.",
    needs="against",
    knowing=("layout",),
)
WEIGHT_ERROR_HIGH: Final = rule(
    "weight-error-high",
    "Rounding explains the relative error of each whole weight (NVFP4: about 0.1).",
    "The scales are badly chosen, or belong to another weight.",
    "Quantize again, and compare the tools.",
    severity="warning",
    needs="against",
    knowing=("layout",),
)
WEIGHT_NOT_COMPARED: Final = rule(
    "weight-not-compared",
    "mquant can dequantize the layout of the quantized weights.",
    "Weights in other layouts were not compared with the parent's.",
    "Compare the weights with the tool that wrote them; mquant compares NVFP4, ModelOpt, FP8 "
    "and symmetric integers of 4 and 8 bits.",
    severity="warning",
    needs="against",
)
SCALED_NOT_COMPARED: Final = rule(
    "scaled-not-compared",
    "Weights that AWQ scaled by factors which no norm shows (norms, w3 and w2) have the "
    "parent's shape.",
    "AWQ divides a norm by the factors of all weights that read the norm, routers too: the norm "
    "shows these factors, and the weights are compared. Other factors are unknown.",
    "Nothing to do: `mquant eval --against` measures the effect on a text.",
    severity="info",
    needs="against",
)

Break = tuple[Rule, str, str]
WorkUnit = tuple[int, Callable[[], list[Break]]]


def check_against(
    view: ModuleView, parent: ModuleView, *, everything: bool, emit: Emit = silent
) -> tuple[Finding, ...]:
    """Compare a checkpoint with its parent: tensors as `compare_tensors`, config and side files."""
    tally = compare_tensors(view, parent, everything=everything, emit=emit)
    config, reference = view.checkpoint.config, parent.checkpoint.config
    return (*tally.findings(), *check_config(config, reference), *check_side_files(view, parent))


def compare_tensors(
    view: ModuleView, parent: ModuleView, *, everything: bool, emit: Emit = silent
) -> Tally:
    """Compare the tensors of a checkpoint with its parent's.

    Without `everything`, quantized weights are sampled: modules outside of layers, modules except
    experts in the first and last layer, and one expert in each layer, with 64 rows of each module;
    the sample is the same in every run. Other tensors are compared whole; in hub repos large
    tensors are sampled too. If mquant.json says that weights were not rounded to nearest (GPTQ
    corrects each column's error in the next), a weight's error is judged as a whole and not number
    by number. If it says that AWQ scaled weights, such a weight is compared only if a norm shows
    the factors of its columns. Raises SourceError if data cannot be read.
    """
    tally = Tally()
    recipe = as_table(known_table(view.checkpoint.source).get("recipe"))
    to_nearest = recipe.get("rounding") != "gptq"
    scaling = Scaling(view, parent) if recipe.get("smoothing") == "awq" else None
    units = list(_tasks(view, parent, everything, to_nearest, scaling, tally))
    done, total = 0, sum(size for size, _ in units)
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        try:
            results = in_order(pool, [unit for _, unit in units])
            for (size, _), breaks in zip(units, results, strict=True):
                for broken in breaks:
                    tally.add(*broken)
                done += size
                emit(Progress("compare", done, total))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return tally


def _tasks(
    view: ModuleView,
    parent: ModuleView,
    everything: bool,
    to_nearest: bool,
    scaling: Scaling | None,
    tally: Tally,
) -> Iterator[WorkUnit]:
    local = not any(isinstance(side.checkpoint.source, HubRepo) for side in (view, parent))
    for name in sorted(view.modules.keys() - parent.modules.keys()):
        if view.modules[name].tensors.keys() <= KV_SCALES:
            continue  # quantization adds them: no parent has them
        tally.add(PARENT_LACKS_TENSOR, name, f"The parent has no {name}")
    layers = [
        m.tensor_role.layer for m in view.modules.values() if m.tensor_role and m.tensor_role.layer
    ]
    last = max(layers, default=0)
    for name, origin in parent.modules.items():
        module = view.modules.get(name)
        if module is None:
            missing = next(iter(origin.tensors.values())).name
            tally.add(PARENT_TENSOR_MISSING, missing, f"{missing} of the parent is missing")
        elif scaling and origin in scaling:
            if not module.quantized:
                deque(_kept(view, parent, module, origin, False, tally), maxlen=0)  # dtype, shape
            if (factors := scaling.factors(origin)) is None:
                message = f"{name} was scaled by AWQ: not compared"
                tally.add(SCALED_NOT_COMPARED, name, message)
            elif everything or _in_sample(module, last, parent):
                yield from _rounded(view, parent, module, origin, everything, to_nearest, factors)
        elif format_of(view, module) is None and format_of(parent, origin) is None:
            yield from _kept(view, parent, module, origin, everything or local, tally)
        elif foreign := _undecodable(view, module) or _undecodable(parent, origin):
            message = f"{name} was not compared: mquant cannot dequantize {foreign}"
            tally.add(WEIGHT_NOT_COMPARED, name, message)
        elif pairs := stored_alike(view, module, parent, origin):
            if everything or local or _in_sample(module, last, parent):
                yield _as_stored(view, parent, module, origin, pairs, everything or local)
        elif everything or _in_sample(module, last, parent):
            yield from _rounded(view, parent, module, origin, everything, to_nearest)


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
    family = parent.family
    experts = family.value(family.config.experts, parent.checkpoint.config) if family else None
    count = experts if experts and experts > 0 else 1
    return tensor_role.expert == zlib.crc32(str(tensor_role.layer).encode()) % count


def _kept(
    view: ModuleView, parent: ModuleView, module: Module, origin: Module, whole: bool, tally: Tally
) -> Iterator[WorkUnit]:
    for suffix, original in origin.tensors.items():
        info = module.tensors.get(suffix)
        if info is None:
            tally.add(
                PARENT_TENSOR_MISSING, original.name, f"{original.name} of the parent is missing"
            )
        elif (info.dtype, info.shape) != (original.dtype, original.shape):
            tally.add(
                KEPT_TENSOR_DIFFERS,
                info.name,
                f"{info.name} is {info.dtype} {list(info.shape)}; the parent's is "
                f"{original.dtype} {list(original.shape)}",
            )
        else:
            spans = list(_spans(info.nbytes, whole))
            size = sum(end - start for start, end in spans)
            yield size, partial(_equal, view, parent, info, original, spans)
    for suffix in module.tensors.keys() - origin.tensors.keys() - KV_SCALES:
        name = f"{module.name}.{suffix}"
        tally.add(PARENT_LACKS_TENSOR, name, f"The parent has no {name}")


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
                (KEPT_TENSOR_DIFFERS, info.name, f"{info.name} is not bit-equal to the parent's")
            ]
    return []


def _as_stored(
    view: ModuleView, parent: ModuleView, module: Module, origin: Module, pairs: Pairs, whole: bool
) -> WorkUnit:
    """Return the unit that compares the bytes of a weight that the parent stores alike.

    If most codes differ, the weight was quantized anew in the same layout: it is then compared as a
    rounded weight, all of it.
    """
    spans = {info.name: list(_spans(info.nbytes, whole)) for info, _ in pairs}

    def unit() -> list[Break]:
        info, most = differing(view, parent, pairs, spans)
        if info is None:
            return []
        if most:
            message = f"{info.name} is stored as in the parent, but is not equal to the parent's"
            return [(KEPT_TENSOR_DIFFERS, info.name, message)]
        anew = _rounded(view, parent, module, origin, everything=True, to_nearest=True)
        return [broken for _, compare in anew for broken in compare()]

    return sum(end - start for each in spans.values() for start, end in each), unit


def _rounded(
    view: ModuleView,
    parent: ModuleView,
    module: Module,
    origin: Module,
    everything: bool,
    to_nearest: bool,
    factors: Floats | None = None,
) -> Iterator[WorkUnit]:
    weight, original = weight_of(view, module), weight_of(parent, origin)
    if weight is None or original is None:
        return
    if factors is not None:
        original = scaled(original, factors)
    if weight.shape != original.shape:
        message = f"{module.name} is {list(weight.shape)}; the parent's is {list(original.shape)}"
        yield 0, lambda: [(WEIGHT_BEYOND_BOUND, module.name, message)]
        return
    rows, columns = weight.shape
    if columns > PIECE:  # no model has such a row, and memory could not hold the row
        message = f"{module.name} was not compared: its rows have {columns:,} elements"
        yield 0, lambda: [(WEIGHT_NOT_COMPARED, module.name, message)]
        return
    first, last = 0, rows
    if not everything and rows > SAMPLED_ROWS:
        # Adjacent rows cost one read; the tensor's name seeds the position.
        first = zlib.crc32(module.name.encode()) % (rows - SAMPLED_ROWS + 1)
        last = first + SAMPLED_ROWS
    yield (last - first) * columns, partial(_compare, weight, original, first, last, to_nearest)


def _compare(
    weight: StoredWeight, original: StoredWeight, first: int, last: int, to_nearest: bool
) -> list[Break]:
    with np.errstate(all="ignore"):  # broken scales overflow: then the weights are out of bounds
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
        rows, reference = weight.rows(start, end), original.rows(start, end).values
        # Rounding up from float32's maximum is infinity, no further than other rounding up.
        distance = np.abs(np.clip(rows.values, -_MAX, _MAX) - reference)
        allowed = rows.allowed(reference)
        # Negated, so that NaN on either side is out of bounds.
        beyond = ~(distance <= (allowed if to_nearest else np.float32(np.inf)))
        if beyond.any():
            row, column = np.unravel_index(int(np.argmax(beyond)), beyond.shape)
            pair = f"{rows.values[row, column]:.4g} for the parent's {reference[row, column]:.4g}"
            where = f"row {start + row:,}, column {column:,}"
            return [
                (
                    WEIGHT_BEYOND_BOUND,
                    name,
                    f"{name} is further from the parent than {kind} explains: {pair} ({where})",
                )
            ]
        error += float(np.sum(np.square(distance, dtype=np.float64)))
        power += float(np.sum(np.square(reference, dtype=np.float64)))
    relative = (error / power) ** 0.5 if power else 0.0
    if relative > TYPICAL[weight.format]:
        message = f"{name} has a relative error of {relative:.2f}; {kind} stays below "
        broken = WEIGHT_ERROR_HIGH if to_nearest else WEIGHT_BEYOND_BOUND
        return [(broken, name, f"{message}{TYPICAL[weight.format]}")]
    return []
