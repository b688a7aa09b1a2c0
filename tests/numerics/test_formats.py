"""The tables and roundings of number formats are those of ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest

from mquant.numerics.floats import (
    E2M1,
    E4M3,
    FLOATS,
    FloatFormat,
    Floats,
    e2m1_codes,
    e4m3_codes,
)


def decoded(dtype: type, count: int) -> Floats:
    return np.arange(count, dtype=np.uint8).view(dtype).astype(np.float32)


def test_the_tables_are_those_of_ml_dtypes() -> None:
    fp4 = np.arange(8, dtype=np.uint8).astype(ml_dtypes.uint4).view(ml_dtypes.float4_e2m1fn)
    assert E2M1.tolist() == fp4.astype(np.float32).tolist()
    assert E4M3.tolist() == decoded(ml_dtypes.float8_e4m3fn, 127).tolist()


@pytest.mark.parametrize("table", [E2M1, E4M3], ids=["E2M1", "E4M3"])
def test_rounding_goes_to_the_nearest_and_at_ties_to_even(table: Floats) -> None:
    dtype, rounded = (
        (ml_dtypes.float4_e2m1fn, e2m1_codes)
        if len(table) == 8
        else (ml_dtypes.float8_e4m3fn, e4m3_codes)
    )
    middle = (table[1:] + table[:-1]) / 2
    beside = [np.nextafter(middle, np.float32(to)) for to in (0, np.inf)]
    random = np.random.default_rng(0).uniform(0, table[-1], 10_000).astype(np.float32)
    numbers = np.concatenate([table, middle, *beside, random])
    assert np.array_equal(table[rounded(numbers)], numbers.astype(dtype).astype(np.float32))
    assert rounded(np.array([1e9, np.inf], np.float32)).tolist() == [len(table) - 1] * 2


@pytest.mark.parametrize(
    "float_format", FLOATS.values(), ids=lambda float_format: float_format.name
)
def test_magnitudes_are_ordered_like_their_values(float_format: FloatFormat) -> None:
    step = 1 if float_format.word.itemsize == 2 else 65_521
    magnitudes = np.arange(0, float_format.infinity + 1, step).astype(float_format.word)
    values = float_format.values(magnitudes).astype(np.float64)
    assert (np.diff(values) > 0).all()
    assert np.isinf(
        float_format.values(np.array([float_format.infinity], float_format.word)).astype(np.float32)
    ).all()
    assert (
        float_format.words(values.astype(float_format.value).tobytes()).tolist()
        == magnitudes.tolist()
    )
