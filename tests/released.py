"""Checkpoints in the formats of releases, and what the releases' own code makes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from judges import converted_by, opened
from make import Row
from mquant.checkpoint import TensorInfo
from mquant.family_files import load_families
from mquant.plan import Plan, Stored, make_bf16_plan
from mquant.runs.convert import convert
from mquant.synth import Precision, synth

FAMILIES: Final = load_families()
Upstream = Callable[[Path], dict[str, Any]]
"""The weights that upstream's code makes of a checkpoint, by name: tensors of torch in BF16."""


def compressed_tensors(src: Path) -> dict[str, Any]:
    """Return what its own dequantizer makes of a checkpoint."""
    from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer
    from safetensors.torch import load_file

    out = converted_by(CompressedTensorsDequantizer(src), src, src.parent / "theirs")
    return load_file(out / "model.safetensors")


def transformers(src: Path) -> dict[str, Any]:
    """Dequantize FP8, and FP4 in I8, by `weight_scale_inv`, `weight_scale` or `scale`."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors, made = loaded(src), {}
    for name, codes in tensors.items():
        scales = (f"{name}_scale_inv", f"{name}_scale", name.removesuffix("weight") + "scale")
        scale = next((tensors[each] for each in scales if each in tensors), None)
        if scale is not None:
            made[name] = Fp8Dequantize(None)._dequantize_one(codes, scale)
    return made


def gpt_oss(src: Path) -> dict[str, Any]:
    """Return the weights of all experts, [experts, in, out]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = loaded(src)
    return {
        name.removesuffix("_blocks"): convert_moe_packed_tensors(
            blocks, tensors[name.replace("_blocks", "_scales")]
        )
        for name, blocks in tensors.items()
        if name.endswith("_blocks")
    }


def loaded(folder: Path) -> dict[str, Any]:
    """Return the tensors of a checkpoint in one shard."""
    from safetensors.torch import load_file

    (shard,) = folder.glob("*.safetensors")
    return load_file(shard)


CASES: Final[dict[Precision, tuple[str, Upstream]]] = {
    Precision.MXFP4: ("qwen3_moe", compressed_tensors),
    Precision.MXFP4_BLOCKS: ("gpt_oss", gpt_oss),
    Precision.MXFP4_FP8: ("deepseek_v4", transformers),
    Precision.MXFP8: ("minimax_m3_vl", transformers),
    Precision.FP8_TENSOR: ("mistral", transformers),
    Precision.FP8_CHANNEL: ("qwen3_moe", compressed_tensors),
    Precision.INT4: ("kimi_k2", compressed_tensors),
    Precision.INT8: ("qwen3_moe", compressed_tensors),
    Precision.INT8_CHANNEL: ("qwen3_moe", compressed_tensors),
    Precision.FP8_STACKS: ("qwen3_vl_moe", transformers),
}


def hard(rows: list[Row]) -> list[Row]:
    """Return the tensors with random codes and scales instead of codes and scales."""
    return [(name, dtype, shape, _hard(name, dtype, raw)) for name, dtype, shape, raw in rows]


def _hard(name: str, dtype: str, raw: bytes) -> bytes:
    random = np.random.default_rng(len(name))
    last = name.rpartition(".")[2]
    if last.endswith("scales") or (dtype in ("U8", "F8_E8M0") and "scale" in last):
        return random.integers(0, 255, len(raw), np.uint8).tobytes()  # no NaN
    if dtype in ("U8", "I8", "I32"):
        return random.integers(0, 256, len(raw), np.uint8).tobytes()
    if dtype == "F8_E4M3":
        codes = random.integers(0, 256, len(raw), np.uint8)
        codes[codes & 0x7F == 0x7F] = 0  # NaN
        return codes.tobytes()
    if dtype == "BF16" and "scale" in last:
        return random.integers(0, 0x7F80, len(raw) // 2, np.uint16).tobytes()
    return raw


def bf16_plan(src: Path) -> Plan:
    """Return the plan that dequantizes a checkpoint."""
    return make_bf16_plan(opened(src), FAMILIES)


def dequantized(src: Path, out: Path) -> Path:
    """Dequantize a checkpoint into `out`."""
    return convert(bf16_plan(src), out, "dequantize").out


def source(folder: Path, precision: Precision) -> Path:
    """Write the checkpoint of a case."""
    return synth(folder, FAMILIES[CASES[precision][0]], precision=precision).path


def words(tensor: Any) -> Any:
    """Return the bits of a tensor in BF16."""
    import torch

    return tensor.to(torch.bfloat16).contiguous().view(torch.int16)


def stored(src: Path) -> list[tuple[TensorInfo, Stored]]:
    """Return the weights that are stored quantized, and how they are."""
    members = bf16_plan(src).survey.members
    return [(member.info, member.stored) for member in members if member.stored]
