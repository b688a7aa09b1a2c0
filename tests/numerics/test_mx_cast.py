"""MXFP4 becomes NVFP4 with equal weights, as compressed-tensors decompresses both."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from mquant.numerics.floats import BF16, E2M1, E4M3
from mquant.numerics.mx_cast import (
    CastBlocks,
    MXWeight,
    Span,
    Window,
    cast_into,
    infinite,
    scale_span,
    span,
    window,
)

pytestmark = pytest.mark.upstream

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]
EVEN = 0x22  # two codes of 1.0, which can be halved once and doubled twice
FULL = 0x71  # 0.5 and 6: no octave to spare


def weight(scales: Any, codes: Any = FULL) -> MXWeight:
    """Return a weight with these E8M0 scales; `codes`: a byte for each block, or all 16 of each."""
    of_blocks = np.asarray(scales, np.uint8).reshape(-1)
    bytes_of_blocks = np.asarray(codes, np.uint8)
    if bytes_of_blocks.size == of_blocks.size:
        bytes_of_blocks = bytes_of_blocks.reshape(-1, 1)
    packed = np.broadcast_to(bytes_of_blocks, (of_blocks.size, 16)).copy()
    return MXWeight(packed.reshape(-1), of_blocks)


def decompressed(preset: str, tensors: dict[str, Any], columns: int) -> Words:
    """Return the BF16 bits of compressed-tensors' own decompression."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    name = "mxfp4-pack-quantized" if preset == "MXFP4A16" else "nvfp4-pack-quantized"
    state = {key: torch.from_numpy(value) for key, value in tensors.items()}
    state["weight_packed"] = state["weight_packed"].reshape(-1, columns // 2)
    state["weight_scale"] = state["weight_scale"].reshape(len(state["weight_packed"]), -1)
    if preset == "NVFP4A16":
        state["weight_scale"] = state["weight_scale"].view(torch.float8_e4m3fn)
    values = BaseCompressor.get_value_from_registry(name).decompress(state, scheme)["weight"]
    words: Words = values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
    return words.reshape(-1)


def source_words(source: MXWeight) -> Words:
    """Return the source's numbers."""
    tensors = {"weight_packed": source.packed.copy(), "weight_scale": source.scales.copy()}
    return decompressed("MXFP4A16", tensors, 32)


def cast(*members: MXWeight) -> tuple[list[Bytes], Window, list[CastBlocks], list[Words]]:
    """Cast a fused set; return block scales, window, counts and the numbers of the result."""
    copies = [MXWeight(each.packed.copy(), each.scales) for each in members]
    under = window(copies, [span(each) for each in copies])
    scales = [np.empty(each.scales.size * 2, np.uint8) for each in copies]
    counts = [cast_into(each, under, own) for each, own in zip(copies, scales, strict=True)]
    made = [
        decompressed(
            "NVFP4A16",
            {
                "weight_packed": each.packed,
                "weight_scale": own,
                "weight_global_scale": np.array([under.global_scale], np.float32),
            },
            32,
        )
        for each, own in zip(copies, scales, strict=True)
    ]
    return scales, under, counts, made


def unequal(source: MXWeight, made: Words) -> int:
    """Return how many blocks of 16 have a weight that is not the source's."""
    return int((source_words(source) != made).reshape(-1, 16).any(axis=1).sum())


def test_a_set_of_14_octaves_keeps_its_codes_and_has_normal_block_scales() -> None:
    source = weight(np.arange(120, 135))
    before = source.packed.copy()
    scales, under, (counts,), (made,) = cast(source)
    assert unequal(source, made) == 0
    assert counts == CastBlocks(30)
    assert (source.packed == before).all()
    assert E4M3[scales[0]].min() == 2.0**-6
    assert E4M3[scales[0]].max() == 2.0**8
    assert under.plain


@pytest.mark.parametrize(("octaves", "subnormal"), [(15, 2), (16, 4), (17, 6)])
def test_a_set_of_17_octaves_is_equal_with_subnormal_block_scales(
    octaves: int, subnormal: int
) -> None:
    source = weight(np.arange(100, 101 + octaves))
    scales, under, (counts,), (made,) = cast(source)
    assert unequal(source, made) == 0
    assert counts == CastBlocks(2 * (octaves + 1), 0, subnormal)
    assert E4M3[scales[0]].min() == np.float32(2.0 ** (8 - octaves))
    assert not under.plain


def test_blocks_beyond_17_octaves_take_the_nearest_numbers_of_the_smallest_scale() -> None:
    source = weight(np.arange(100, 122))
    scales, under, (counts,), (made,) = cast(source)
    assert counts == CastBlocks(44, 8, 6)
    assert (source_words(source) == made)[4 * 32 :].all()
    assert (E4M3[scales[0][:8]] == np.float32(2.0**-9)).all()
    values, rounded = BF16.values(source_words(source))[: 4 * 32], BF16.values(made)[: 4 * 32]
    numbers = np.concatenate([E2M1, -E2M1]) * np.float32(2.0**-9) / under.global_scale
    nearest = np.abs(values[:, None] - numbers).min(axis=1)
    assert (np.abs(values - rounded) == nearest).all()


def test_one_octave_too_much_costs_a_part_of_a_block_and_not_all_of_it() -> None:
    source = weight([109, 127], FULL)  # 18 octaves
    _, _, (counts,), (made,) = cast(source)
    assert counts.requantized == 2
    values, rounded = BF16.values(source_words(source))[:32], BF16.values(made)[:32]
    assert np.linalg.norm(values - rounded) < 0.1 * np.linalg.norm(values)


def test_members_of_a_fused_set_share_one_global_scale() -> None:
    gate, up = weight(np.arange(110, 118)), weight(np.arange(118, 125))
    _, under, counts, made = cast(gate, up)
    assert [unequal(gate, made[0]), unequal(up, made[1])] == [0, 0]
    assert counts == [CastBlocks(16), CastBlocks(14)]
    assert under.global_scale == 2.0 ** (8 - (124 - 127))


def test_blocks_of_zeros_do_not_count() -> None:
    """Plus and minus zero; and the scales of such blocks are normal numbers."""
    source = weight([0, 120, 121, 254], [0x80, FULL, FULL, 0x08])
    scales, under, (counts,), (made,) = cast(source)
    assert unequal(source, made) == 0
    assert counts == CastBlocks(8)
    assert under.plain
    assert E4M3[scales[0]].min() >= 2.0**-6


def test_a_weight_of_zeros_is_cast() -> None:
    source = weight([0, 127, 254], 0x80)
    _, under, (counts,), (made,) = cast(source)
    assert unequal(source, made) == 0
    assert under.global_scale == np.float32(1)
    assert counts == CastBlocks(6)


def test_a_block_with_small_codes_is_doubled_so_that_no_block_is_requantized() -> None:
    source = weight(np.array([100, 118, 118]), [FULL, 0x33, EVEN])
    _, _, (counts,), (made,) = cast(source)
    assert unequal(source, made) == 0
    assert counts == CastBlocks(6, 0, 2)


def test_a_block_without_halves_is_halved_so_that_no_block_is_requantized() -> None:
    source = weight(np.array([100, 118]), [0x46, FULL])
    _, _, (counts,), (made,) = cast(source)
    assert unequal(source, made) == 0
    assert counts == CastBlocks(4, 0, 2)


def test_moved_codes_can_keep_a_set_safe_for_marlin() -> None:
    source = weight(np.array([100, 115]), [FULL, 0x11])
    _, under, (counts,), (made,) = cast(source)
    assert unequal(source, made) == 0
    assert counts == CastBlocks(4)
    assert not under.plain


@pytest.mark.parametrize("code", range(253))
def test_every_exponent_is_equal(code: int) -> None:
    random = np.random.default_rng(code)
    source = weight(np.full(8, code), random.integers(0, 256, (8, 16)))
    _, under, (counts,), (made,) = cast(source)
    assert unequal(source, made) == 0
    assert counts.requantized == 0
    assert np.isfinite(np.float32(1) / under.global_scale)


def test_the_codes_of_nan_are_counted() -> None:
    assert span(weight([255, 3, 255], [0, FULL, FULL])) == Span(3, 255, 2)
    assert scale_span(np.array([255, 3, 9], np.uint8)) == Span(3, 255, 1)


def test_numbers_beyond_bf16_are_counted() -> None:
    source = weight([254, 253, 252], [0x43, 0x65, 0x77])  # 2 and 1.5; 4 and 3; 6 and 6
    assert infinite(source) == 16 + 16
    assert np.isinf(BF16.values(source_words(source)).astype(np.float32)).sum() == 32


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_weight_of_a_block_that_is_not_requantized_is_equal(data: st.DataObject) -> None:
    """Scales at random, near each other, far apart and at both ends; sparse and dense blocks."""
    low = data.draw(st.integers(0, 250))
    high = data.draw(st.sampled_from([low, low + 14, low + 15, low + 17, low + 18, low + 40, 252]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    members = []
    for _ in range(data.draw(st.integers(1, 3))):
        scales = random.integers(low, max(low, min(high, 252)) + 1, 24, np.uint8)
        codes = random.integers(0, 256, (24, 16), np.uint8)
        codes &= random.choice(np.array([0x00, 0x11, 0x33, 0x66, 0x77, 0xFF], np.uint8), (24, 1))
        members.append(weight(scales, codes))
    if any(map(infinite, members)):
        return
    _, under, counts, made = cast(*members)
    for source, count, words in zip(members, counts, made, strict=True):
        assert unequal(source, words) <= count.requantized
        assert count.blocks == 48
    scales = np.concatenate([each.scales for each in members])
    spans = [each for each in map(span, members) if each.lowest <= each.highest]
    octaves = max(s.highest for s in spans) - min(s.lowest for s in spans) if spans else 0
    if octaves <= 17:
        assert sum(count.requantized for count in counts) == 0
    assert under.plain == (octaves <= 14)
