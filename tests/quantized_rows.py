"""Edits that quantize the weights of a small checkpoint, and the quantization configs that fit."""

from collections.abc import Callable
from typing import Any

from make import Edit, Row, make_row

Suffixes = dict[str, tuple[str, Callable[[int, int], tuple[int, ...]]]]
"""The tensors of a quantized weight: suffix -> dtype, and the shape by the weight's shape."""


def whole(rows: int, columns: int) -> tuple[int, ...]:
    return (rows, columns)


def one(*_: int) -> tuple[int, ...]:
    return (1,)


def each(rows_each: int, columns_each: int) -> Callable[[int, int], tuple[int, ...]]:
    """Return the shape of a tensor with one element for each block of so many elements."""
    return lambda rows, columns: (-(-rows // rows_each), -(-columns // columns_each))


NVFP4A16: Suffixes = {
    "weight_packed": ("U8", each(1, 2)),
    "weight_scale": ("F8_E4M3", each(1, 16)),
    "weight_global_scale": ("F32", one),
}
NVFP4: Suffixes = {**NVFP4A16, "input_global_scale": ("F32", one)}
FP8: Suffixes = {
    "weight": ("F8_E4M3", whole),
    "weight_scale": ("BF16", lambda rows, _: (rows, 1)),
}
W4A16: Suffixes = {
    "weight_packed": ("I32", each(1, 8)),
    "weight_scale": ("BF16", each(1, 32)),
    "weight_shape": ("I64", lambda *_: (2,)),
}
MODELOPT: Suffixes = {
    "weight": ("U8", each(1, 2)),
    "weight_scale": ("F8_E4M3", each(1, 16)),
    "weight_scale_2": ("F32", lambda *_: ()),
    "input_scale": ("F32", lambda *_: ()),
}
FP8_BLOCK: Suffixes = {"weight": ("F8_E4M3", whole), "weight_scale_inv": ("F32", each(16, 16))}
AWQ: Suffixes = {
    "qweight": ("I32", each(1, 8)),
    "qzeros": ("I32", each(1, 8)),
    "scales": ("F16", each(1, 1)),
}

FP4_ARGS = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
}
SCHEMES: dict[str, dict[str, Any]] = {
    "NVFP4A16": {"format": "nvfp4-pack-quantized", "weights": FP4_ARGS},
    "NVFP4": {
        "format": "nvfp4-pack-quantized",
        "weights": FP4_ARGS,
        "input_activations": {**FP4_ARGS, "dynamic": "local"},
    },
    "FP8": {
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
        "input_activations": {
            "num_bits": 8,
            "type": "float",
            "strategy": "token",
            "dynamic": True,
            "symmetric": True,
        },
    },
    "W4A16": {
        "format": "pack-quantized",
        "weights": {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": 32,
            "symmetric": True,
        },
    },
}
"""Scheme -> the rest of its group in config_groups of compressed-tensors."""
FP8_CONFIG = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [16, 16],
}
MODELOPT_CONFIG = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
LINEAR = ("_proj", ".w1", ".w2", ".w3")


def quantized(suffixes: Suffixes, *more: str, but: tuple[str, ...] = ()) -> Edit:
    """Return an edit that quantizes linear layers and `more`, except modules named like `but`."""

    def edit(rows: list[Row]) -> list[Row]:
        edited: list[Row] = []
        for row in rows:
            module = row[0].removesuffix(".weight")
            if module.endswith((*LINEAR, *more)) and not any(part in module for part in but):
                edited += parts_of(module, suffixes, row[2])
            else:
                edited.append(row)
        return edited

    return edit


def parts_of(module: str, suffixes: Suffixes, shape: tuple[int, ...]) -> list[Row]:
    """Return the tensors of a quantized module whose weight has a shape."""
    rows, columns = shape
    return [
        make_row(f"{module}.{suffix}", dtype, part(rows, columns))
        for suffix, (dtype, part) in suffixes.items()
    ]


def compressed(ignore: Any, targets: Any = ("Linear",), scheme: str = "NVFP4A16") -> dict[str, Any]:
    """Return a quantization_config of compressed-tensors."""
    group = {"targets": list(targets), **SCHEMES[scheme]}
    return {
        "quant_method": "compressed-tensors",
        "format": group["format"],
        "ignore": ignore,
        "config_groups": {"group_0": group},
    }
