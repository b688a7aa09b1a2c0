"""The search finds the best code for every block, and the best global scale for a fused set."""

from itertools import pairwise
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import upstream
from mquant.checkpoint import Folder, open_checkpoint
from mquant.numerics import kernels, nvfp4
from mquant.numerics.floats import (
    BF16,
    E2M1,
    E4M3,
    FLOATS,
    Array,
    Bytes,
    FloatFormat,
    Floats,
)
from mquant.numerics.scale_search import ALIKE, RATIOS, SearchedWeight, search
from mquant.numerics.thresholds import thresholds
from numerics.test_nvfp4 import BLOCKS, QKV, block, normal
from run import TRAINED

DTYPES = pytest.mark.parametrize("dtype", FLOATS)
EVERY_CODE: Final = np.arange(1, 127, dtype=np.uint8)


def weight_of(
    words: Array, float_format: FloatFormat, importance: Floats = ALIKE
) -> SearchedWeight:
    maxima = np.empty(words.size // 16, np.uint32)
    kernels.block_maxima(words.reshape(-1), float_format, maxima)
    return SearchedWeight(words.reshape(-1), float_format, maxima, importance)


def searched(*weights: SearchedWeight) -> tuple[np.float32, list[Bytes]]:
    """Return the fused set's global scale, and each weight's scale codes."""
    sizes = [len(weight.maxima) for weight in weights]
    scale, codes = search(weights, np.empty((2, sum(sizes)), np.uint8))
    return scale, np.split(codes, np.cumsum(sizes)[:-1])


def unit(scale: np.float32) -> float:
    """Return the unit of errors, in which the squares of tiny weights stay normal numbers."""
    return float(4.0 ** np.floor(np.log2(float(scale))))


def largest(*weights: SearchedWeight) -> np.float32:
    return np.float32(
        max(np.abs(w.float_format.values(w.words).astype(np.float32)).max() for w in weights)
    )


def errors(weight: SearchedWeight, codes: Array, scale: np.float32) -> Array:
    """Return every block's error, in float64 and `unit`s, with the reference's elements."""
    x = weight.float_format.values(weight.words).reshape(-1, 16)
    codes = np.broadcast_to(codes, len(x))[:, None]
    q = nvfp4.element_codes(nvfp4.quotients(x, codes, scale))
    decoded = np.where(q & 8, -1.0, 1.0) * E2M1[q & 7] * (E4M3[codes] / scale)
    w = weight.importance.astype(np.float64)
    factors = np.resize(w.reshape(-1, 16), (len(x), 16)) if w.size else 1.0
    difference = (x.astype(np.float64) - decoded) * unit(scale) ** 0.5
    total: Array = np.sum(factors * difference**2, axis=1)
    return total


def of_every_code(weight: SearchedWeight, scale: np.float32) -> Array:
    """Return every block's error under each of the 126 codes, [126, blocks]."""
    return np.stack([errors(weight, code, scale) for code in EVERY_CODE[:, None]])


def assert_best(weight: SearchedWeight, codes: Bytes, scale: np.float32) -> None:
    """Assert that none of the 126 codes has a smaller error in any block, up to F32's rounding."""
    error = errors(weight, codes, scale)
    every = of_every_code(weight, scale)
    rounding = 2.0**-21 * np.sqrt(every.max(axis=0))  # at least 2**-23 of the block's norm
    assert np.all(np.sqrt(error) <= np.sqrt(every.min(axis=0)) + rounding)


@DTYPES
@settings(deadline=None, max_examples=100)
@given(kinds=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6), seed=st.integers(0))
def test_no_code_is_better_for_blocks_of_every_kind(
    dtype: str, kinds: list[str], seed: int
) -> None:
    float_format, rng = FLOATS[dtype], np.random.default_rng(seed)
    weight = weight_of(np.stack([block(kind, float_format, rng) for kind in kinds]), float_format)
    scale, (codes,) = searched(weight)
    assert_best(weight, codes, scale)


@DTYPES
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_no_code_is_better_for_arbitrary_bits(dtype: str, data: st.DataObject) -> None:
    float_format = FLOATS[dtype]
    words = data.draw(st.lists(st.integers(0, float_format.infinity - 1), min_size=32, max_size=32))
    weight = weight_of(np.array(words, float_format.word), float_format)
    scale, (codes,) = searched(weight)
    assert_best(weight, codes, scale)


@DTYPES
@pytest.mark.parametrize("exponent", range(-24, 3, 3))
def test_no_code_is_better_for_blocks_far_below_the_largest(dtype: str, exponent: int) -> None:
    float_format = FLOATS[dtype]
    words = normal((8, 256), dtype, 0.5 * 2.0**exponent, seed=exponent + 30)
    words[0, 0] = np.array([1], float_format.value).view(float_format.word)[0]
    weight = weight_of(words, float_format)
    scale, (codes,) = searched(weight)
    assert_best(weight, codes, scale)


def test_untried_codes_cannot_be_the_best() -> None:
    """For any other 15 weights, some tried code costs less than a cut of 0.35 of the largest.

    So a code that cuts off more than 0.35 of the largest weight costs more than a tried code. The
    test takes the positions of a / 6 between two codes in slices. Multiplicative weights find a
    mixture of codes. The bound of the mixture's cost is exact: between the points where an element
    rounds to its next value, the cost is a sum of parabolas.
    """
    for code in range(64, 72):  # one octave
        first, last = (E4M3[code - 1] + E4M3[code]) / 2, (E4M3[code] + E4M3[code + 1]) / 2
        for low, high in pairwise(np.linspace(first, last, 9)):
            tried = E4M3[code - 5 : code + 8].astype(float)
            tried = tried[tried >= 0.65 * high]
            assert cost_at_most(tried, 6 * low, 6 * high) < (0.35 * 6 * low) ** 2


def cost_at_most(scales: Array, low: float, high: float) -> float:
    """Return a bound of the best scale's cost, if the largest weight is from `low` to `high`."""
    edges = np.outer(scales, (E2M1[:-1] + E2M1[1:]) / 2).ravel()
    x = np.concatenate([[0, low, high], edges[edges < high]])
    near = np.abs(x[:, None, None] - np.outer(scales, E2M1)).min(axis=2) ** 2
    largest = np.flatnonzero(x >= low)
    mixture, total, bound = np.ones(len(scales)), np.zeros(len(scales)), np.inf
    for _ in range(500):
        mixture /= mixture.sum()
        total += mixture
        costs = near @ (total / total.sum())
        bound = min(bound, 15 * costs.max() + costs[largest].max())
        costs = near @ mixture
        worst = 15 * near[costs.argmax()] + near[largest[costs[largest].argmax()]]
        mixture = mixture * np.exp(-0.01 * worst / scales.min() ** 2)
    return bound


@DTYPES
def test_no_other_global_scale_of_an_octave_is_better(dtype: str) -> None:
    weights = [weight_of(normal((40, 64), dtype, 0.02, i), FLOATS[dtype]) for i in range(2)]
    scale, codes = searched(*weights)
    first = np.float32(BF16.value.type(2688 / largest(*weights)))
    tried = [np.float32(BF16.value.type(first / np.float32(ratio))) for ratio in RATIOS]
    best = [sum(of_every_code(w, g).min(axis=0).sum() / unit(g) for w in weights) for g in tried]
    total = sum(
        errors(w, c, scale).sum() / unit(scale) for w, c in zip(weights, codes, strict=True)
    )
    assert total <= min(best) * (1 + 1e-5)
    assert len({f"{error:.6g}" for error in best}) > 8  # the choice of the global scale matters


@DTYPES
def test_global_scales_are_bf16_numbers_whatever_the_weights_are(dtype: str) -> None:
    for seed in range(8):
        scale, _ = searched(weight_of(normal((8, 64), dtype, 0.02, seed), FLOATS[dtype]))
        assert scale == np.float32(BF16.value.type(scale))
        # ModelOpt stores the reciprocal: the reciprocal of the reciprocal, in BF16, is the scale.
        assert BF16.value.type(np.float32(1) / (np.float32(1) / scale)) == scale


def test_a_block_far_above_all_others_may_have_every_code() -> None:
    """The block is outside of the sample, and its error is most of the tensor's error."""
    words = normal((640, 1024), "BF16", 0.001, seed=3)
    words[2, :16] = np.resize([1, 0.75, 0.375], 16).astype(BF16.value).view(BF16.word)
    scale, (codes,) = searched(weight_of(words, BF16))
    # The weights are 4, 3 and 1.5 times 0.25, which is 1.5 times min-max's scale of 1/6.
    assert E4M3[codes[128]] / scale == pytest.approx(0.25, rel=1 / 16)
    assert nvfp4.global_scale([BF16.values(words)]) / scale >= 6 / 3.5


@DTYPES
def test_the_search_is_never_worse_than_min_max(dtype: str) -> None:
    for seed in range(4):
        weight = weight_of(normal((64, 256), dtype, 0.02, seed), FLOATS[dtype])
        values = weight.float_format.values(weight.words).reshape(64, 256)
        minmax = nvfp4.global_scale([values])
        _, minmax_codes = nvfp4.quantize(values, minmax)
        scale, (codes,) = searched(weight)
        error = errors(weight, codes, scale).sum() / unit(scale)
        assert error < 0.8 * errors(weight, minmax_codes.ravel(), minmax).sum() / unit(minmax)


def test_weights_that_min_max_stores_exactly_keep_its_scales() -> None:
    points = np.resize([*E2M1, *-E2M1], (4, 64)) * np.array([[1], [2], [8], [448]])
    weight = weight_of(points.astype(BF16.value).view(BF16.word), BF16)
    scale, (codes,) = searched(weight)
    assert scale == 1
    assert codes.reshape(4, 4).tolist() == [[56] * 4, [64] * 4, [80] * 4, [126] * 4]
    assert errors(weight, codes, scale).sum() == 0


def test_blocks_of_zeros_keep_min_max_scale() -> None:
    words = normal((2, 64), "BF16", 1, seed=1)
    words[1] = 0
    _, (codes,) = searched(weight_of(words, BF16))
    assert codes[4:].tolist() == [nvfp4.SCALE_OF_ZERO] * 4
    _, (codes,) = searched(weight_of(words[1:], BF16))
    assert codes.tolist() == [nvfp4.SCALE_OF_ZERO] * 4


# --- importance


def test_errors_count_by_the_importance_of_their_columns() -> None:
    words = normal((64, 256), "BF16", 0.02, seed=5)
    importance = np.random.default_rng(5).lognormal(0, 2, 256).astype(np.float32)
    plain, weighed = weight_of(words, BF16), weight_of(words, BF16, importance)
    plain_scale, (plain_codes,) = searched(plain)
    scale, (codes,) = searched(weighed)
    assert (codes != plain_codes).mean() > 0.3
    error = errors(weighed, codes, scale).sum() / unit(scale)
    assert error < 0.9 * errors(weighed, plain_codes, plain_scale).sum() / unit(plain_scale)


@DTYPES
def test_no_code_that_keeps_the_largest_weight_is_better(dtype: str) -> None:
    importance = np.random.default_rng(4).lognormal(0, 3, 240).astype(np.float32)
    words = normal((64, 240), dtype, 0.02, seed=4)  # 15 blocks a row
    weight = weight_of(words, FLOATS[dtype], importance)
    scale, (codes,) = searched(weight)
    every = of_every_code(weight, scale)
    amax = np.abs(weight.float_format.values(words).astype(np.float32)).reshape(-1, 16).max(axis=1)
    every[6 * (E4M3[EVERY_CODE] / scale)[:, None] < 0.65 * amax] = np.inf
    assert np.all(errors(weight, codes, scale) <= every.min(axis=0) * (1 + 1e-4))


@pytest.mark.parametrize("importance", [0, 1, 3e-38, 3e38])
def test_equal_importance_changes_nothing(importance: float) -> None:
    words = normal((8, 256), "BF16", 0.02, seed=6)
    plain = searched(weight_of(words, BF16))
    same = searched(weight_of(words, BF16, np.full(256, importance, np.float32)))
    assert plain[0] == same[0]
    assert np.array_equal(plain[1], same[1])


def test_no_weight_is_cut_off_even_if_its_importance_is_0() -> None:
    x = BF16.values(normal((2048, 16), "BF16", 0.02, seed=7)).astype(np.float32)
    x[:, 3] *= 4
    words = x.astype(BF16.value).view(BF16.word)
    importance = np.ones(16, np.float32)
    importance[3] = 0
    weight = weight_of(words, BF16, importance)
    scale, (codes,) = searched(weight)
    amax = np.abs(BF16.values(words).astype(np.float32)).max(axis=1)
    kept = 6 * E4M3[codes] / scale / amax
    assert 0.65 <= kept.min() < 0.7


# --- the search and the packing


def test_two_searches_return_the_same_bytes() -> None:
    words = normal((512, 1040), "BF16", 0.02, seed=8)
    first, second = searched(weight_of(words, BF16)), searched(weight_of(words.copy(), BF16))
    assert first[0] == second[0]
    assert np.array_equal(first[1], second[1])


@DTYPES
def test_elements_are_packed_as_the_reference_rounds_them(dtype: str) -> None:
    float_format, words = FLOATS[dtype], normal((130, 1040), dtype, 1.0, seed=9)
    codes = np.random.default_rng(9).integers(1, 127, 130 * 65).astype(np.uint8)
    packed = np.empty(words.size // 2, np.uint8)
    kernels.pack_into(words.reshape(-1), thresholds(dtype, 600.0), codes, packed)
    x = float_format.values(words).reshape(-1, 16)
    elements = nvfp4.element_codes(nvfp4.quotients(x, codes[:, None], np.float32(600)))
    assert np.array_equal(packed.reshape(-1, 8), elements[:, ::2] | elements[:, 1::2] << 4)
    with pytest.raises(ValueError, match="135200 elements into"):
        kernels.pack_into(words.reshape(-1), thresholds(dtype, 600.0), codes[1:], packed)


# --- compared with upstream


def test_compressed_tensors_decodes_the_searched_weights() -> None:
    words = normal((48, 128), "BF16", 0.02, seed=10)
    weight = weight_of(words, BF16)
    scale, (codes,) = searched(weight)
    packed = np.empty(words.size // 2, np.uint8)
    kernels.pack_into(weight.words, thresholds("BF16", float(scale)), codes, packed)
    expected = upstream.decompressed(
        upstream.Quantized(packed.reshape(48, 64), codes.reshape(48, 8), scale)
    )
    elements = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, 16)
    values = np.where(elements & 8, -1, 1) * E2M1[elements & 7]
    decoded = values.astype(np.float32) * (E4M3[codes] / scale)[:, None]
    assert np.array_equal(expected.float().numpy().reshape(-1, 16), decoded.astype(BF16.value))


@pytest.mark.upstream
@pytest.mark.parametrize(
    "names",
    [
        tuple(f"self_attn.{name}" for name in QKV),
        ("self_attn.o_proj",),
        ("block_sparse_moe.experts.1.w1", "block_sparse_moe.experts.1.w3"),
        ("block_sparse_moe.experts.1.w2",),
    ],
)
def test_no_tensor_is_worse_than_with_llmcompressor_s_expanded_mse(names: tuple[str, ...]) -> None:
    checkpoint = open_checkpoint(Folder(TRAINED))
    infos = [checkpoint.tensors[f"model.layers.1.{name}.weight"] for name in names]
    words = [
        np.frombuffer(checkpoint.source.read(i.shard, i.start, i.end), "<u2").reshape(i.shape)
        for i in infos
    ]
    last = tuple(name.rpartition(".")[2] for name in names)
    members = [(matrix, info.dtype) for matrix, info in zip(words, infos, strict=True)]
    expected = upstream.fused(last, members, "nvfp4_expanded_mse")
    weights = [
        weight_of(matrix.copy(), FLOATS[i.dtype]) for matrix, i in zip(words, infos, strict=True)
    ]
    scale, codes = searched(*weights)
    for weight, code, other in zip(weights, codes, expected, strict=True):
        error = errors(weight, code, scale).sum() / unit(scale)
        expected_error = errors(weight, other.scales.reshape(-1), other.global_scale).sum()
        assert error < expected_error / unit(other.global_scale)
