"""The verifier decodes weights as ml_dtypes and compressed-tensors do."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mquant.weights.decode import E2M1, e2m1, e4m3, floats, integers, scaled


def test_every_e4m3_code_equals_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(e4m3(codes), codes.view(ml_dtypes.float8_e4m3fn).astype("f4"))


def test_every_e2m1_code_equals_ml_dtypes() -> None:
    codes = np.arange(16, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(e2m1(codes * np.uint8(17))[::2], expected)
    np.testing.assert_array_equal(expected[:8], E2M1)


def test_the_even_element_is_in_the_low_nibble() -> None:
    assert e2m1(np.array([[0x72, 0xF1]], np.uint8)).tolist() == [[1, 6, 0.5, -6]]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_floats_equal_ml_dtypes(dtype: str) -> None:
    kinds: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": "f2", "F32": "f4", "F64": "f8"}
    values = np.random.default_rng(0).standard_normal(100).astype(kinds[dtype])
    np.testing.assert_array_equal(floats(values.tobytes(), dtype), values.astype(np.float32))


def test_scales_of_blocks_cover_incomplete_blocks() -> None:
    values, scales = np.ones((3, 5), np.float32), np.array([[1, 2], [3, 4]], np.float32)
    expected = [[1, 1, 1, 1, 2], [1, 1, 1, 1, 2], [3, 3, 3, 3, 4]]
    assert scaled(values, scales, (2, 4)).tolist() == expected


@pytest.mark.upstream
def test_nvfp4_codes_equal_compressed_tensors_unpacking() -> None:
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    packed = np.random.default_rng(0).integers(0, 256, (8, 32), np.uint8)
    expected = unpack_fp4_from_uint8(torch.from_numpy(packed), 8, 64, dtype=torch.float32)
    np.testing.assert_array_equal(e2m1(packed), expected.numpy())


@pytest.mark.upstream
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_equal_compressed_tensors_unpacking(bits: int) -> None:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    values = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (4, 32))
    packed = pack_to_int32(torch.from_numpy(values.astype(np.int8)), bits).numpy()
    np.testing.assert_array_equal(integers(packed, bits), values)
