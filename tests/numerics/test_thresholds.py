"""The tables of thresholds agree with upstream for every magnitude and every scale code."""

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

import upstream
from mquant.numerics import nvfp4
from mquant.numerics.floats import FLOATS, Array, Bytes, FloatFormat
from mquant.numerics.thresholds import Thresholds, thresholds

# A power of two, which has exact ties; a usual scale; the smallest and the largest scale.
SCALES = {
    "BF16": (1.0, 4864.0, 7.93e-36, 3.29e38),
    "F16": (1.0, 4864.0, 0.0410, 65472.0),
}
ALL = [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales]


def finite(float_format: FloatFormat) -> Array:
    """Return every finite magnitude of a 16-bit format, in whole blocks."""
    return np.arange(float_format.infinity, dtype=float_format.word)


def global_scale(dtype: str, scale: float) -> np.float32:
    """Return the number of the dtype that is nearest to `scale`."""
    return np.float32(np.array([scale], FLOATS[dtype].value)[0])


def codes_by_thresholds(steps: Thresholds, words: Array, scale: int) -> Bytes:
    """Return the signed E2M1 codes of bit patterns under one block scale, by the table alone."""
    first, *rest = steps.code[scale]
    magnitudes = words & (steps.float_format.sign - 1)
    code = sum((magnitudes >= step).astype(np.uint8) for step in rest)
    signed: Bytes = code | (words >= first).astype(np.uint8) << 3
    return signed


@pytest.mark.parametrize(("dtype", "scale"), ALL)
def test_every_magnitude_under_every_scale_code_equals_upstreams(dtype: str, scale: float) -> None:
    float_format, exact = FLOATS[dtype], global_scale(dtype, scale)
    steps = thresholds(dtype, float(exact))
    words = finite(float_format)
    words[1::2] |= float_format.sign
    signed = np.stack([words, words ^ float_format.sign])
    for scale_codes in np.array_split(np.arange(1, 127, dtype=np.uint8), 3):
        weights = signed[scale_codes % 2]  # every magnitude's sign flips from code to code
        scales = np.repeat(scale_codes[:, None], weights.shape[1] // 16, axis=1)
        expected = upstream.with_scales(weights, dtype, scales, exact)
        for words, code, packed in zip(weights, scale_codes, expected, strict=True):
            codes = codes_by_thresholds(steps, words, int(code))
            assert np.array_equal(codes[::2] | codes[1::2] << 4, packed)


@pytest.mark.parametrize("dtype", SCALES)
def test_every_block_amax_under_many_global_scales_equals_upstreams(dtype: str) -> None:
    float_format = FLOATS[dtype]
    args = preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
    words = finite(float_format)
    amax = upstream.tensor(words[None], dtype)[0]
    random = float_format.values(
        np.random.default_rng(0).integers(1, float_format.infinity, 30, float_format.word)
    )
    scales = [global_scale(dtype, scale) for scale in SCALES[dtype]]
    for exact in [*scales, *(nvfp4.global_scale_of([value]) for value in random)]:
        expected, _ = calculate_qparams(-amax, amax, args, torch.tensor([exact]))
        codes = expected.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        start = thresholds(dtype, float(exact)).start[: float_format.infinity]
        assert np.array_equal(np.where(start == 0, nvfp4.SCALE_OF_ZERO, start), codes)
        assert np.array_equal(nvfp4.block_scales(float_format.values(words), exact), codes)


@pytest.mark.parametrize("dtype", SCALES)
def test_every_amax_gives_upstreams_global_scale(dtype: str) -> None:
    float_format = FLOATS[dtype]
    words = finite(float_format)[:: 5 if dtype == "F16" else 3]
    amaxes = upstream.tensor(words[None], dtype)[0]
    for value, amax in zip(float_format.values(words), amaxes, strict=True):
        expected = generate_gparam(-amax.reshape(1), amax.reshape(1))
        assert nvfp4.global_scale_of([value]) == expected.item()


def test_f32_thresholds_are_where_the_reference_steps() -> None:
    float_format = FLOATS["F32"]
    for scale in (1.0, 4321.123, 7.9e-36, 3.4e38):
        exact = np.float32(scale)
        steps = thresholds("F32", float(exact))
        reached = steps.code[1:, 1:][steps.code[1:, 1:] < float_format.infinity]
        rows, columns = np.nonzero(steps.code[1:, 1:] < float_format.infinity)
        for offset in (0, 1):
            words = (reached - np.uint32(offset)).astype(np.uint32)
            scales = (rows + 1).astype(np.uint8)
            codes = nvfp4.element_codes(nvfp4.quotients(float_format.values(words), scales, exact))
            assert ((codes >= columns + 1) == (offset == 0)).all()
