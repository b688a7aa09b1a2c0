"""A weight at its dtype's maximum becomes llmcompressor's bytes, and `verify` accepts the bytes."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges import data, differences, model_free_ptq, opened, read_json
from make import Row, make_checkpoint, write_json
from mquant.checkpoint import Folder
from mquant.events import Event, Note
from mquant.family_files import load_families
from mquant.numerics.floats import FLOATS
from mquant.plan import DEFAULT_SHARD_BYTES, make_bf16_plan
from mquant.runs.convert import convert
from mquant.runs.quantize import quantize
from mquant.verify.judge import Depth, verify
from run import FIXTURES, TRAINED, plan_of

pytestmark = pytest.mark.upstream

LARGEST = {"BF16": (0x7F7F, "<u2"), "F16": (0x7BFF, "<u2"), "F32": (0x7F7F_FFFF, "<u4")}
SCHEMES = {
    "nvfp4": "NVFP4A16",
    "fp8-dynamic": "FP8_DYNAMIC",
    "fp8-block": "FP8_BLOCK",
    "nvfp4-opt": None,  # llmcompressor has no search of scales
}
KEY = "model.layers.0.self_attn.k_proj"


def largest(dtype: str, modules: tuple[str, ...]) -> Any:
    """Return an edit that puts both signs of the maximum into weights of some modules."""
    bits, word = LARGEST[dtype]
    sign = 0x8000_0000 if word == "<u4" else 0x8000

    def edit(rows: list[Row]) -> None:
        for number, (name, kind, shape, raw) in enumerate(rows):
            if kind == dtype and any(f".{module}.weight" in name for module in modules):
                values = np.frombuffer(bytearray(raw), word)
                values[7], values[shape[1] + 5] = bits, bits | sign
                rows[number] = (name, kind, shape, values.tobytes())

    return edit


def wrong(folder: Path, parent: Path) -> list[str]:
    """Return the errors of `verify --against`."""
    report = verify(Folder(folder), load_families(), Depth.NUMBERS, Folder(parent))
    return [finding.message for finding in report.findings if finding.severity == "error"]


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("recipe", SCHEMES)
def test_a_weight_at_the_maximum_is_no_fault(tmp_path: Path, dtype: str, recipe: str) -> None:
    sizes: Any = {"hidden": 256, "intermediate": 128, "heads": 8, "kv_heads": 4, "head_dim": 32}
    src = make_checkpoint(
        tmp_path / "src", layers=1, experts=2, shards=1, dtype=dtype,
        edit=largest(dtype, ("k_proj",)), **sizes,
    )  # fmt: skip
    out = tmp_path / "out"
    quantize(plan_of(src, recipe), out)

    if scheme := SCHEMES[recipe]:
        expected = model_free_ptq(src, tmp_path / "expected", scheme=scheme)
        assert not differences(out, expected, set(opened(expected).tensors))
    assert not wrong(out, src)
    plan = make_bf16_plan(opened(out), load_families(), max_shard_bytes=DEFAULT_SHARD_BYTES)
    convert(plan, tmp_path / "bf16", "dequantize")
    assert data(opened(tmp_path / "bf16"), f"{KEY}.weight") == decompressed(out)


def decompressed(folder: Path) -> bytes:
    """Return the bytes in BF16 of the weight that compressed-tensors makes of the module KEY."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    table = read_json(folder / "config.json")["quantization_config"]
    scheme = QuantizationConfig.model_validate(table).config_groups["group_0"]
    compressor: Any = BaseCompressor.get_value_from_registry(table["format"])
    (shard,) = folder.glob("*.safetensors")
    state = {
        name.removeprefix(f"{KEY}."): tensor
        for name, tensor in load_file(shard).items()
        if name.startswith(f"{KEY}.")
    }
    weight = compressor.decompress(state, scheme)["weight"].to(torch.bfloat16)
    raw: bytes = weight.contiguous().view(torch.uint8).numpy().tobytes()
    return raw


def test_scales_of_weights_and_inputs_at_the_maximum_are_no_fault(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    src = Path(shutil.copytree(TRAINED, tmp_path / "src"))
    for shard in src.glob("*.safetensors"):
        tensors = {
            name: tensor.to(torch.float16) if tensor.dtype == torch.bfloat16 else tensor
            for name, tensor in load_file(shard).items()
        }
        for name in tensors:
            if re.search(r"\.([qkvo]_proj|w[123])\.weight", name):
                tensors[name][0, 7], tensors[name][1, 5] = 65504.0, -65504.0
        save_file(tensors, shard)
    write_json(src / "config.json", {**read_json(src / "config.json"), "torch_dtype": "float16"})
    recipe = tmp_path / "few.yaml"
    recipe.write_text(
        "name: few\nsuffix: X\nroles: {expert: NVFP4, attention: NVFP4}\n"
        "calibration: {samples: 2, length: 48, seed: 1}\n"
    )
    out = tmp_path / "out"
    quantize(plan_of(src, str(recipe)), out, data=str(FIXTURES / "heldout.txt"))

    assert f"{KEY}.input_global_scale" in opened(out).tensors
    assert not wrong(out, src)
    alone = verify(Folder(out), load_families(), Depth.NUMBERS)
    assert not [finding for finding in alone.findings if finding.severity == "error"]


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_maxima_in_every_weight_are_no_reciprocals(tmp_path: Path, dtype: str) -> None:
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")
    src = make_checkpoint(
        tmp_path / "src", layers=1, experts=2, dtype=dtype, edit=largest(dtype, modules)
    )
    quantize(plan_of(src), tmp_path / "out")

    assert not wrong(tmp_path / "out", src)
    report = verify(Folder(tmp_path / "out"), load_families(), Depth.NUMBERS, None)
    assert "reciprocal" not in " ".join(finding.message for finding in report.findings)


@pytest.mark.parametrize(
    ("dtype", "outlier", "recipe"),
    [("BF16", 3000, "nvfp4"), ("F16", 65504, "nvfp4"), ("F16", 65504, "nvfp4-opt")],
)
def test_an_outlier_in_every_weight_is_clean(
    tmp_path: Path, dtype: str, outlier: float, recipe: str
) -> None:
    def edit(rows: list[Row]) -> None:
        for number, (name, kind, shape, raw) in enumerate(rows):
            if "_proj.weight" in name or ".experts." in name:
                values = np.frombuffer(bytearray(raw), FLOATS[dtype].value)
                values[7] = outlier
                rows[number] = (name, kind, shape, values.tobytes())

    src = make_checkpoint(tmp_path / "src", layers=1, experts=2, dtype=dtype, edit=edit)
    out = tmp_path / "out"
    quantize(plan_of(src, recipe), out)

    for parent in (None, Folder(src)):
        report = verify(Folder(out), load_families(), Depth.NUMBERS, parent)
        assert [f.message for f in report.findings if f.severity != "info"] == []


def test_the_parent_decides_whether_scales_below_1_are_reciprocals(tmp_path: Path) -> None:
    def edit(rows: list[Row]) -> None:
        for number, (name, kind, shape, raw) in enumerate(rows):
            if "_proj.weight" in name or ".experts." in name:
                values = np.frombuffer(raw, FLOATS[kind].value)
                large = (values.astype(np.float32) * 1e6).astype(values.dtype)
                rows[number] = (name, kind, shape, large.tobytes())

    src = make_checkpoint(tmp_path / "src", layers=1, experts=2, edit=edit)
    out = tmp_path / "out"
    quantize(plan_of(src), out)

    alone = verify(Folder(out), load_families(), Depth.NUMBERS)
    assert "global-scales-reciprocal" in {finding.rule for finding in alone.findings}
    compared = verify(Folder(out), load_families(), Depth.NUMBERS, Folder(src))
    assert [f.message for f in compared.findings if f.severity != "info"] == []


def test_dequantize_warns_of_weights_that_become_infinite(tmp_path: Path) -> None:
    modules = ("q_proj", "k_proj")
    src = make_checkpoint(tmp_path / "src", layers=1, experts=2, edit=largest("BF16", modules))
    quantize(plan_of(src), tmp_path / "out")
    plan = make_bf16_plan(
        opened(tmp_path / "out"), load_families(), max_shard_bytes=DEFAULT_SHARD_BYTES
    )
    events: list[Event] = []
    convert(plan, tmp_path / "bf16", "dequantize", emit=events.append)

    raw = data(opened(tmp_path / "bf16"), f"{KEY}.weight")
    assert 0x7F80 in np.frombuffer(raw, "<u2")  # infinity, as in compressed-tensors
    warnings = [e.message for e in events if isinstance(e, Note) and e.level == "warning"]
    assert [text for text in warnings if "infinity" in text] == [
        f"{KEY}.weight holds NaN or infinity once it is dequantized (and 1 more weight like it): "
        "codes times scales are beyond BF16's largest number, or are NaN in the source."
    ]


def test_a_weight_that_is_ten_times_too_large_is_a_fault(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", layers=1, experts=2, edit=largest("BF16", ("k_proj",)))
    quantize(plan_of(src), tmp_path / "out")
    other = make_checkpoint(tmp_path / "other", layers=1, experts=2)

    assert any(
        "k_proj is further from the parent" in text for text in wrong(tmp_path / "out", other)
    )
