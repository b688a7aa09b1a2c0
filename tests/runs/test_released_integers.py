"""Packed integers with zero points, with an order of the columns, and of two config groups."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges import opened, read_json
from make import Row
from mquant.checkpoint import Folder
from mquant.errors import SourceError
from mquant.synth import Precision
from mquant.verify.judge import Depth, verify
from mutate import changed, mutated, setting
from released import FAMILIES, bf16_plan, dequantized, loaded, source, stored, words


def with_zeros_and_order(rows: list[Row]) -> list[Row]:
    """Return packed integers of 4 bits with random zero points, and a random order of columns."""
    random, more = np.random.default_rng(7), list[Row]()
    for name, dtype, shape, raw in rows:
        module = name.removesuffix(".weight_packed")
        if module == name:
            more.append((name, dtype, shape, raw))
            continue
        groups = shape[1] * 8 // 32
        zeros = random.integers(0, 2**32, (-(-shape[0] // 8), groups), np.uint32)
        order = random.permutation(np.repeat(np.arange(groups, dtype=np.int32), 32))
        more += [
            (name, dtype, shape, raw),
            (f"{module}.weight_zero_point", "I32", zeros.shape, zeros.tobytes()),
            (f"{module}.weight_g_idx", "I32", order.shape, order.tobytes()),
        ]
    return more


def asymmetric(config: dict[str, Any]) -> dict[str, Any]:
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    return config


@pytest.mark.upstream
def test_each_column_has_the_scale_and_zero_point_of_its_group(tmp_path: Path) -> None:
    """Upstream decompresses the columns in the order of their groups."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    plain = source(tmp_path / "src", Precision.INT4)
    config = asymmetric(read_json(plain / "config.json"))
    src = mutated(plain, tmp_path, edit=with_zeros_and_order, config=config)
    ours, tensors = loaded(dequantized(src, tmp_path / "ours")), loaded(src)
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=32, symmetric=False
    )
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, packed in tensors.items():
        if not name.endswith(".weight_packed"):
            continue
        module = name.removesuffix(".weight_packed")
        parts = {end: tensors[f"{module}.weight_{end}"] for end in ("scale", "shape", "zero_point")}
        columns = torch.argsort(tensors[f"{module}.weight_g_idx"], stable=True)
        codes = unpack_from_int32(packed, 4, torch.Size(parts["shape"].tolist()))
        state = {f"weight_{end}": value for end, value in parts.items()}
        state["weight_packed"] = pack_to_int32(codes[:, columns].contiguous(), 4)
        made = compressor.decompress(state, scheme)["weight"]
        expected = torch.empty_like(made)
        expected[:, columns] = made
        assert (words(ours[f"{module}.weight"]) == words(expected)).all()
    report = verify(Folder(tmp_path / "ours"), FAMILIES, Depth.FULL, Folder(src))
    assert {f.rule for f in report.findings if f.severity == "error"} == set()


def test_an_order_beyond_the_groups_is_refused(tmp_path: Path) -> None:
    plain = source(tmp_path / "src", Precision.INT4)
    config = asymmetric(read_json(plain / "config.json"))
    src = mutated(plain, tmp_path, edit=with_zeros_and_order, config=config)
    name = next(name for name in opened(src).tensors if name.endswith("g_idx"))
    bad = mutated(src, tmp_path / "again", edit=changed(name, data=setting(0, 99)))
    with pytest.raises(SourceError, match=f"{name} holds 99; there are . groups"):
        dequantized(bad, tmp_path / "out")


def test_zero_points_that_config_json_does_not_declare_are_refused(tmp_path: Path) -> None:
    src = mutated(source(tmp_path / "src", Precision.INT4), tmp_path, edit=with_zeros_and_order)
    (refusal,) = bf16_plan(src).refusals
    assert "must be left out: config.json says that the integers are symmetric" in refusal.message


def in_eight_bits(rows: list[Row]) -> list[Row]:
    """Return packed integers with those of down_proj in 8 bits and groups of 16.

    The shapes of codes and scales are also those of 4 bits, and groups of 32, of twice the columns.
    """
    made = list[Row]()
    for name, dtype, shape, raw in rows:
        if "down_proj" in name and name.endswith(("weight_packed", "weight_scale")):
            made.append((name, dtype, (shape[0], shape[1] * 2), raw * 2))
        else:
            made.append((name, dtype, shape, raw))
    return made


def in_wider_groups(rows: list[Row]) -> list[Row]:
    """Return packed integers with those of down_proj in 8 bits, under the same scales."""
    return [
        (name, dtype, (shape[0], shape[1] * 2), raw * 2)
        if "down_proj" in name and name.endswith("weight_packed")
        else (name, dtype, shape, raw)
        for name, dtype, shape, raw in rows
    ]


def test_integers_of_four_and_eight_bits_are_read_by_both_decoders(tmp_path: Path) -> None:
    plain = source(tmp_path / "src", Precision.INT4)
    config = read_json(plain / "config.json")
    groups = config["quantization_config"]["config_groups"]
    eight = {**groups["group_0"]["weights"], "num_bits": 8}
    groups["group_1"] = {**groups["group_0"], "targets": ["re:.*down_proj"], "weights": eight}
    src = mutated(plain, tmp_path, edit=in_wider_groups, config=config)
    out = dequantized(src, tmp_path / "out")
    report = verify(Folder(out), FAMILIES, Depth.FULL, Folder(src))
    assert {f.rule for f in report.findings if f.severity != "info"} == set()


def test_the_targets_tell_which_of_two_groups_a_module_has(tmp_path: Path) -> None:
    plain = source(tmp_path / "src", Precision.INT4)
    config = read_json(plain / "config.json")
    groups = config["quantization_config"]["config_groups"]
    weights = groups["group_0"]["weights"]
    groups["group_0"]["targets"] = [r"re:.*(gate|up)_proj"]
    eight = {**weights, "num_bits": 8, "group_size": 16}
    groups["group_1"] = {**groups["group_0"], "targets": ["re:.*down_proj"], "weights": eight}
    src = mutated(plain, tmp_path, edit=in_eight_bits, config=config)
    bits = {(weight.bits, "down_proj" in info.name) for info, weight in stored(src)}
    assert bits == {(4, False), (8, True)}
    out = dequantized(src, tmp_path / "out")
    assert not any(f.severity == "error" for f in verify(Folder(out), FAMILIES).findings)
