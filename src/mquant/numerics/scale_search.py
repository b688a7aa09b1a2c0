"""NVFP4 scales found by search: the smallest squared error instead of the largest weight.

For a block x of 16 weights, and w, the importance of each weight by its inputs (1 if unknown):

    error(c, G) = sum over i of w[i] * (|x[i]| - q[i] * d)**2,    d = E4M3[c] / G

where q[i] is the E2M1 value nearest to |x[i]| / d, and q[i] * d is the F32 number that
compressed-tensors' decompress (and vLLM) computes. Every block takes the code c of the smallest
error under the global scale G of its fused set, and the set takes the G of the smallest sum.

**Which codes.** With a the largest |x[i]|, the search tries the code of a / 6 and the 12 codes next
to that code. All other codes lose:

- If d > a / 3.5, no q is above 3, and d / 2 has every point that d has up to 3 * d. Half of code c
  is code c - 8, except for odd codes below 16; a block that small tries all these codes.
- If 6 * d < 0.65 * a, clipping a costs more than (0.35 * a)**2 = 4.41 * (a / 6)**2. For any other
  15 weights, some code costs at most 4.3 * (a / 6)**2: for every position of a / 6 between two
  codes there is a mixture of the tried codes under which no 15 weights cost more on average (a
  game, solved in tests/numerics/test_scale_search.py). With `w` such a code could win, but the
  search refuses it: a channel without calibration data would lose a third of its largest weight.

**Which global scales.** Halving G moves every code by 8 and changes only the codes at E4M3's ends,
so one octave holds all distinct grids. The min-max G leaves the largest block no code above a / 6.
So the search divides the min-max G by `RATIOS`, an octave in 16 steps, which begins at the first
step that leaves the largest block all of its codes. The best of these scales on a sample of blocks
is compared with the min-max G on all blocks, so the result is never worse than min-max. All scales
are BF16 numbers, whose reciprocals can be inverted exactly.

The result is deterministic: the order of additions depends neither on the vectors' width nor on the
number of threads.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from mquant.compiled import compiled
from mquant.numerics.floats import BF16, E4M3, Array, Bytes, FloatFormat, Floats, Words
from mquant.numerics.nvfp4 import GROUP, SCALE_OF_ZERO, global_scale_of
from mquant.numerics.thresholds import Magnitudes

RATIOS: Final = tuple(1.75 * (1 + sixteenth / 16) for sixteenth in range(16))
"""Ratios of tried global scales to the min-max scale; 1.75 is the first sixteenth above 6 / 3.5."""
ALIKE: Final = np.empty(0, np.float32)
"""The importance if all columns count the same."""
_SAMPLED: Final = 8192  # blocks of a fused set on which all global scales are tried

_TILE: Final = 128  # blocks at once: their data stays in the first-level cache
_LAST: Final = len(E4M3) - 1
_ABOVE, BELOW = 7, 5  # codes tried above and below the code of a / 6
_SMALL: Final = 8  # blocks with a lower code try 15 codes above
_KEPT: Final = np.float32(0.65)  # the part of a that a tried code must keep
PADDED: Final = np.clip(np.arange(-BELOW, _LAST + 16), 1, _LAST)
"""The codes around a code, at index code + BELOW; the ends repeat."""
_UNIT: Final = {"BF16": np.float32(1), "F16": np.float32(2.0**112), "F32": np.float32(1)}
_SHIFT: Final = {"BF16": np.uint32(16), "F16": np.uint32(13), "F32": np.uint32(0)}
_ONES: Final = np.float32(1.5 * 2**23)
"""Adding and subtracting _ONES rounds a number to the nearest integer, half to even."""
_HALVES: Final = _ONES / 2


class SearchedWeight(NamedTuple):
    """A weight [out, in] of finite numbers for the search: bit patterns, flat.

    `maxima`, uint32 [blocks], has each block's largest magnitude; `importance`, float32 [in],
    says how much an error in each column counts, or is `ALIKE`.
    """

    words: Words
    float_format: FloatFormat
    maxima: Magnitudes
    importance: Floats


def prepare_search(float_format: FloatFormat) -> None:
    """Compile the search for a format, as `kernels.prepare` compiles the other kernels."""
    words, maxima = np.zeros(GROUP, float_format.word), np.zeros(1, np.uint32)
    search([SearchedWeight(words, float_format, maxima, ALIKE)], np.empty((2, 1), np.uint8))


def search(weights: Sequence[SearchedWeight], scratch: Bytes) -> tuple[np.float32, Bytes]:
    """Return the global scale of a fused set, and the E4M3 codes of its blocks in order.

    The codes are a view of `scratch`, uint8 [2, blocks], which the next search overwrites.
    """
    minmax, best = _base(weights), sampled_scale(weights)
    weights = _relative(weights)
    scales = np.array([minmax, best])
    number = np.argmin(_search_under(scales, weights, power_of(minmax), 1, scratch))
    return scales[number], scratch[number, : _blocks(weights)]


def sampled_scale(weights: Sequence[SearchedWeight]) -> np.float32:
    """Return the best global scale below the min-max scale for a sample of the set's blocks."""
    minmax = _base(weights)
    lower = (BF16.value.type(minmax / np.float32(ratio)) for ratio in RATIOS)
    scales = np.array(list(lower), np.float32)
    weights = _relative(weights)
    every = max(1, _blocks(weights) // _SAMPLED)
    codes = np.empty((1, _blocks(weights)), np.uint8)
    best: np.float32 = scales[
        np.argmin(_search_under(scales, weights, power_of(minmax), every, codes))
    ]
    return best


def _blocks(weights: Sequence[SearchedWeight]) -> int:
    return sum(len(weight.maxima) for weight in weights)


def power_of(shared: np.float32) -> np.float32:
    """Return the power of two in whose units no square overflows: the largest weight is near 2688.

    `shared` is the global scale of the fused set.
    """
    power: np.float32 = np.ldexp(np.float32(1), np.frexp(shared)[1] - 1)
    return power


def divisors_under(scales: Floats, power: np.float32) -> tuple[Floats, Floats]:
    """Return the block scales of all codes under global scales [...], and their reciprocals.

    Each is float32 [..., codes], in units of `power`; codes are in the order of `PADDED`.
    """
    with np.errstate(over="ignore", under="ignore"):
        divisors: Floats = E4M3[PADDED] / scales[..., None] * power
        return divisors, np.float32(1) / divisors


def _base(weights: Sequence[SearchedWeight]) -> np.float32:
    """Return the min-max global scale as a BF16 number, for weights of any dtype."""
    amaxes = [w.float_format.values(w.maxima.max()).astype(np.float32) for w in weights]
    # Truncate: rounding would turn the largest float32 into infinity.
    largest = (np.max(amaxes).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return global_scale_of([largest.view(BF16.value)])


def _relative(weights: Sequence[SearchedWeight]) -> list[SearchedWeight]:
    """Divide importance by the set's largest, so that sums stay finite; all 0 becomes `ALIKE`."""
    largest = max(float(w.importance.max(initial=0)) for w in weights)
    return [
        w._replace(importance=w.importance / np.float32(largest) if largest else ALIKE)
        for w in weights
    ]


def _search_under(
    scales: Floats, weights: Sequence[SearchedWeight], power: np.float32, every: int, codes: Bytes
) -> Array:
    """Search every `every`th tile under each of the global scales; return the sums of errors.

    If `codes` has a row for each scale, the search fills each row with the codes of its scale.
    """
    under_all = divisors_under(scales, power)
    totals = np.zeros(len(scales))
    start = 0
    for words, float_format, maxima, importance in weights:
        end = start + len(maxima)
        as_float = _SHIFT[float_format.name], _UNIT[float_format.name], power
        weight, under = (words, maxima, importance), (scales / power, *under_all)
        _search(weight, every, as_float, under, codes[:, start:end], totals)
        start = end
    return totals


@compiled
def _search(
    weight: Any, every: int, as_float: Any, under: Any, codes: Array, totals: Array
) -> None:
    words, maxima, importance = weight
    ratios, divisors, inverse = under
    x = np.zeros((GROUP, _TILE), np.float32)
    w = np.ones((GROUP, _TILE), np.float32)
    largest, best = np.zeros(_TILE, np.float32), np.empty(_TILE, np.float32)
    chosen = np.empty(_TILE, np.uint8)
    for first in range(0, maxima.size, _TILE * every):
        n = min(_TILE, maxima.size - first)
        _load(words[first * GROUP : (first + n) * GROUP], as_float, x)
        if importance.size:
            _spread(importance, first, n, w)
        for b in range(n):
            largest[b] = _value(maxima[first + b], as_float)
        for i in range(ratios.size):
            _choose(x, w, largest[:n], ratios[i], divisors[i], inverse[i], best[:n], chosen[:n])
            row = codes[min(i, codes.shape[0] - 1)]
            for b in range(n):
                row[first + b] = chosen[b]
                totals[i] += best[b]


@compiled
def _choose(
    x: Array,
    w: Array,
    largest: Array,
    ratio: Any,
    divisors: Array,
    inverse: Array,
    best: Array,
    codes: Array,
) -> None:
    """Write the best `codes` of blocks, a column of `x` and `w` each, and their errors (`best`)."""
    errors, d = np.empty(best.size, np.float32), np.empty(best.size, np.float32)
    over_d, center = np.empty(best.size, np.float32), np.empty(best.size, np.int32)
    above = centers(largest, ratio, center, codes)
    look_up(codes, divisors, inverse, 0, d, over_d)
    _errors(x, w, d, over_d, best)
    for number in range(1, above + BELOW + 1):
        step = number if number <= above else above - number
        look_up(center, divisors, inverse, step, d, over_d)
        _errors(x, w, d, over_d, errors)
        keep(errors, d, largest, center, step, best, codes)


@compiled
def _value(magnitude: Any, as_float: Any) -> Any:
    """Return the value of a magnitude, in units in which the set's largest is 1344 to 2688."""
    shift, unit, power = as_float
    return np.uint32(np.uint32(magnitude) << shift).view(np.float32) * unit * power


@compiled
def _load(words: Array, as_float: Any, x: Array) -> None:
    """Write the absolute values of blocks to `x`, a block per column."""
    mask = words.dtype.type(0x7FFF if words.itemsize == 2 else 0x7FFFFFFF)
    for i in range(GROUP):
        row = x[i]
        for b in range(words.size // GROUP):
            row[b] = _value(words[b * GROUP + i] & mask, as_float)


@compiled
def _spread(importance: Array, first: int, n: int, w: Array) -> None:
    """Write the importance of every element of `n` blocks to `w`, a block per column."""
    for b in range(n):
        column = (first + b) * GROUP % importance.size
        for i in range(GROUP):
            w[i, b] = importance[column + i]


@compiled
def centers(largest: Array, ratio: Any, center: Array, codes: Array) -> int:
    """Write the codes of a / 6 to `center`, and as stored to `codes`; return the steps above."""
    above = _ABOVE
    for b in range(largest.size):
        scale = np.float32(largest[b] / np.float32(6) * ratio)
        if scale >= np.float32(2.0**-6):  # 3 bits of mantissa are kept; to nearest even
            bits = scale.view(np.uint32)
            bits = np.uint32(bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1)))
            code = min(int(bits >> np.uint32(20)) - ((127 - 7) << 3), _LAST)
        else:
            code = int((scale * np.float32(512) + _ONES) - _ONES)
        center[b] = code
        codes[b] = code if code else SCALE_OF_ZERO
        if code < _SMALL and largest[b]:
            above = 15
    return above


@compiled
def look_up(
    codes: Array, divisors: Array, inverse: Array, step: int, d: Array, over_d: Array
) -> None:
    """Write the scales of the codes plus `step`, and the reciprocals of the scales."""
    for b in range(d.size):
        code = np.int64(codes[b]) + (step + BELOW)
        d[b], over_d[b] = divisors[code], inverse[code]


@compiled
def keep(
    errors: Array, d: Array, largest: Array, center: Array, step: int, best: Array, codes: Array
) -> None:
    """Take the codes with smaller errors, if the codes keep enough of the largest weight."""
    for b in range(codes.size):
        better = (errors[b] < best[b]) & (np.float32(6) * d[b] >= _KEPT * largest[b])
        best[b] = errors[b] if better else best[b]
        codes[b] = min(max(center[b] + step, 1), _LAST) if better else codes[b]


@compiled
def _errors(x: Array, w: Array, d: Array, over_d: Array, errors: Array) -> None:
    """Write the squared errors of blocks, a column of `x` and `w` each, under their scales `d`.

    A block's elements are added from the first to the last; blocks are computed side by side.
    """
    for b in range(errors.size):
        errors[b] = 0
    for i in range(0, GROUP, 4):  # four at once, so that sums are stored less often
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        for b in range(errors.size):
            scale, over = d[b], over_d[b]
            total = errors[b] + _error(x0[b], w0[b], scale, over)
            total = total + _error(x1[b], w1[b], scale, over)
            total = total + _error(x2[b], w2[b], scale, over)
            errors[b] = total + _error(x3[b], w3[b], scale, over)


@compiled
def _error(x: Any, w: Any, d: Any, over_d: Any) -> Any:
    """Return the squared error of one element.

    E2M1's step is half the power of two below a number, and 0.5 for numbers below 1. Adding and
    subtracting a far larger number rounds to multiples of the step: to nearest, half to even.
    """
    quotient = min(np.float32(x * over_d), np.float32(6))
    binade = np.float32(max(quotient, np.float32(1))).view(np.uint32) & np.uint32(0x7F800000)
    shift = np.uint32(binade).view(np.float32) * _HALVES
    error = x - ((quotient + shift) - shift) * d
    return w * (error * error)
