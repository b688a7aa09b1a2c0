"""The exact cast of MXFP4 to NVFP4: the same numbers, and almost always the same codes.

Both formats hold E2M1 codes. MXFP4 has one E8M0 scale, 2^k, for 32 codes. NVFP4 has one E4M3 scale
for 16 codes, and one divisor, the global scale, for a fused set. E4M3 holds the powers of two from
2^-9 to 2^8, so under the global scale 2^g a block of 32 becomes two blocks of 16 with the scale
2^(k + g), if k + g is from -9 to 8. Every operation of a decoder is then exact.

| exponents k of a fused set | what happens |
| --- | --- |
| span at most 14 octaves | codes as they are, block scales from 2^-6 (the normal E4M3 numbers) on |
| span more | codes move, if that saves octaves and keeps every weight; see below |
| span still more than 14 | the set is unsafe for FP4 Marlin, which wants normal block scales |
| span still more than 17 | the smallest blocks are requantized |

The global scale puts the largest exponent on 2^8, or the global scale itself stops at 2^126 and
2^-126, so that it and its reciprocal are normal F32 numbers. Blocks of zeros have no exponent: they
take any scale. A requantized block takes the smallest block scale, 2^-9, and the codes nearest to
the block's BF16 numbers. (The NVFP4 quantizer would round its scale to 0, and so the block to
zeros.)

A block whose codes are all at most 3 can be doubled, if its scale is halved: 0, 0.5, 1, 1.5, 2, 3
become 0, 1, 2, 3, 4, 6. So a block with small codes needs not hold the global scale down. The other
way round a block without 0.5 and 1.5 can be halved. `_MOVED` lists what every code becomes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from mquant.compiled import compiled
from mquant.numerics.floats import BF16, E2M1, E4M3, Array, Bytes, Floats
from mquant.numerics.kernels import pack_into, prepare
from mquant.numerics.nvfp4 import GROUP
from mquant.numerics.thresholds import thresholds

MX_GROUP: Final = 32
"""Elements along a row that share an E8M0 scale."""
NAN: Final = 255
"""The E8M0 code that is no number; a code c below stands for 2^(c - 127)."""
BIAS: Final = 127
_HIGHEST, _NORMAL, _LOWEST = 8, -6, -9  # E4M3's powers of two: largest, smallest normal, smallest
SAFE_OCTAVES: Final = _HIGHEST - _NORMAL
"""The largest span of exponents, in octaves, that FP4 Marlin takes."""
EXACT_OCTAVES: Final = _HIGHEST - _LOWEST
"""The largest span of exponents, in octaves, that NVFP4 holds under one global scale."""
_SMALLEST: Final = np.uint8(1)
"""The E4M3 code of 2^-9."""
_MOST_GLOBAL: Final = 126
_MOVES: Final = 3  # 0.5 becomes 4 by three octaves, and no code moves further
_ABSENT: Final = 1000
"""The exponent of a block of zeros, in a search for the least or, negated, the largest."""


def _moved() -> Array:
    """Return the code times 2^(move - 3) of every code, uint8 [7, 16]; 255 if there is none."""
    table = np.full((2 * _MOVES + 1, 16), 255, np.uint8)
    for move in range(-_MOVES, _MOVES + 1):
        for code, value in enumerate(E2M1):
            found = np.flatnonzero(value * np.float32(2.0**move) == E2M1)
            table[move + _MOVES, [code, code + 8]] = (found[0], found[0] + 8) if found.size else 255
    return table


_MOVED: Final = _moved()
_SCALE_OF_POWER: Final = np.array(
    [np.flatnonzero(np.float32(2.0**power) == E4M3)[0] for power in range(_LOWEST, _HIGHEST + 1)],
    np.uint8,
)
"""The E4M3 codes of 2^-9 to 2^8."""


class MXWeight(NamedTuple):
    """A weight [out, in] in MXFP4, flat, `in` a multiple of 32.

    `packed`, uint8 [out * in / 2]: two E2M1 codes a byte, the even element in the low nibble.
    `scales`, uint8 [out * in / 32]: E8M0.
    """

    packed: Bytes
    scales: Bytes


class Span(NamedTuple):
    """The least and the largest E8M0 code of a weight, blocks of zeros aside, and its NaN codes.

    A weight of zeros has a `lowest` above its `highest`.
    """

    lowest: int
    highest: int
    nans: int


@dataclass(frozen=True, slots=True)
class Window:
    """The exponents of MXFP4 that have block scales under one global scale, 2^`power`.

    The largest is `top`, the least with a normal block scale `normal`, the least of all `bottom`.
    `plain`: every block of the set is from `normal` to `top`, and keeps its codes.
    """

    power: int
    plain: bool

    @property
    def top(self) -> int:
        """The exponent whose block scale is 2^8."""
        return _HIGHEST - self.power

    @property
    def normal(self) -> int:
        """The exponent whose block scale is 2^-6, the smallest normal E4M3 number."""
        return _NORMAL - self.power

    @property
    def bottom(self) -> int:
        """The exponent whose block scale is 2^-9, the smallest E4M3 number."""
        return _LOWEST - self.power

    @property
    def global_scale(self) -> np.float32:
        """The divisor of the fused set."""
        return np.float32(2.0**self.power)


class CastBlocks(NamedTuple):
    """Counts of blocks of 16 weights: all, those requantized, those with a subnormal scale."""

    blocks: int
    requantized: int = 0
    subnormal: int = 0

    @property
    def lossless(self) -> int:
        """The blocks in which every weight is equal to the source's."""
        return self.blocks - self.requantized


def prepare_cast() -> None:
    """Compile the kernels, or take them from numba's cache."""
    weight = MXWeight(np.full(MX_GROUP // 2, 0x77, np.uint8), np.full(1, BIAS, np.uint8))
    span(weight)
    cast_into(weight, window([weight], [Span(0, 254, 0)]), np.empty(2, np.uint8))
    cast_into(weight, Window(0, plain=True), np.empty(2, np.uint8))
    prepare(BF16)


def span(weight: MXWeight) -> Span:
    """Return the range of E8M0 codes of the blocks of a weight that are not all zero."""
    _check(weight)
    return Span(*map(int, _span(weight.packed.view(np.uint64), weight.scales)))


def scale_span(scales: Bytes) -> Span:
    """Return the range of E8M0 codes without a look at the blocks: zeros count too."""
    if not scales.size:
        return Span(NAN, 0, 0)
    nans = int(np.count_nonzero(scales == NAN))
    return Span(int(scales.min()), int(scales.max()), nans)


def window(weights: Sequence[MXWeight], spans: Sequence[Span]) -> Window:
    """Return the window of a fused set. `spans` are the weights' spans, without NaN."""
    lowest = min((each.lowest for each in spans), default=NAN)
    highest = max((each.highest for each in spans), default=0)
    if lowest > highest:  # zeros only
        return Window(0, plain=True)
    top, plain = highest - BIAS, highest - lowest <= SAFE_OCTAVES
    if not plain:
        top = max(int(_least_top(w.packed.view(np.uint64), w.scales, _MOVED)) for w in weights)
    power = min(max(_HIGHEST - top, -_MOST_GLOBAL), _MOST_GLOBAL)
    return Window(power, plain)


def cast_into(weight: MXWeight, under: Window, scales: Bytes) -> CastBlocks:
    """Fill `scales`, uint8 [out * in / 16], with E4M3 codes; change `weight.packed` to NVFP4's.

    `under` is the window of the fused set that has the weight.
    """
    _check(weight)
    blocks = weight.packed.size * 2 // GROUP
    if scales.shape != (blocks,):
        raise ValueError(f"{scales.shape} scales for {blocks} blocks")
    limits = (BIAS + under.bottom, BIAS + under.normal, BIAS + under.top)
    if under.plain:
        _plain(weight.scales, limits, _SCALE_OF_POWER, scales)
        return CastBlocks(blocks)
    left = np.empty(blocks, np.bool_)
    subnormal = int(
        _cast(weight.packed, weight.scales, limits, _MOVED, _SCALE_OF_POWER, scales, left)
    )
    beyond = np.flatnonzero(left)
    if beyond.size:
        _requantize(weight, beyond, under.global_scale, scales)
    return CastBlocks(blocks, len(beyond), subnormal)


def powers_of_two(scales: Bytes) -> Floats:
    """Return the numbers of E8M0 codes in F32, which holds all of them; 255 becomes NaN."""
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - BIAS)
    return np.where(scales == NAN, np.float32(np.nan), powers).astype(np.float32)


def infinite(weight: MXWeight) -> int:
    """Return how many numbers of a weight are infinite in BF16, as in F32: 2^128 and more."""
    count = 0
    for code in (NAN - 2, NAN - 1):
        blocks = np.flatnonzero(weight.scales == code)
        packed = weight.packed.reshape(-1, MX_GROUP // 2)[blocks]
        magnitudes = np.stack([packed & np.uint8(7), packed >> np.uint8(4) & np.uint8(7)])
        least = 2.0 ** (128 - (code - BIAS))
        count += int(np.count_nonzero(E2M1[magnitudes] >= least))
    return count


def _check(weight: MXWeight) -> None:
    if weight.packed.size * 2 != weight.scales.size * MX_GROUP:
        raise ValueError(f"{weight.packed.shape} bytes with {weight.scales.shape} scales")


def _requantize(
    weight: MXWeight, beyond: "np.ndarray[Any, Any]", scale: np.float32, scales: Bytes
) -> None:
    """Quantize the blocks `beyond` from BF16, under the smallest block scale, in place."""
    packed = weight.packed.reshape(-1, GROUP // 2)
    steps, at_once = thresholds(BF16.name, float(scale)), 1 << 12
    for first in range(0, len(beyond), at_once):
        some = beyond[first : first + at_once]
        codes = np.stack([packed[some] & np.uint8(15), packed[some] >> np.uint8(4)], axis=-1)
        values = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7]).reshape(len(some), GROUP)
        exponents = weight.scales[some * GROUP // MX_GROUP].astype(np.int32) - BIAS
        words = np.ldexp(values, exponents[:, None]).astype(BF16.value).view(BF16.word).reshape(-1)
        new = np.empty(len(some) * GROUP // 2, np.uint8)
        scales[some] = _SMALLEST
        pack_into(words, steps, scales[some], new)
        packed[some] = new.reshape(-1, GROUP // 2)


@compiled
def _span(words: Array, scales: Array) -> Any:
    lowest, highest, nans = np.int64(255), np.int64(0), np.int64(0)
    magnitudes = np.uint64(0x7777777777777777)
    for block in range(scales.size):
        code = np.int64(scales[block])
        some = ((words[2 * block] | words[2 * block + 1]) & magnitudes) != np.uint64(0)
        nans += code == 255
        lowest = min(lowest, code if some else np.int64(255))
        highest = max(highest, code if some else np.int64(0))
    return lowest, highest, nans


@compiled
def _moves(word: Any, moved: Array) -> Any:
    """Return how many octaves the codes of a block of 16 can shrink, and how many they can grow."""
    seen = np.int64(0)
    for i in range(16):
        seen |= 1 << np.int64((word >> np.uint64(4 * i)) & np.uint64(7))
    fewer = more = 0
    for move in range(1, 4):
        down = up = True
        for code in range(8):
            if seen >> code & 1:
                down = down and moved[3 - move, code] != 255
                up = up and moved[3 + move, code] != 255
        fewer = move if down else fewer
        more = move if up else more
    return fewer, more


@compiled
def _least_top(words: Array, scales: Array, moved: Array) -> Any:
    """Return the least exponent that every block can reach from above, or stay below."""
    top = np.int64(-1000)
    for block in range(words.size):
        exponent = np.int64(scales[block // 2]) - 127
        if words[block] & np.uint64(0x7777777777777777) and exponent > top:
            _, more = _moves(words[block], moved)
            top = max(top, exponent - more)
    return top


@compiled
def _plain(old: Array, limits: Any, scale_of: Array, scales: Array) -> None:
    """Write the scales of blocks that keep their codes; zeros take the nearest normal scale."""
    bottom, normal, top = limits
    for block in range(old.size):
        code = scale_of[min(max(np.int64(old[block]), normal), top) - bottom]
        scales[2 * block] = code
        scales[2 * block + 1] = code


@compiled
def _cast(
    packed: Array,
    old: Array,
    limits: Any,
    moved: Array,
    scale_of: Array,
    scales: Array,
    left: Array,
) -> Any:
    """Write scales, move codes, and mark in `left` the blocks that no move saves.

    Returns the count of blocks with a subnormal scale.
    """
    bottom, normal, top = limits
    words = packed.view(np.uint64)
    subnormal = np.int64(0)
    for block in range(words.size):
        code = np.int64(old[block // 2])
        zeros = (words[block] & np.uint64(0x7777777777777777)) == np.uint64(0)
        wanted = np.int64(min(max(code, normal), top))
        left[block] = False
        if wanted != code and not zeros:
            fewer, more = _moves(words[block], moved)
            wanted = min(max(wanted, code - more), code + fewer)
            left[block] = wanted < bottom
            if not left[block] and wanted != code:
                for i in range(block * 8, block * 8 + 8):
                    row = code - wanted + 3
                    low = moved[row, packed[i] & np.uint8(15)]
                    high = moved[row, packed[i] >> np.uint8(4)]
                    packed[i] = np.uint8(low | np.uint8(high << np.uint8(4)))
        subnormal += bottom <= wanted < normal
        scales[block] = scale_of[max(wanted, bottom) - bottom]
    return subnormal
