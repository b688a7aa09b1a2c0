"""The scales of a fused set's weights, and the tensors that codes and scales become on disk.

| scheme | codes | scales | a number is |
| --- | --- | --- | --- |
| NVFP4A16, NVFP4 | E2M1 | E4M3 for 16 columns, F32 for the set | code * (scale / set's scale) |
| FP8_DYNAMIC | E4M3 | own dtype, for a row | code * scale |
| FP8_BLOCK | E4M3 | own dtype, for 128 x 128 | code * scale |
| integers in groups | 4 or 8 bits | own dtype, for a row's group of columns | code * scale |

Min-max scales are llmcompressor's, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np

from mquant.compiled import compiled
from mquant.numerics.floats import E4M3, F32, Array, Bytes, FloatFormat, Floats
from mquant.numerics.fp8 import EPSILON, scales_of
from mquant.numerics.hessian import Curvature
from mquant.numerics.hessian_search import factored, search_codes
from mquant.numerics.kernels import block_maxima
from mquant.numerics.nvfp4 import GROUP, block_scales, global_scale
from mquant.numerics.scale_search import ALIKE, SearchedWeight, sampled_scale, search
from mquant.numerics.sweeps import E2M1_GRID, E4M3_GRID, Grid, integers, nearest
from mquant.schemes import Scheme

F8: Final = np.dtype(ml_dtypes.float8_e4m3fn)
MINMAX: Final[Floats] = np.ones(1, np.float32)
RATIOS: Final[Floats] = np.append(MINMAX, np.arange(20, 45, dtype=np.float32) / 40)
"""The scales of integers that are tried, over the min-max scale, which wins a tie."""
_LANES: Final = 16  # sums of an error side by side: the order of additions is fixed


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """The scales of a weight [out, in].

    `divisors`, float32 [out, groups]: what the codes of a row's `width` columns are multiplied by.
    `tensors`: the tensors of the scales, by suffix.
    """

    divisors: Floats
    width: int
    tensors: dict[str, Array]

    def values(self, points: Floats) -> Floats:
        """Return grid points, float32 [out, in], times their divisors, in place."""
        _multiply(points, self.divisors, self.width)
        return points


def grid_of(scheme: Scheme) -> Grid:
    """Return the numbers that the codes of a scheme can mean."""
    kind, bits = _kind(scheme)
    if kind == "int":
        return integers(bits)
    return E2M1_GRID if bits == 4 else E4M3_GRID


def scaled(
    weights: Sequence[Floats],
    scheme: Scheme,
    own: FloatFormat,
    scales: str,
    curved: Curvature | None,
) -> list[Scaled]:
    """Return the scales of a fused set's weights, float32 [out, in] each, of the dtype `own`.

    `scales`: "minmax"; "search", for the smallest squared error of the weights; or "hessian", for
    the smallest error of the outputs if rounding goes by `curved`, as far as a block of 16 columns
    (NVFP4) or a column (integers) tells it. FP8 gains nothing from a search: always "minmax".
    """
    kind, bits = _kind(scheme)
    curved = curved if scales == "hessian" else None
    if (kind, bits) == ("float", 4):
        return _nvfp4(weights, own, scales, curved)
    arguments = scheme.config_group["weights"]
    high, wide = arguments["block_structure"] or (1, arguments["group_size"])
    if kind == "float":
        return [_blocks(weight, (high, wide or weight.shape[1]), own) for weight in weights]
    importance = curved.compensated_diagonal() if curved else np.ones(weights[0].shape[1])
    ratios = MINMAX if scales == "minmax" else RATIOS
    return [_integers(w, wide, bits, own, importance.astype(np.float32), ratios) for w in weights]


def _kind(scheme: Scheme) -> tuple[str, int]:
    arguments = scheme.config_group["weights"]
    return arguments["type"], arguments["num_bits"]


def _nvfp4(
    weights: Sequence[Floats], own: FloatFormat, scales: str, curved: Curvature | None
) -> list[Scaled]:
    if scales == "minmax":
        owns = [weight.astype(own.value) for weight in weights]
        shared = global_scale(owns)
        codes = [
            block_scales(np.abs(w.reshape(len(w), -1, GROUP)).max(axis=-1), shared) for w in owns
        ]
        return [nvfp4_scaled(code, shared) for code in codes]
    searched = [_searched(weight) for weight in weights]
    if curved:
        shared = sampled_scale(searched)
        blocks = factored(curved.compensated_blocks())
        codes = [search_codes(weight, blocks, shared, compensated=True) for weight in weights]
        return [nvfp4_scaled(code, shared) for code in codes]
    ends = np.cumsum([len(weight.maxima) for weight in searched])
    shared, flat = search(searched, np.empty((2, ends[-1]), np.uint8))
    codes = np.split(flat, ends[:-1])
    return [
        nvfp4_scaled(code.reshape(len(weight), -1).copy(), shared)
        for code, weight in zip(codes, weights, strict=True)
    ]


def _searched(weight: Floats) -> SearchedWeight:
    words = np.ascontiguousarray(weight).reshape(-1).view(F32.word)
    maxima = np.empty(weight.size // GROUP, np.uint32)
    block_maxima(words, F32, maxima)
    return SearchedWeight(words, F32, maxima, ALIKE)


def nvfp4_scaled(codes: Bytes, shared: np.float32) -> Scaled:
    """Return NVFP4's scales from E4M3 codes [out, in / 16] and the set's global scale."""
    tensors = {
        "weight_scale": codes.view(F8),
        "weight_global_scale": np.array([shared], np.float32),
    }
    return Scaled(E4M3[codes] / shared, GROUP, tensors)


def _blocks(weight: Floats, block: tuple[int, int], own: FloatFormat) -> Scaled:
    """Return the min-max scales of FP8 in blocks, as `fp8` has them."""
    high, wide = block
    rows, columns = weight.shape
    down, across = -(-rows // high), -(-columns // wide)
    padded = np.zeros((down * high, across * wide), np.float32)
    padded[:rows, :columns] = np.abs(weight)
    stored = scales_of(padded.reshape(down, high, across, wide).max(axis=(1, 3)).astype(own.value))
    divisors = np.repeat(stored.astype(np.float32), high, axis=0)[:rows]
    return Scaled(divisors, wide, {"weight_scale": stored})


def _integers(
    weight: Floats, wide: int, bits: int, own: FloatFormat, importance: Floats, ratios: Floats
) -> Scaled:
    """Return scales of groups of `wide` columns: the best of `ratios` times the min-max scale.

    The min-max scale is amax / 7.5 (4 bits) in the own dtype, and its epsilon if that is 0.
    """
    groups = weight.reshape(len(weight), -1, wide)
    with np.errstate(under="ignore"):
        stored = np.abs(groups).max(axis=2).astype(own.value) / own.value.type((2**bits - 1) / 2)
        stored[stored == 0] = EPSILON[own.name]
        tried = (stored[..., None].astype(np.float32) * ratios).astype(own.value)
        tried[tried == 0] = EPSILON[own.name]
    errors = np.empty(tried.shape, np.float32)
    spread = importance.reshape(-1, wide) / importance.max()
    _integer_errors(groups, spread, tried.astype(np.float32), integers(bits), errors)
    best = np.take_along_axis(tried, errors.argmin(axis=2)[..., None], axis=2)[..., 0]
    return Scaled(best.astype(np.float32), wide, {"weight_scale": best})


@compiled
def _multiply(points: Array, divisors: Array, width: int) -> None:
    for row in range(points.shape[0]):
        for group in range(divisors.shape[1]):
            divisor, part = divisors[row, group], points[row, group * width : (group + 1) * width]
            for i in range(part.size):
                part[i] = part[i] * divisor


@compiled
def _integer_errors(
    groups: Array, importance: Array, tried: Array, grid: Any, errors: Array
) -> None:
    low, high, normal, ones = grid
    sums = np.empty(_LANES, np.float64)
    for row in range(groups.shape[0]):
        for group in range(groups.shape[1]):
            x, w = groups[row, group], importance[group]
            for i in range(tried.shape[2]):
                d = tried[row, group, i]
                sums[:] = 0
                for first in range(0, x.size, _LANES):
                    for lane in range(min(_LANES, x.size - first)):
                        element = x[first + lane]
                        error = element - nearest(element / d, low, high, normal, ones) * d
                        sums[lane] += w[first + lane] * (error * error)
                errors[row, group, i] = sums.sum()


def stored(points: Floats, scales: Scaled, scheme: Scheme) -> dict[str, Array]:
    """Return the tensors of a weight by suffix: of grid points, float32 [out, in], and scales.

    The order is that of the scheme's parts.
    """
    kind, bits = _kind(scheme)
    tensors = dict(scales.tensors)
    if kind == "int":
        per_word = 32 // bits
        codes = (points + 2 ** (bits - 1)).astype(np.uint32).reshape(len(points), -1, per_word)
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        tensors["weight_packed"] = np.bitwise_or.reduce(codes << shifts, axis=-1).view(np.int32)
        tensors["weight_shape"] = np.array(points.shape, np.int64)
    elif bits == 4:
        tensors["weight_packed"] = np.empty((len(points), points.shape[1] // 2), np.uint8)
        _pack_e2m1(points.reshape(-1), tensors["weight_packed"].reshape(-1))
    else:
        tensors["weight"] = points.astype(F8)
    return {part.suffix: tensors[part.suffix] for part in scheme.parts if part.suffix in tensors}


@compiled
def _pack_e2m1(points: Array, packed: Array) -> None:
    for i in range(packed.size):
        packed[i] = _e2m1(points[2 * i]) | np.uint8(_e2m1(points[2 * i + 1]) << np.uint8(4))


@compiled
def _e2m1(point: Any) -> Any:
    """Return the code of an E2M1 number: its bits of sign, exponent and mantissa, moved."""
    magnitude = abs(point)
    bits = np.uint32(np.float32(magnitude).view(np.uint32) >> np.uint32(22))
    normal = np.uint8(bits - np.uint32((127 << 1) - 2))
    code = normal if magnitude >= np.float32(1) else np.uint8(magnitude * np.float32(2))
    sign = np.uint8(np.float32(point).view(np.uint32) >> np.uint32(28)) & np.uint8(8)
    return np.uint8(code | sign)
