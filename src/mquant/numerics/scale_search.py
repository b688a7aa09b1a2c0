"""NVFP4 scales found by search: the smallest squared error instead of the largest weight.

For a block x of 16 weights, and w, how much the inputs make of each (1 where that is not known):

    error(c, G) = sum over i of w[i] * (|x[i]| - q[i] * d)**2,    d = E4M3[c] / G

where q[i] is the E2M1 value next to |x[i]| / d, and q[i] * d what compressed-tensors' decompress
(and vLLM) makes of it, in F32. Every block takes the code c of the smallest error under the global
scale G of its fused set, and the set the G of the smallest sum.

**Which codes.** With a the largest |x[i]|, `around` tries those 12 next to a / 6 and itself. All
others lose:

- d > a / 3.5: then no q is above 3, and d / 2 has every point that d has up to there. Half of
  code c is c - 8, but for odd codes below 16, of which all are tried where a block is that small.
- 6 * d < 0.65 * a: cutting off a costs more than (0.35 * a)**2 = 4.41 * (a / 6)**2. Whatever the
  other 15 weights are, some code costs at most 4.3 * (a / 6)**2: for every position of a / 6
  between two codes there is a mixture of the codes tried under which no 15 weights cost more on
  average (a game, solved in tests/numerics/test_scale_search.py). With `w` such a code could win,
  and is not wanted: a channel that calibration did not see would lose a third of its largest
  weight.

**Which global scales.** Halving G moves every code by 8 and changes nothing but what falls off
E4M3's ends, so one octave holds all grids there are. The min-max G leaves the largest block no
code above a / 6; so `RATIOS` below it, an octave in 16 steps, begin where it has all of them. The
best of these on a sample of blocks is compared with the min-max one on all blocks: so min-max's
never does better. All are BF16 numbers, in which 1 / G can be taken and undone.

Deterministic: sums are taken in one order, whatever the vectors' width or the number of threads.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from mquant.compiled import compiled
from mquant.numerics.formats import BF16, E4M3, Array, Bytes, FloatFormat, Floats, Words
from mquant.numerics.kernels import compiling
from mquant.numerics.nvfp4 import GROUP, SCALE_OF_ZERO, global_scale_of
from mquant.numerics.thresholds import Magnitudes

RATIOS: Final = tuple(1.75 * (1 + sixteenth / 16) for sixteenth in range(16))
"""Ratios of tried global scales to the min-max scale; 1.75 is the first sixteenth above 6 / 3.5."""
ALIKE: Final = np.empty(0, np.float32)
"""The importance if all columns count the same."""
_SAMPLED: Final = 8192  # blocks of a fused set that all global scales are tried on

_TILE: Final = 128  # blocks at once: what they need stays in the first-level cache
_LAST: Final = len(E4M3) - 1
_ABOVE, _BELOW = 7, 5  # codes tried beside a / 6's own
_SMALL: Final = 8  # blocks whose code is lower need codes up to 15
_KEPT: Final = np.float32(0.65)  # of a, by the codes that are tried
_PADDED: Final = np.clip(np.arange(-_BELOW, _LAST + 16), 1, _LAST)
"""The codes around a code, at index code + _BELOW; the ends repeat."""
_UNIT: Final = {"BF16": np.float32(1), "F16": np.float32(2.0**112), "F32": np.float32(1)}
_SHIFT: Final = {"BF16": np.uint32(16), "F16": np.uint32(13), "F32": np.uint32(0)}
_ONES: Final = np.float32(1.5 * 2**23)
"""Adding and subtracting _ONES rounds a number to the nearest integer, half to even."""
_HALVES: Final = _ONES / 2


class SearchedWeight(NamedTuple):
    """A weight [out, in] of finite numbers, to be searched: bit patterns, flat.

    `maxima`, uint32 [blocks], has each block's largest magnitude, `importance`, float32 [in], how
    much an error in each column counts, or `ALIKE`.
    """

    words: Words
    float_format: FloatFormat
    maxima: Magnitudes
    importance: Floats


def prepare_search(float_format: FloatFormat) -> None:
    """Compile the search for a format, as `kernels.prepare` does what comes before and after."""
    words, maxima = np.zeros(GROUP, float_format.word), np.zeros(1, np.uint32)
    with compiling():
        search([SearchedWeight(words, float_format, maxima, ALIKE)], np.empty((2, 1), np.uint8))


def search(weights: Sequence[SearchedWeight], scratch: Bytes) -> tuple[np.float32, Bytes]:
    """The global scale of a fused set, and the E4M3 codes of all its blocks, one after another.

    `scratch`, uint8 [2, blocks], holds them until it is used again.
    """
    first = _base(weights)
    below = (BF16.value.type(first / np.float32(ratio)) for ratio in RATIOS)
    scales = np.array(list(below), np.float32)
    weights = _relative(weights)
    power = np.ldexp(np.float32(1), np.frexp(first)[1] - 1)
    blocks = sum(len(weight.maxima) for weight in weights)
    sampled = _search_under(scales, weights, power, max(1, blocks // _SAMPLED), scratch[:1])
    scales = np.array([first, scales[np.argmin(sampled)]])
    best = np.argmin(_search_under(scales, weights, power, 1, scratch))
    return scales[best], scratch[best, :blocks]


def _base(weights: Sequence[SearchedWeight]) -> np.float32:
    """The min-max global scale, as a BF16 number whatever the weights are."""
    amaxes = [w.float_format.values(w.maxima.max()).astype(np.float32) for w in weights]
    # Cut, not rounded: the largest float32 would be infinite.
    largest = (np.max(amaxes).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return global_scale_of([largest.view(BF16.value)])


def _relative(weights: Sequence[SearchedWeight]) -> list[SearchedWeight]:
    """Importance of the set's largest: sums of squares stay numbers. All zero says nothing."""
    largest = max(float(w.importance.max(initial=0)) for w in weights)
    return [
        w._replace(importance=w.importance / np.float32(largest) if largest else ALIKE)
        for w in weights
    ]


def _search_under(
    scales: Floats, weights: Sequence[SearchedWeight], power: np.float32, every: int, codes: Bytes
) -> Array:
    """Search every so many tiles under each of the global scales; returns the sums of errors.

    If `codes` has a row for each scale, it has the codes of all blocks afterwards.
    """
    with np.errstate(over="ignore", under="ignore"):
        divisors = E4M3[_PADDED] / scales[:, None] * power
        inverse = np.float32(1) / divisors
    totals = np.zeros(len(scales))
    start = 0
    for words, float_format, maxima, importance in weights:
        end = start + len(maxima)
        as_float = _SHIFT[float_format.name], _UNIT[float_format.name], power
        weight, under = (words, maxima, importance), (scales / power, divisors, inverse)
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
    """The codes of blocks, a column of `x` and `w` each, and what their errors are."""
    errors, d = np.empty(best.size, np.float32), np.empty(best.size, np.float32)
    over_d, center = np.empty(best.size, np.float32), np.empty(best.size, np.int32)
    above = _centers(largest, ratio, center, codes)
    _look_up(codes, divisors, inverse, 0, d, over_d)
    _errors(x, w, d, over_d, best)
    for number in range(1, above + _BELOW + 1):
        step = number if number <= above else above - number
        _look_up(center, divisors, inverse, step, d, over_d)
        _errors(x, w, d, over_d, errors)
        _keep(errors, d, largest, center, step, best, codes)


@compiled
def _value(magnitude: Any, as_float: Any) -> Any:
    """The absolute value of a magnitude, in units in which the set's largest is some 2688."""
    shift, unit, power = as_float
    return np.uint32(np.uint32(magnitude) << shift).view(np.float32) * unit * power


@compiled
def _load(words: Array, as_float: Any, x: Array) -> None:
    """Absolute values of blocks, a block a column."""
    mask = words.dtype.type(0x7FFF if words.itemsize == 2 else 0x7FFFFFFF)
    for i in range(GROUP):
        row = x[i]
        for b in range(words.size // GROUP):
            row[b] = _value(words[b * GROUP + i] & mask, as_float)


@compiled
def _spread(importance: Array, first: int, n: int, w: Array) -> None:
    """The importance of every element of `n` blocks, a block a column."""
    for b in range(n):
        column = (first + b) * GROUP % importance.size
        for i in range(GROUP):
            w[i, b] = importance[column + i]


@compiled
def _centers(largest: Array, ratio: Any, center: Array, codes: Array) -> int:
    """The codes next to a / 6, as they are and as they are stored; returns how many go above."""
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
def _look_up(
    codes: Array, divisors: Array, inverse: Array, step: int, d: Array, over_d: Array
) -> None:
    """The scales `step` codes on, and one over them."""
    for b in range(d.size):
        code = np.int64(codes[b]) + (step + _BELOW)
        d[b], over_d[b] = divisors[code], inverse[code]


@compiled
def _keep(
    errors: Array, d: Array, largest: Array, center: Array, step: int, best: Array, codes: Array
) -> None:
    """Take the codes that make smaller errors, if they keep enough of the largest weight."""
    for b in range(codes.size):
        better = (errors[b] < best[b]) & (np.float32(6) * d[b] >= _KEPT * largest[b])
        best[b] = errors[b] if better else best[b]
        codes[b] = min(max(center[b] + step, 1), _LAST) if better else codes[b]


@compiled
def _errors(x: Array, w: Array, d: Array, over_d: Array, errors: Array) -> None:
    """Squared errors of blocks, a column of `x` and `w` each, under their scales `d`.

    The sum over a block is taken from its first element to its last; blocks go side by side.
    """
    for b in range(errors.size):
        errors[b] = 0
    for i in range(0, GROUP, 4):  # four, so that sums are not stored after each
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
    """The squared error of one element.

    E2M1's steps are half the power of two below a number, and 0.5 below 1. A number far larger
    than a step loses, when it is added, what is less than the step: to nearest, half to even.
    """
    quotient = min(np.float32(x * over_d), np.float32(6))
    binade = np.float32(max(quotient, np.float32(1))).view(np.uint32) & np.uint32(0x7F800000)
    shift = np.uint32(binade).view(np.float32) * _HALVES
    off = x - ((quotient + shift) - shift) * d
    return w * (off * off)
