"""Judge the data: scales must be usable, and numbers must be finite.

Data is read in pieces: memory stays at a few times PIECE for every checkpoint.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from mquant.checkpoint import TensorInfo
from mquant.events import Emit, Progress, silent
from mquant.family import FusedSet
from mquant.family_rows import Role
from mquant.findings import Rule, rule
from mquant.loader_model.modules import FP8_DTYPES, Module, ModuleView
from mquant.loader_model.storage import (
    E8M0S,
    GROUP,
    INPUT_SCALES,
    NVFP4S,
    SCALES,
    SECOND_SCALES,
    StorageFormat,
    format_of,
    integer_bits,
)
from mquant.verify.after_loading import KV_SCALES
from mquant.verify.expert_inputs import check_input_scales
from mquant.verify.tally import Tally
from mquant.weights.decode import Floats, floats
from mquant.weights.stored_weight import read, weight_of

T = TypeVar("T")

PIECE: Final = 16_000_000
_AHEAD: Final = 100
_TYPICAL: Final = 100  # no model's median weight is as large; under a reciprocal, most are
_ELEMENTS: Final = 1_000_000  # of a weight are decoded to find its median
THREADS: Final = 2
# dtype -> its unsigned integer type, and the exponent mask: all ones is infinity or NaN.
_NOT_FINITE: Final = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),  # the only code, with either sign, that is NaN
}
_AGAIN: Final = "Quantize again; if the finding stays, check the weight in the parent."

VALUE_NOT_FINITE: Final = rule(
    "value-not-finite",
    "Weights that are not quantized, and FP8 codes, hold neither NaN nor infinity.",
    "One NaN spreads through the whole model; loaders do not check.",
    "Take the tensor from the parent, or from the original release if the parent's is the same.",
    needs="numbers",
)
SCALE_NOT_FINITE: Final = rule(
    "scale-not-finite",
    "Scales of blocks, channels and tensors are finite numbers (in E4M3: not 7f or ff; in E8M0: "
    "not ff).",
    "One such scale makes NaN of a whole block, and then of the model's output.",
    _AGAIN,
    needs="numbers",
    knowing=("layout",),
)
SCALE_NEGATIVE: Final = rule(
    "scale-negative",
    "Scales of blocks, channels and tensors are not negative.",
    "Kernels that read the sign bit as part of the number compute wrong values.",
    _AGAIN,
    needs="numbers",
    knowing=("layout",),
)
SCALE_ZERO: Final = rule(
    "scale-zero",
    "A scale is zero only if all codes under it are zero.",
    "The whole block loads as zero.",
    _AGAIN,
    needs="numbers",
    knowing=("layout",),
)
PACKED_SHAPE_DIFFERS: Final = rule(
    "packed-shape-differs",
    "weight_shape of packed integers is the shape that weight_packed unpacks to.",
    "compressed-tensors unpacks by weight_shape: columns are lost, or unpacking stops.",
    "Quantize again, with a tool that writes the whole module.",
    needs="numbers",
    knowing=("layout",),
)
GLOBAL_SCALE_INVALID: Final = rule(
    "global-scale-invalid",
    "Global scales and activation scales, and their reciprocals, are finite and positive in F32.",
    "vLLM loads such a scale without an error, and computes with the scale or its reciprocal: the "
    "module's output is then infinity or NaN.",
    _AGAIN,
    needs="numbers",
    knowing=("layout",),
)
KV_SCALE_INVALID: Final = rule(
    "kv-scale-invalid",
    "Scales of a KV cache are finite and positive.",
    "vLLM loads the scale and stops afterwards, or serves NaN.",
    "Calibrate the scales again, or remove them and kv_cache_scheme.",
    needs="numbers",
)
GLOBAL_SCALE_DIFFERS: Final = rule(
    "global-scale-differs",
    "The members of a fused set (q, k, v; w1, w3) have the same global scale, bit for bit.",
    "Loaders apply one member's scale to all: vLLM only warns, SGLang stops.",
    "Quantize the members together, with a tool that knows the fused set.",
    needs="numbers",
    knowing=("family", "layout"),
)
GLOBAL_SCALE_INVERTED: Final = rule(
    "global-scale-inverted",
    "compressed-tensors' weight_global_scale is a divisor: one below 1 belongs to a weight with "
    "outliers, whose median is still below 100.",
    "ModelOpt's weight_scale_2 is the reciprocal; if a tool stores weight_scale_2 under the other "
    "name, weights are off by the scale's square.",
    "Store 1 / weight_scale_2 as weight_global_scale.",
    severity="warning",
    needs="numbers",
    knowing=("layout",),
)
GLOBAL_SCALES_RECIPROCAL: Final = rule(
    "global-scales-reciprocal",
    "If every weight_global_scale of compressed-tensors is below 1, most weights have a median "
    "below 100.",
    "Outliers make scales small, but not medians large: a tool stored ModelOpt's weight_scale_2 "
    "under the other name. Loaders use the scales as stored, and weights are off by the scales' "
    "square.",
    "Store 1 / weight_scale_2 as weight_global_scale.",
    needs="numbers",
    knowing=("layout",),
)


@dataclass
class _Result:
    """The result of one task: broken rules, and the name and bytes of the module's global scale.

    `input_scale` is the name and value of the scale of an FP8 module's input. `divisor` is the name
    and value of the module's weight_global_scale, if there is one; `inverted` says whether the
    value looks like a divisor's reciprocal.
    """

    module: Module | None = None
    breaks: list[tuple[Rule, str, str]] = field(default_factory=list)
    global_scale: tuple[str, bytes] | None = None
    input_scale: tuple[str, float] | None = None
    divisor: tuple[str, float] | None = None
    inverted: bool = False

    def add(self, broken: Rule, info: TensorInfo, message: str) -> None:
        self.breaks.append((broken, info.name, f"{info.name} {message}"))


def check_numbers(view: ModuleView, emit: Emit = silent) -> Tally:
    """Read the data and judge scales and numbers. Raises SourceError if data cannot be read."""
    units = list(_tasks(view))
    total = sum(size for size, _ in units)
    done = reported = 0
    tally = Tally()
    scales: dict[FusedSet, list[tuple[str, bytes]]] = defaultdict(list)
    inputs: dict[FusedSet, dict[str, float]] = defaultdict(dict)
    divisors: dict[str, float] = {}
    inverted = 0
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        try:
            for (size, _), result in zip(
                units, in_order(pool, [unit for _, unit in units]), strict=True
            ):
                for broken in result.breaks:
                    tally.add(*broken)
                if result.divisor is not None:
                    divisors[result.divisor[0]] = result.divisor[1]
                    inverted += result.inverted
                tensor_role = result.module.tensor_role if result.module else None
                fused_set = tensor_role.fused_set if tensor_role else None
                if fused_set and result.global_scale:
                    scales[fused_set].append(result.global_scale)
                expert = tensor_role is not None and tensor_role.row.role is Role.EXPERT
                if fused_set and result.input_scale and expert:
                    inputs[fused_set].update([result.input_scale])
                done += size
                if done - reported >= PIECE or done == total:
                    reported = done
                    emit(Progress("verify", done, total))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _fused(scales.values(), tally)
    if view.method == "compressed-tensors":
        check_input_scales(view, inputs.values(), tally)
    largest = max(divisors.values(), default=1.0)
    if len(divisors) > 1 and largest < 1 and inverted * 2 > len(divisors):
        tally.mark(GLOBAL_SCALES_RECIPROCAL, divisors)
        tally.add(
            GLOBAL_SCALES_RECIPROCAL,
            next(iter(divisors)),
            f"All {len(divisors):,} weight_global_scale are below 1, the largest is "
            f"{largest:.3g}: they look like reciprocals",
        )
    return tally


def _tasks(view: ModuleView) -> Iterator[tuple[int, Callable[[], _Result]]]:
    for module in view.modules.values():
        kind = format_of(view, module)
        if kind in (None, StorageFormat.OTHER):
            for info in module.tensors.values():
                yield info.nbytes, partial(_plain, view, info)
        else:
            size = sum(info.nbytes for info in module.tensors.values())
            yield size, partial(_quantized, view, module, kind)


def _plain(view: ModuleView, info: TensorInfo, result: _Result | None = None) -> _Result:
    result = result or _Result()
    if info.name.rpartition(".")[2] in KV_SCALES:
        return _kv_scale(view, info, result)
    if info.dtype not in _NOT_FINITE:
        return result
    kind, exponent = _NOT_FINITE[info.dtype]
    for raw in pieces(view, info):
        bits = np.frombuffer(raw, kind)
        bad = int(np.count_nonzero((bits & bits.dtype.type(exponent)) == exponent))
        if bad:
            result.add(VALUE_NOT_FINITE, info, "holds NaN or infinity")
            break
    return result


def _kv_scale(view: ModuleView, info: TensorInfo, result: _Result) -> _Result:
    if info.dtype in ("F32", "BF16", "F16") and info.elements <= PIECE:
        values = floats(read(view, info), info.dtype)
        if not (np.isfinite(values) & (values > 0)).all():
            worst = float(values[~(np.isfinite(values) & (values > 0))][0])
            result.add(KV_SCALE_INVALID, info, f"is {worst:g}")
    return result


def _quantized(view: ModuleView, module: Module, kind: StorageFormat | None) -> _Result:
    result = _Result(module)
    for suffix, info in module.tensors.items():
        if suffix in SECOND_SCALES | INPUT_SCALES:
            _scalar(view, info, suffix, result)
        elif suffix in SCALES:
            _scales(view, info, kind, result)
        elif info.dtype in FP8_DTYPES or suffix not in ("weight", "weight_packed"):
            _plain(view, info, result)
    if kind in NVFP4S:
        _dead_blocks(view, module, result)
        _inverted(view, module, result)
    if kind is StorageFormat.INT:
        _stated_shape(view, module, result)
    return result


def _stated_shape(view: ModuleView, module: Module, result: _Result) -> None:
    codes, info = module.tensors.get("weight_packed"), module.tensors.get("weight_shape")
    bits = integer_bits(module, view)
    kinds = {"I64": "<i8", "I32": "<i4"}
    if codes is None or info is None or bits is None or len(codes.shape) != 2:
        return
    if info.dtype in kinds and info.elements == 2:
        rows, columns = np.frombuffer(read(view, info), kinds[info.dtype]).tolist()
        if (rows, -(-columns * bits // 32)) != codes.shape:
            packed = list(codes.shape)
            stated = f"is {[rows, columns]}; the codes are {packed}, num_bits is {bits}"
            result.add(PACKED_SHAPE_DIFFERS, info, stated)


def _scalar(view: ModuleView, info: TensorInfo, suffix: str, result: _Result) -> None:
    if info.dtype not in ("F32", "BF16", "F16") or info.elements != 1:
        return  # the rules of structure judge dtypes and shapes
    raw = read(view, info)
    value = float(floats(raw, info.dtype)[0])
    if not np.isfinite(value) or value <= 0:
        result.add(GLOBAL_SCALE_INVALID, info, f"is {value:g}")
    elif not np.isfinite(_reciprocal(value)):
        result.add(GLOBAL_SCALE_INVALID, info, f"is {value:g}, whose reciprocal F32 cannot hold")
    if suffix == "input_scale":
        result.input_scale = (info.name, value)
    if suffix == "weight_global_scale":
        result.divisor = (info.name, value)
    if suffix in SECOND_SCALES:
        result.global_scale = (info.name, raw)


def _reciprocal(value: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.float32(1) / np.float32(value))


def _inverted(view: ModuleView, module: Module, result: _Result) -> None:
    """Judge a global scale below 1 by the numbers that loaders make of the weight."""
    value = result.divisor[1] if result.divisor else 1.0
    weight = weight_of(view, module) if 0 < value < 1 else None
    if weight is None:
        return
    rows, columns = weight.shape
    with np.errstate(all="ignore"):  # numbers beyond float's maximum are infinite
        values = weight.rows(0, min(rows, max(1, _ELEMENTS // columns))).values
        median = float(np.median(np.abs(values)))
    if median > _TYPICAL:
        result.inverted = True
        result.add(
            GLOBAL_SCALE_INVERTED,
            module.tensors["weight_global_scale"],
            f"is {value:.3g}, which looks like a reciprocal: the median weight is {median:.3g}",
        )


def _scales(
    view: ModuleView, info: TensorInfo, kind: StorageFormat | None, result: _Result
) -> None:
    e8m0 = info.dtype in E8M0S and kind not in NVFP4S
    if info.dtype not in ("F8_E4M3", "F32", "BF16", "F16") and not e8m0:
        return
    for raw in pieces(view, info):
        values: Floats = floats(raw, "F8_E8M0" if e8m0 else info.dtype)
        if not np.isfinite(values).all():
            result.add(SCALE_NOT_FINITE, info, "holds NaN or infinity")
        if (values < 0).any():
            result.add(SCALE_NEGATIVE, info, "holds negative scales")
        if info.dtype != "F8_E4M3" and (values == 0).any():
            # Tools write a tiny scale, never zero, for a channel of zeros.
            result.add(SCALE_ZERO, info, "holds scales that are zero")


def _dead_blocks(view: ModuleView, module: Module, result: _Result) -> None:
    codes = module.tensors.get("weight_packed") or module.tensors.get("weight")
    scale = module.tensors.get("weight_scale")
    if codes is None or scale is None or scale.dtype != "F8_E4M3" or codes.dtype != "U8":
        return
    if len(codes.shape) != 2 or scale.shape != (codes.shape[0], codes.shape[1] * 2 // GROUP):
        return
    if codes.shape[1] * 2 % GROUP or not codes.elements:
        return
    per_block = GROUP // 2
    step = PIECE // per_block * per_block
    for start in range(0, codes.nbytes, step):
        end = min(start + step, codes.nbytes)
        # 8 bytes are one block: an integer that, without the sign bits, is compared with zero.
        blocks: npt.NDArray[np.uint64] = np.frombuffer(read(view, codes, start, end), "<u8")
        nonzero = (blocks & np.uint64(0x7777_7777_7777_7777)) != 0
        raw = read(view, scale, start // per_block, end // per_block)
        zero = (np.frombuffer(raw, np.uint8) & 0x7F) == 0
        if (nonzero & zero).any():
            block = start // per_block + int(np.argmax(nonzero & zero))
            row = block // scale.shape[1]
            result.add(SCALE_ZERO, scale, f"is zero over a block that is not zero (row {row:,})")
            return


def _fused(sets: Iterable[list[tuple[str, bytes]]], tally: Tally) -> None:
    for members in sets:
        first, scale = members[0]
        other = next((name for name, raw in members if raw != scale), None)
        if other is not None:
            tally.add(
                GLOBAL_SCALE_DIFFERS,
                other,
                f"{first} and {other} differ, but loaders fuse their modules into one matrix",
            )


def in_order(pool: ThreadPoolExecutor, units: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield the results of tasks in order, a few tasks ahead: `pool.map` would hold all results."""
    waiting: deque[Future[T]] = deque()
    for unit in units:
        waiting.append(pool.submit(unit))
        if len(waiting) > _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def pieces(view: ModuleView, info: TensorInfo) -> Iterator[bytes]:
    """Yield a tensor's data in pieces of whole elements."""
    for start in range(0, info.nbytes, PIECE):
        yield read(view, info, start, min(start + PIECE, info.nbytes))
