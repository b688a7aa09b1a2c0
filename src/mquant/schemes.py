"""Quantization schemes: what a weight becomes on disk, and what config.json says of it."""

from dataclasses import dataclass, field
from typing import Any, Final

# The compressed-tensors release whose config.json and tensors we write, to the letter.
FORMAT_VERSION: Final = "0.19.0"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a linear weight [out, in] is stored.

    `config_group` is the entry of compressed-tensors' `config_groups` without its targets;
    `format` the compressed-tensors format; `group_size` the elements along `in` that share a
    scale.
    """

    name: str
    format: str
    group_size: int
    config_group: dict[str, Any] = field(hash=False)

    def outputs(
        self, module: str, shape: tuple[int, ...]
    ) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """(name, dtype, shape) of the tensors that replace `module`.weight of [out, in]."""
        rows, columns = shape
        return (
            (f"{module}.weight_packed", "U8", (rows, columns // 2)),
            (f"{module}.weight_scale", "F8_E4M3", (rows, columns // self.group_size)),
            (f"{module}.weight_global_scale", "F32", (1,)),
        )


# compressed-tensors' preset NVFP4A16. Two E2M1 codes a byte (the even element in the low nibble),
# one E4M3 scale per 16 elements, one F32 divisor: weight = fp4 * weight_scale / global_scale.
NVFP4A16: Final = Scheme(
    name="NVFP4A16",
    format="nvfp4-pack-quantized",
    group_size=16,
    config_group={
        "format": "nvfp4-pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "actorder": None,
            "block_structure": None,
            "dynamic": False,
            "group_size": 16,
            "num_bits": 4,
            "observer": None,
            "observer_kwargs": {},
            "scale_dtype": "torch.float8_e4m3fn",
            "strategy": "tensor_group",
            "symmetric": True,
            "type": "float",
            "zp_dtype": None,
        },
    },
)

SCHEMES: Final[dict[str, Scheme]] = {scheme.name: scheme for scheme in (NVFP4A16,)}

# Endings of tensors that only a quantized checkpoint holds, in any of the common layouts
# (compressed-tensors, FP8-block, ModelOpt, GPTQ and AWQ).
QUANTIZED_SUFFIXES: Final = (
    ".weight_packed",
    ".weight_scale",
    ".weight_global_scale",
    ".input_global_scale",
    ".weight_scale_inv",
    ".weight_scale_2",
    ".input_scale",
    ".weight_zero_point",
    ".weight_shape",
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
)

__all__ = ["FORMAT_VERSION", "NVFP4A16", "QUANTIZED_SUFFIXES", "SCHEMES", "Scheme"]
