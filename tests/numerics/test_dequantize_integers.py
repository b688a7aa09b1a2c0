"""mquant dequantizes integers to the BF16 of compressed-tensors' `decompress`, bit for bit."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from mquant.numerics.dequantize import decode_fp8, decode_integers
from mquant.numerics.floats import E8M0
from mquant.weights.decode import integers

pytestmark = pytest.mark.upstream

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Scales whose products round, overflow, or become subnormal or 0.
HARD = [1.0, 1 / 3, 1.00390625, 3e38, 60000.0, 6e-8, 1e-37, 2.0**-133, 1e-45, 0.0, -0.7]


def bits_of(tensor: torch.Tensor) -> npt.NDArray[np.uint16]:
    """Return the patterns of numbers in BF16, with one pattern for all NaN."""
    words = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
    return np.where((words & 0x7FFF) > 0x7F80, np.uint16(0x7FC0), words)


def upstream(state: dict[str, Any], compressor: str, **args: Any) -> npt.NDArray[np.uint16]:
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights = QuantizationArgs(**args)
    decompressed = BaseCompressor.get_value_from_registry(compressor).decompress(state, scheme)
    return bits_of(decompressed["weight"])


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 19),
    groups=st.integers(1, 4),
    wide=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from(sorted(DTYPES)),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_integers_equal_the_decompression_of_compressed_tensors(
    bits: int, rows: int, groups: int, wide: int, dtype: str, symmetric: bool, seed: int
) -> None:
    random, half = np.random.default_rng(seed), 1 << (bits - 1)

    def codes(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.integers(-half, half, shape, np.int8))

    weight, zeros = codes(rows, groups * wide), codes(rows, groups)
    scales = torch.from_numpy(random.choice(HARD, (rows, groups))).to(DTYPES[dtype])
    packed = pack_to_int32(weight, bits)
    state = {
        "weight_packed": packed,
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        state["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0).contiguous()
    args = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": wide}
    expected = upstream(state, "pack-quantized", symmetric=symmetric, **args)
    own = scales if dtype == "f16" else scales.float()
    words = np.empty(weight.numel(), np.uint16)
    decode_integers(
        packed.numpy().view(np.uint8),
        bits,
        own.numpy(),
        np.zeros((rows, groups), np.int8) if symmetric else zeros.numpy(),
        wide,
        words,
    )
    assert (words.reshape(expected.shape) == expected).all()
    assert (integers(packed.numpy(), bits) == weight.numpy()).all()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_mxfp8_equals_the_decompression_of_compressed_tensors(
    rows: int, groups: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, (rows, groups * 32), np.uint8)
    scales = random.integers(0, 255, (rows, groups), np.uint8)
    scales.flat[0] = random.choice([0, 254])
    state = {
        "weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
        "weight_scale": torch.from_numpy(scales),
    }
    args = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}
    expected = upstream(state, "mxfp8-quantized", **args)
    words = np.empty(codes.size, np.uint16)
    decode_fp8(codes, E8M0[scales], (1, 32), 0, words)
    assert (words.reshape(codes.shape) == expected).all()


@pytest.mark.parametrize(
    ("scales", "words", "message"),
    [((2, 3), 128, "groups"), ((2, 2), 127, "codes into")],
)
def test_arrays_that_do_not_fit_each_other_are_refused(
    scales: tuple[int, int], words: int, message: str
) -> None:
    table, zeros = np.ones(scales, np.float32), np.zeros(scales, np.int8)
    with pytest.raises(ValueError, match=message):
        decode_integers(
            np.zeros((2, 32), np.uint8), 4, table, zeros, 32, np.empty(words, np.uint16)
        )
