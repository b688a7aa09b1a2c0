"""Searched scales: the best of all codes for every block, the best global scale for the set."""

from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics.test_nvfp4 import BLOCKS, block, normal

import upstream
from mquant.numerics import kernels, nvfp4
from mquant.numerics.formats import BF16, E2M1, E4M3, FLOATS, Array, Bytes, FloatFormat, Floats
from mquant.numerics.search import RATIOS, Weight, search

DTYPES = pytest.mark.parametrize("dtype", FLOATS)
NONE: Final = np.empty(0, np.float32)


def weight_of(words: Array, form: FloatFormat, importance: Floats = NONE) -> Weight:
    maxima = np.empty(words.size // 16, np.uint32)
    kernels.block_maxima(words.reshape(-1), form, maxima)
    return Weight(words.reshape(-1), form, maxima, importance)


def searched(*weights: Weight) -> tuple[np.float32, list[Bytes]]:
    """The set's global scale, and each weight's codes."""
    sizes = [len(weight.maxima) for weight in weights]
    scale, codes = search(weights, np.empty((3, sum(sizes)), np.uint8))
    return scale, np.split(codes, np.cumsum(sizes)[:-1])


def errors(weight: Weight, codes: Array, scale: np.float32) -> Array:
    """Every block's error, in float64, with the reference's elements."""
    x = weight.form.values(weight.words).reshape(-1, 16)
    codes = np.broadcast_to(np.asarray(codes, np.uint8), len(x))[:, None]
    q = nvfp4.element_codes(nvfp4.quotients(x, codes, scale))
    decoded = np.where(q & 8, -1.0, 1.0) * E2M1[q & 7] * (E4M3[codes] / scale)
    w = weight.importance.astype(np.float64)
    wide = np.resize(w.reshape(-1, 16), (len(x), 16)) if w.size else 1.0
    unit = 2.0 ** np.floor(np.log2(float(scale)))  # squares of tiny weights stay numbers
    total: Array = np.sum(wide * ((x.astype(np.float64) - decoded) * unit) ** 2, axis=1)
    return total


def assert_best(weight: Weight, codes: Bytes, scale: np.float32) -> None:
    """No code does better in any block, of all 126, but for what F32 rounds of x and q * d."""
    mine = errors(weight, codes, scale)
    every = np.stack([errors(weight, np.uint8(code), scale) for code in range(1, 127)])
    rounding = 2.0**-21 * np.sqrt(every.max(axis=0))  # at least 2**-23 of the block's norm
    assert np.all(np.sqrt(mine) <= np.sqrt(every.min(axis=0)) + rounding)


@DTYPES
@settings(deadline=None, max_examples=100)
@given(kinds=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6), seed=st.integers(0))
def test_no_code_is_better_for_blocks_of_every_kind(
    dtype: str, kinds: list[str], seed: int
) -> None:
    form, rng = FLOATS[dtype], np.random.default_rng(seed)
    weight = weight_of(np.stack([block(kind, form, rng) for kind in kinds]), form)
    scale, (codes,) = searched(weight)
    assert_best(weight, codes, scale)


@DTYPES
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_no_code_is_better_for_arbitrary_bits(dtype: str, data: st.DataObject) -> None:
    form = FLOATS[dtype]
    words = data.draw(st.lists(st.integers(0, form.infinity - 1), min_size=32, max_size=32))
    weight = weight_of(np.array(words, form.word), form)
    scale, (codes,) = searched(weight)
    assert_best(weight, codes, scale)


@DTYPES
@pytest.mark.parametrize("exponent", range(-24, 3, 3))
def test_no_code_is_better_for_blocks_far_below_the_largest(dtype: str, exponent: int) -> None:
    form = FLOATS[dtype]
    words = normal((8, 256), dtype, 0.5 * 2.0**exponent, seed=exponent + 30)
    words[0, 0] = np.array([1], form.value).view(form.word)[0]
    weight = weight_of(words, form)
    scale, (codes,) = searched(weight)
    assert_best(weight, codes, scale)
