"""config.json that contradicts the tensors, or names what mquant cannot read, is named so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from judges import read_json
from make import write_json
from mquant.family_files import load_families
from mquant.findings import Finding
from mquant.synth import Precision, synth
from run import plan_of

FAMILIES = load_families()
Change = Callable[[dict[str, Any]], None]
EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1"


def refusal(folder: Path, precision: Precision, change: Change) -> Finding:
    """Return the refusal of a synthetic release with another quantization config."""
    src = synth(folder / "src", FAMILIES["minimax_m2"], precision=precision).path
    config = read_json(src / "config.json")
    change(config["quantization_config"])
    write_json(src / "config.json", config)
    (finding,) = plan_of(src).refusals
    return finding


def method(name: str) -> Change:
    return lambda config: config.update(quant_method=name)


def bits(number: int) -> Change:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(num_bits=number)


@pytest.mark.parametrize("name", ["awq", "mxfp4", "modelopt"])
@pytest.mark.parametrize(
    ("precision", "stored"),
    [(Precision.MXFP4, "compressed-tensors MXFP4"), (Precision.INT4, "packed integers")],
)
def test_a_method_that_has_another_layout_is_refused(
    tmp_path: Path, precision: Precision, stored: str, name: str
) -> None:
    finding = refusal(tmp_path, precision, method(name))
    assert finding.rule == "method-differs"
    assert finding.message == (
        f"config.json says quant_method {name!r}, but {EXPERT} is stored as {stored} (and 47 more "
        "modules like it)."
    )


def test_bits_that_are_not_those_of_the_codes_are_named(tmp_path: Path) -> None:
    finding = refusal(tmp_path, Precision.INT4, bits(8))
    assert finding.message == (
        f"{EXPERT}.weight_scale is BF16 [64, 4], but must be F32 or BF16 or F16, one for each "
        "group that config.json declares (num_bits 8, group_size 32) of codes [64, 16] (and 47 "
        "more modules like it)."
    )


def test_integers_of_three_bits_are_named(tmp_path: Path) -> None:
    finding = refusal(tmp_path, Precision.INT4, bits(3))
    assert finding.message == (
        'src is already quantized (config.json says "compressed-tensors", format '
        '"pack-quantized", integers, num_bits 3).'
    )


def test_int_quantized_weights_of_other_bits_are_named(tmp_path: Path) -> None:
    finding = refusal(tmp_path, Precision.INT8_CHANNEL, bits(6))
    assert finding.message == (
        'src is already quantized (config.json says "compressed-tensors", format '
        '"int-quantized", integers, num_bits 6).'
    )


def test_fp8_with_one_scale_for_a_weight_is_not_called_fp8_in_blocks(tmp_path: Path) -> None:
    src = synth(tmp_path / "src", FAMILIES["mistral"], precision=Precision.FP8_TENSOR).path
    first, *_ = plan_of(src).findings
    assert first.message.startswith("src is quantized (FP8 per tensor): ")
