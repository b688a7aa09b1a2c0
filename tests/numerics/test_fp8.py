"""The FP8 kernel, the reference and compressed-tensors return the same bytes for any weights."""

from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import upstream
from mquant.numerics import fp8
from mquant.numerics.floats import FLOATS, Array, FloatFormat

DTYPES = pytest.mark.parametrize("dtype", FLOATS)
SCHEMES: Final = {"FP8_DYNAMIC": None, "FP8_BLOCK": (128, 128)}


def weights(float_format: FloatFormat, shape: tuple[int, int], seed: int) -> Array:
    """Return bit patterns: rows of any finite numbers, usual weights, zeros, subnormals or ties."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 8 * float_format.word.itemsize, shape).astype(float_format.word)
    words[(words & (float_format.sign - 1)) >= float_format.infinity] = float_format.infinity - 1
    usual = rng.standard_normal(shape, np.float32) * np.exp(rng.uniform(-9, 3, (shape[0], 1)))
    ties = np.resize(np.arange(1, 900, dtype=np.float32) / 2, shape[1])
    for row in range(shape[0]):
        kind = rng.integers(0, 6)
        if kind == 0:
            words[row] = usual[row].astype(float_format.value).view(float_format.word)
        elif kind == 1:
            words[row] = rng.integers(0, 2, shape[1]) * float_format.sign  # 0.0 and -0.0
        elif kind == 2:
            words[row] &= float_format.word.type(float_format.sign | 7)
        elif kind == 3:
            words[row] = ties.astype(float_format.value).view(float_format.word)
    return words


@pytest.mark.upstream
@pytest.mark.parametrize("scheme", SCHEMES)
@DTYPES
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=15, deadline=None)
def test_codes_and_scales_are_those_of_compressed_tensors(
    scheme: str, dtype: str, seed: int, rows: int, columns: int
) -> None:
    float_format = FLOATS[dtype]
    words = weights(float_format, (rows, columns), seed)
    block = SCHEMES[scheme] or (1, columns)
    codes = np.empty(words.shape, np.uint8)

    scales, bad = fp8.encode_into(words, float_format, block, codes)
    by_reference, reference_scales = fp8.quantize(float_format.values(words), block)
    expected, expected_scales = upstream.float_quantized(words, dtype, scheme)

    assert bad == 0
    assert (by_reference == expected).all()
    assert (codes == expected).all()
    assert (reference_scales.view(float_format.word) == expected_scales).all()
    assert (scales.view(float_format.word) == expected_scales).all()


@DTYPES
def test_nan_and_infinity_are_counted(dtype: str) -> None:
    float_format = FLOATS[dtype]
    words = np.zeros((3, 4), float_format.word)
    words[1, 2], words[2, 0] = float_format.infinity, float_format.infinity + float_format.sign + 1

    _, bad = fp8.encode_into(words, float_format, (1, 4), np.empty((3, 4), np.uint8))

    assert bad == 2


def test_a_weight_of_another_dtype_is_refused() -> None:
    words = np.zeros((2, 2), "<u4")
    with pytest.raises(ValueError, match="uint32"):
        fp8.encode_into(words, FLOATS["BF16"], (1, 2), np.empty((2, 2), np.uint8))
