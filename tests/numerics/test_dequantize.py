"""mquant dequantizes codes and scales to the BF16 of compressed-tensors and ModelOpt."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

from mquant.numerics.dequantize import decode_fp4, decode_fp8, mxfp4_table, nvfp4_table
from mquant.numerics.floats import E2M1

pytestmark = pytest.mark.upstream

Words = npt.NDArray[np.uint16]

ALL = np.arange(256, dtype=np.uint8)
# Scales whose products round, overflow, or become subnormal or 0, and scales that BF16 lacks.
HARD = np.array(
    [
        1,
        0.02 / 100,
        1 / 3,
        1.00390625,
        3e38,
        7e35,
        1e-37,
        2.0**-133,
        1e-45,
        0,
        -0.7,
        np.inf,
        np.nan,
    ],
    np.float32,
)


def bits(tensor: torch.Tensor) -> Words:
    """Return BF16 bit patterns, with one pattern for all NaN.

    The pattern of upstream's NaN depends on its place in the vector.
    """
    assert tensor.dtype is torch.bfloat16
    words: Words = tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return np.where((words & 0x7FFF) > 0x7F80, np.uint16(0x7FC0), words)


def fp8(codes: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn)


def decoded(codes: npt.NDArray[np.uint8], scales: npt.NDArray[Any], high: int, wide: int) -> Words:
    words = np.empty(codes.size, np.uint16)
    decode_fp8(codes, scales, (high, wide), 0, words)
    return words.reshape(codes.shape)


def test_every_fp8_code_under_hard_scales_equals_fp8blockdequantizers() -> None:
    codes = np.tile(ALL, (len(HARD), 1))
    scales = np.repeat(HARD[:, None], 2, axis=1)
    expected = FP8BlockDequantizer(weight_block_size=(1, 128))._create_dequantized_weight(
        fp8(codes), torch.from_numpy(scales)
    )
    assert (decoded(codes, scales, 1, 128) == bits(expected)).all()


@pytest.mark.parametrize("shape", [(3072, 1536), (200, 300), (1, 129), (128, 128), (130, 16)])
def test_blocks_that_do_not_fill_the_weight_equal_fp8blockdequantizers(
    shape: tuple[int, int],
) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, shape, np.uint8)
    blocks = -(-shape[0] // 128), -(-shape[1] // 128)
    scales = random.uniform(1e-5, 1e-3, blocks).astype(np.float32)
    expected = FP8BlockDequantizer()._create_dequantized_weight(
        fp8(codes), torch.from_numpy(scales)
    )
    assert (decoded(codes, scales, 128, 128) == bits(expected)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_fp8_equals_the_decompression_of_compressed_tensors(
    dtype: torch.dtype, strategy: str
) -> None:
    random = np.random.default_rng(1)
    codes = random.integers(0, 256, (64, 256), np.uint8)
    shape, block = {
        "channel": ((64, 1), (1, 256)),
        "tensor": ((1,), (64, 256)),
        "block": ((4, 2), (16, 128)),
    }[strategy]
    scale = torch.from_numpy(random.uniform(1e-4, 1e-2, shape)).to(dtype)
    scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    args = {"num_bits": 8, "type": "float", "strategy": strategy}
    if strategy == "block":
        args["block_structure"] = list(block)
    scheme.weights = QuantizationArgs(**args)
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    state = compressor.decompress({"weight": fp8(codes), "weight_scale": scale}, scheme)
    expected = bits(state["weight"].to(torch.bfloat16))
    own = scale if dtype is torch.float16 else scale.float()
    table = own.numpy().reshape(-1, -(-256 // block[1]))
    assert (decoded(codes, table, *block) == expected).all()


def test_every_fp8_code_under_hard_scales_in_f16_equals_the_decompression() -> None:
    with np.errstate(over="ignore"):
        scales = np.append(HARD, [60000, 147, 6e-8, 1e-5]).astype(np.float16)[:, None]
    codes = np.tile(ALL, (len(scales), 1))
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    state = {"weight": fp8(codes), "weight_scale": torch.from_numpy(scales)}
    scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    expected = compressor.decompress(state, scheme)["weight"].to(torch.bfloat16)
    assert (decoded(codes, scales, 1, 256) == bits(expected)).all()


@pytest.mark.parametrize("second", [1.0, 20736.0, 3.0, 1e-3, 1e38, 2.0**-126])
@pytest.mark.parametrize("modelopt", [False, True])
def test_every_fp4_code_under_every_block_scale_equals_upstreams(
    second: float, modelopt: bool
) -> None:
    """Each row has one of the 256 codes of a block scale, and all 256 bytes of two FP4 codes."""
    packed = np.tile(ALL, (256, 1))
    scales = np.repeat(ALL[:, None], 32, axis=1)
    words = np.empty((256, 512), np.uint16)
    table = nvfp4_table(second, divide=not modelopt)
    decode_fp4(packed.reshape(-1), scales.reshape(-1), table, words.reshape(-1))
    single = torch.tensor([second], dtype=torch.float32)
    if modelopt:  # the formula of ModelOpt's `NVFP4QTensor.dequantize`
        values = torch.from_numpy(np.concatenate([E2M1, -E2M1])).to(torch.bfloat16)
        codes = torch.from_numpy(np.stack([packed & 15, packed >> 4], -1).reshape(256, 32, 16))
        factors = fp8(scales).float() * single
        expected = (values[codes.long()] * factors[..., None]).reshape(256, 512).to(torch.bfloat16)
    else:
        compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
        state = {
            "weight_packed": torch.from_numpy(packed),
            "weight_scale": fp8(scales),
            "weight_global_scale": single,
        }
        expected = compressor.decompress(state, preset_name_to_scheme("NVFP4A16", ["Linear"]))[
            "weight"
        ]
    assert (words == bits(expected)).all()


def test_rows_may_begin_within_a_block() -> None:
    random = np.random.default_rng(2)
    codes = random.integers(0, 256, (300, 64), np.uint8)
    scales = random.uniform(1e-4, 1e-2, (3, 1)).astype(np.float32)
    words = np.empty(50 * 64, np.uint16)
    decode_fp8(codes[240:290], scales[1:], (128, 128), 240 % 128, words)
    assert (words.reshape(50, 64) == decoded(codes, scales, 128, 128)[240:290]).all()


def test_arrays_that_do_not_fit_each_other_are_refused() -> None:
    codes, words = np.zeros((4, 32), np.uint8), np.empty(128, np.uint16)
    with pytest.raises(ValueError, match="scales of"):
        decode_fp8(codes, np.ones((1, 2), np.float32), (128, 128), 0, words)
    with pytest.raises(ValueError, match="codes into"):
        decode_fp8(codes, np.ones((1, 1), np.float32), (128, 128), 0, words[1:])
    with pytest.raises(ValueError, match="scales into"):
        decode_fp4(codes[0], codes[1], nvfp4_table(1.0, divide=True), words[:64])


def mx_scheme(weights: QuantizationArgs) -> Any:
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    scheme.weights = weights
    return scheme


MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}


def mxfp4(packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> Words:
    words = np.empty(packed.size * 2, np.uint16)
    decode_fp4(packed.reshape(-1), scales.reshape(-1), mxfp4_table(), words, 32)
    return words.reshape(len(packed), -1)


def every_mxfp4() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return all bytes of two codes under every scale that is a number: 0 to 254."""
    return np.tile(ALL, (255, 1)), np.repeat(ALL[:255, None], 16, axis=1)


def test_every_mxfp4_code_under_every_scale_equals_compressed_tensors() -> None:
    packed, scales = every_mxfp4()
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    state = {"weight_packed": torch.from_numpy(packed), "weight_scale": torch.from_numpy(scales)}
    expected = compressor.decompress(state, mx_scheme(QuantizationArgs(**MXFP4)))["weight"]
    assert (mxfp4(packed, scales) == bits(expected)).all()


def test_every_mxfp4_code_under_every_scale_equals_what_gpt_oss_unpacks() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed, scales = every_mxfp4()
    blocks = torch.from_numpy(packed.reshape(1, 255, 16, 16))
    unpacked = convert_moe_packed_tensors(blocks, torch.from_numpy(scales[None]))
    assert (mxfp4(packed, scales) == bits(unpacked[0].T)).all()


def test_every_mxfp4_code_under_every_scale_equals_deepseeks() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    packed, scales = every_mxfp4()
    codes = torch.from_numpy(packed.view(np.int8))
    exponents = torch.from_numpy(scales).view(torch.float8_e8m0fnu)
    expected = Fp8Dequantize(None)._dequantize_one(codes, exponents)
    assert (mxfp4(packed, scales) == bits(expected)).all()
