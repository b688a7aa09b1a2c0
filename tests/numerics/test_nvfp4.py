"""The NVFP4 kernels, the reference and compressed-tensors return the same bytes for any weights."""

from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import upstream
from mquant.numerics import kernels, nvfp4
from mquant.numerics.floats import F32, FLOATS, Array, FloatFormat
from mquant.numerics.thresholds import thresholds

DTYPES = pytest.mark.parametrize("dtype", FLOATS)
BLOCKS: Final = (
    "zeros",
    "negative zeros",
    "subnormal",
    "largest",
    "tiny and huge",
    "ties",
    "outlier",
    "any",
    "usual",
)
QKV: Final = ("q_proj", "k_proj", "v_proj")


def block(kind: str, float_format: FloatFormat, rng: np.random.Generator) -> Array:
    """Return the bit patterns [16] of finite numbers."""

    def below(limit: int) -> Array:
        return rng.integers(0, limit, 16).astype(float_format.word)

    words = below(float_format.infinity)
    if kind in ("zeros", "negative zeros"):
        words[:] = 0
    elif kind == "subnormal":
        smallest_normal = np.array(
            [2.0**-14 if float_format.name == "F16" else 2.0**-126], float_format.value
        )
        words = below(int(smallest_normal.view(float_format.word)[0]))
    elif kind == "largest":
        words[:] = float_format.infinity - 1
    elif kind == "tiny and huge":
        words[:8], words[8:] = 1 + below(3)[:8], float_format.infinity - 1 - below(3)[:8]
    elif kind == "ties":
        points = np.resize([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], 16)
        words = (
            (points * 2.0 ** rng.integers(-6, 6)).astype(float_format.value).view(float_format.word)
        )
        words += rng.integers(-1, 2, 16).astype(float_format.word) * float_format.word.type(
            rng.integers(2)
        )
    elif kind in ("outlier", "usual"):
        words = (rng.standard_normal(16) * 0.02).astype(float_format.value).view(float_format.word)
        if kind == "outlier":
            words[rng.integers(16)] = np.array([300], float_format.value).view(float_format.word)[0]
    words = words & float_format.word.type(float_format.sign - 1)
    negative = rng.integers(0, 2, 16) if kind != "zeros" else np.zeros(16, int)
    if kind == "negative zeros":
        negative[:] = 1
    signed: Array = words | (
        negative.astype(float_format.word) * float_format.word.type(float_format.sign)
    )
    return signed


def by_kernel(words: Array, float_format: FloatFormat, scale: np.float32) -> upstream.Quantized:
    rows, columns = words.shape
    packed = np.empty((rows, columns // 2), np.uint8)
    scales = np.empty((rows, columns // 16), np.uint8)
    maxima = np.empty(rows * columns // 16, np.uint32)
    kernels.block_maxima(words.reshape(-1), float_format, maxima)
    steps = thresholds(float_format.name, float(scale))
    kernels.quantize_into(words.reshape(-1), maxima, steps, packed.reshape(-1), scales.reshape(-1))
    return upstream.Quantized(packed, scales, scale)


def scale_by_kernel(members: list[tuple[Array, str]]) -> np.float32:
    amaxes = []
    for words, dtype in members:
        maxima = np.empty(words.size // 16, np.uint32)
        magnitude, wrong = kernels.block_maxima(words.reshape(-1), FLOATS[dtype], maxima)
        assert wrong == 0
        amaxes.append(FLOATS[dtype].values(np.array(magnitude, FLOATS[dtype].word)))
    return nvfp4.global_scale_of(amaxes)


def assert_same(words: Array, dtype: str, scale: np.float32, expected: upstream.Quantized) -> None:
    float_format = FLOATS[dtype]
    result = by_kernel(words, float_format, scale)
    packed, scales = nvfp4.quantize(float_format.values(words), scale)
    assert scale == expected.global_scale
    for array in (result.scales, scales):
        np.testing.assert_array_equal(array, expected.scales)
    for array in (result.packed, packed):
        np.testing.assert_array_equal(array, expected.packed)


def assert_alone(words: Array, dtype: str) -> None:
    scale = nvfp4.global_scale([FLOATS[dtype].values(words)])
    assert scale_by_kernel([(words, dtype)]) == scale
    assert_same(words, dtype, scale, upstream.alone(words, dtype))


def assert_fused(names: tuple[str, ...], members: list[tuple[Array, str]]) -> None:
    scale = nvfp4.global_scale([FLOATS[dtype].values(words) for words, dtype in members])
    assert scale_by_kernel(members) == scale
    for (words, dtype), expected in zip(members, upstream.fused(names, members), strict=True):
        assert_same(words, dtype, scale, expected)


def normal(shape: tuple[int, int], dtype: str, deviation: float, seed: int) -> Array:
    """Return the bit patterns of normally distributed weights, as models have them."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * deviation
    words: Array = values.astype(FLOATS[dtype].value).view(FLOATS[dtype].word)
    return words


@DTYPES
@settings(deadline=None, max_examples=80)
@given(kinds=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6), seed=st.integers(0))
def test_blocks_of_every_kind_equal_upstreams(dtype: str, kinds: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert_alone(np.stack([block(kind, FLOATS[dtype], rng) for kind in kinds]), dtype)


@DTYPES
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_arbitrary_bits_equal_upstreams(dtype: str, data: st.DataObject) -> None:
    float_format = FLOATS[dtype]
    magnitudes = st.lists(st.integers(0, float_format.infinity - 1), min_size=32, max_size=32)
    signs = st.integers(0, 2**32 - 1)
    bits = data.draw(signs)
    words = [m | (bits >> i & 1) * float_format.sign for i, m in enumerate(data.draw(magnitudes))]
    assert_alone(np.array(words, float_format.word).reshape(2, 16), dtype)


@DTYPES
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_one_kind_equal_upstreams(dtype: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    blocks = [block(kind, FLOATS[dtype], rng) for _ in range(64)]
    assert_alone(np.concatenate(blocks).reshape(16, 64), dtype)


@DTYPES
@pytest.mark.parametrize("exponent", range(-130, 128, 6))
def test_weights_of_every_size_equal_upstreams(dtype: str, exponent: int) -> None:
    float_format = FLOATS[dtype]
    with np.errstate(over="ignore", under="ignore"):
        weight = np.random.default_rng(exponent + 200).uniform(-1, 1, (4, 64))
        weight = (weight * 2.0**exponent).astype(np.float32).astype(float_format.value)
    assert_alone(
        np.where(np.isfinite(weight), weight, float_format.value.type(1)).view(float_format.word),
        dtype,
    )


@DTYPES
def test_real_shapes_equal_upstreams(dtype: str) -> None:
    assert_alone(normal((1536, 3072), dtype, 0.02, seed=2), dtype)


@DTYPES
@pytest.mark.parametrize("largest", [0, 1, 2])
def test_q_k_v_share_a_scale(dtype: str, largest: int) -> None:
    shapes = ((96, 64), (16, 64), (16, 64))
    sizes = [0.02 if i != largest else 0.3 for i in range(3)]
    members = [
        (normal(shape, dtype, size, i), dtype)
        for i, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
    ]
    assert_fused(QKV, members)


@DTYPES
def test_w1_and_w3_share_a_scale(dtype: str) -> None:
    members = [(normal((1536, 3072), dtype, size, 7), dtype) for size in (0.02, 0.05)]
    assert_fused(("w1", "w3"), members)


@pytest.mark.parametrize("dtypes", [("BF16", "F32", "F16"), ("F16", "BF16", "BF16")])
def test_a_fused_set_of_different_dtypes_shares_a_scale(dtypes: tuple[str, ...]) -> None:
    assert_fused(QKV, [(normal((16, 64), d, 0.02, i), d) for i, d in enumerate(dtypes)])


@DTYPES
def test_a_fused_set_may_hold_tensors_of_zeros(dtype: str) -> None:
    zeros = np.zeros((16, 64), FLOATS[dtype].word)
    assert_fused(("w1", "w3"), [(zeros, dtype), (normal((16, 64), dtype, 0.02, 3), dtype)])
    assert_fused(("w1", "w3"), [(zeros, dtype), (zeros, dtype)])


@DTYPES
def test_rows_may_be_quantized_a_few_at_a_time(dtype: str) -> None:
    words = normal((130, 1040), dtype, 1.0, seed=4)
    scale = nvfp4.global_scale([FLOATS[dtype].values(words)])
    whole = by_kernel(words, FLOATS[dtype], scale)
    for start in range(0, 130, 7):
        part = by_kernel(words[start : start + 7], FLOATS[dtype], scale)
        assert np.array_equal(part.packed, whole.packed[start : start + 7])
        assert np.array_equal(part.scales, whole.scales[start : start + 7])


@DTYPES
def test_nan_and_infinity_are_counted(dtype: str) -> None:
    float_format = FLOATS[dtype]
    weight = float_format.values(normal((33, 48), dtype, 1.0, seed=5)).copy()
    for index, wrong in ((0, np.nan), (100, np.inf), (101, -np.inf), (1583, -np.nan)):
        weight.flat[index] = float_format.value.type(wrong)
    words, maxima = weight.view(float_format.word).reshape(-1), np.empty(99, np.uint32)
    _, count = kernels.block_maxima(words, float_format, maxima)
    assert count == 4
    words[:] = float_format.infinity - 1
    assert kernels.block_maxima(words, float_format, maxima) == (float_format.infinity - 1, 0)


def test_kernels_accept_read_only_bytes() -> None:
    words = F32.words(np.full(16, 3, np.float32).tobytes())
    packed, scales = np.empty(8, np.uint8), np.empty(1, np.uint8)
    maxima = np.empty(1, np.uint32)
    assert kernels.block_maxima(words, F32, maxima) == (0x40400000, 0)
    kernels.quantize_into(words, maxima, thresholds("F32", 896.0), packed, scales)
    assert packed.tolist() == [0x77] * 8
    assert scales.tolist() == [126]
    assert kernels.block_maxima(F32.words(b""), F32, maxima[:0]) == (0, 0)


@pytest.mark.parametrize(("elements", "packed", "scales"), [(24, 12, 1), (32, 8, 2), (32, 16, 1)])
def test_sizes_that_do_not_fit_are_refused(elements: int, packed: int, scales: int) -> None:
    steps = thresholds("F32", 1.0)
    words = np.zeros(elements, np.uint32)
    with pytest.raises(ValueError, match=f"{elements} elements into"):
        kernels.quantize_into(
            words,
            np.zeros(elements // 16, np.uint32),
            steps,
            np.zeros(packed, np.uint8),
            np.zeros(scales, np.uint8),
        )


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="F32 comes as flat uint32, not uint16"):
        kernels.block_maxima(np.zeros(16, np.uint16), F32, np.zeros(1, np.uint32))
