"""Weights in compressed-tensors' `int-quantized`, an I8 each: read, changed, kept and judged."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from judges import data, one_shard, opened, read_json
from make import Row, write_json
from mquant.checkpoint import Folder
from mquant.measure.comparison import compare
from mquant.plan import Plan
from mquant.runs.quantize import quantize
from mquant.synth import Precision, synth
from mquant.verify.judge import Depth, verify
from mutate import mutated
from released import FAMILIES, dequantized, loaded, words
from run import plan_of

pytestmark = pytest.mark.upstream

DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
STRATEGIES: Final[dict[str, tuple[dict[str, Any], tuple[int, int]]]] = {
    "tensor": ({"strategy": "tensor"}, (1 << 20, 1 << 20)),
    "channel": ({"strategy": "channel"}, (1, 1 << 20)),
    "group": ({"strategy": "group", "group_size": 32}, (1, 32)),
    "block": ({"strategy": "block", "block_structure": [32, 16]}, (32, 16)),
    "four bits": ({"strategy": "group", "group_size": 16, "num_bits": 4}, (1, 16)),
}
BITS_8: Final = {"num_bits": 8, "type": "int"}
PER_TOKEN: Final = {**BITS_8, "strategy": "token", "dynamic": True, "symmetric": True}
MODULE: Final = "model.layers.1.self_attn.o_proj"


def compressed(
    rows: list[Row], scheme: QuantizationScheme, block: tuple[int, int], dtype: str
) -> list[Row]:
    """Return the tensors that compressed-tensors' own compressor makes of the linear layers."""
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    random, made = np.random.default_rng(4), list[Row]()
    weights = scheme.weights
    assert weights is not None
    for name, kind, shape, raw in rows:
        if "_proj.weight" not in name:
            made.append((name, kind, shape, raw))
            continue
        bits = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).reshape(shape)
        count = tuple(-(-size // wide) for size, wide in zip(shape, block, strict=True))
        size = (1,) if weights.strategy == "tensor" else count
        scale = torch.from_numpy(random.uniform(2e-4, 4e-4, size)).to(DTYPES[dtype])
        state = {"weight": bits.to(DTYPES[dtype]), "weight_scale": scale}
        if not weights.symmetric:
            state["weight_zero_point"] = torch.from_numpy(random.integers(-8, 8, size, np.int8))
        for suffix, tensor in compressor.compress(state, scheme).items():
            own = "I8" if tensor.dtype == torch.int8 else dtype
            raw_ = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            module = name.removesuffix(".weight")
            made.append((f"{module}.{suffix}", own, tuple(tensor.shape), raw_))
    return made


def source(
    folder: Path, strategy: str, dtype: str = "BF16", **args: Any
) -> tuple[Path, QuantizationScheme]:
    """Write a Llama in int-quantized; return it with its scheme."""
    keys, block = STRATEGIES[strategy]
    weights = {**BITS_8, **keys, "symmetric": True, **args}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    plain = one_shard(synth(folder / "plain", FAMILIES["llama"]).path, folder / "one")
    src = mutated(plain, folder, edit=lambda rows: compressed(rows, scheme, block, dtype))
    config = read_json(src / "config.json")
    group = {"targets": ["Linear"], "weights": weights, "input_activations": PER_TOKEN}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {**group, "format": "int-quantized"}},
        "ignore": ["lm_head"],
    }
    write_json(src / "config.json", config)
    return src, scheme


@pytest.mark.parametrize(
    ("strategy", "dtype", "symmetric"),
    [
        *((strategy, "BF16", False) for strategy in STRATEGIES),
        ("channel", "BF16", True),
        ("group", "F16", False),
        ("block", "F16", True),
        ("tensor", "F32", False),
    ],
)
def test_every_weight_is_what_compressed_tensors_makes_of_it(
    tmp_path: Path, strategy: str, dtype: str, symmetric: bool
) -> None:
    src, scheme = source(tmp_path, strategy, dtype, symmetric=symmetric)
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    ours, stored = loaded(dequantized(src, tmp_path / "ours")), loaded(src)
    modules = [name.removesuffix("_scale") for name in stored if name.endswith("weight_scale")]
    assert modules
    for name in modules:
        state = {key.rpartition(".")[2]: t for key, t in stored.items() if key.startswith(name)}
        expected = compressor.decompress(state, scheme)["weight"]
        assert torch.equal(words(ours[name]), words(expected))
    report = verify(Folder(tmp_path / "ours"), FAMILIES, Depth.FULL, Folder(src))
    assert [f for f in report.findings if f.severity == "error"] == []
    assert "weight-not-compared" not in {f.rule for f in report.findings}
    assert all(
        each.error <= each.power * 2.0**-15  # F16 rounds twice
        for each in compare(Folder(tmp_path / "ours"), Folder(src), FAMILIES).tensors
    )


OWN: Final = "{name: own, suffix: X, roles: {mlp: NVFP4A16, attention: source}}"


def own_plan(tmp_path: Path, src: Path) -> Plan:
    """Return the plan of a recipe that keeps attention as the source stores it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(OWN)
    return plan_of(src, str(recipe))


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_what_a_recipe_keeps_keeps_its_bytes_and_its_group(tmp_path: Path, strategy: str) -> None:
    src, scheme = source(tmp_path, strategy)
    out = tmp_path / "out"
    quantize(own_plan(tmp_path, src), out)
    for suffix in ("weight", "weight_scale"):
        name = f"{MODULE}.{suffix}"
        assert data(opened(out), name) == data(opened(src), name)
    groups = read_json(out / "config.json")["quantization_config"]["config_groups"].values()
    (kept,) = (group for group in groups if group["format"] == "int-quantized")
    assert QuantizationArgs(**kept["weights"]) == scheme.weights
    assert QuantizationArgs(**kept["input_activations"]) == QuantizationArgs(**PER_TOKEN)
    report = verify(Folder(out), FAMILIES, Depth.FULL, Folder(src))
    assert [f for f in report.findings if f.severity == "error"] == []


def test_what_vllm_does_not_take_is_not_kept(tmp_path: Path) -> None:
    src, _ = source(tmp_path, "group")
    (finding,) = own_plan(tmp_path, src).refusals
    assert "has a scheme of compressed-tensors that vLLM does not know" in finding.message


def test_scales_of_another_shape_than_config_json_declares_are_named(tmp_path: Path) -> None:
    src = synth(tmp_path / "src", FAMILIES["llama"], precision=Precision.INT8_CHANNEL).path
    config = read_json(src / "config.json")
    (group,) = config["quantization_config"]["config_groups"].values()
    group["weights"] |= {"strategy": "group", "group_size": 32}
    write_json(src / "config.json", config)
    (finding,) = plan_of(src).refusals
    assert finding.rule == "part-shape"
    assert "of the shape that config.json declares for codes [128, 192]" in finding.message
    report = verify(Folder(src), FAMILIES, Depth.STRUCTURE)
    assert "part-shape" in {finding.rule for finding in report.findings}
