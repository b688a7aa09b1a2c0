"""The trained checkpoint in other schemes: edits of its NVFP4A16 checkpoint, and configs.

The edits follow the formats' descriptions and use numpy alone; scales are simple maxima.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from judges import data, opened
from make import Edit, Row
from run import TRAINED

Weight = npt.NDArray[np.float32]
E4M3: Final = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK: Final = 64
GROUP: Final = 32

_E2M1: Final = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_FP8: Final = {"num_bits": 8, "type": "float", "symmetric": True}
_INT4: Final = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
_INT8: Final = {"num_bits": 8, "type": "int", "symmetric": True}


def _per_module(make: Callable[[str, Weight], Iterator[Row]]) -> Edit:
    """Return an edit that quantizes NVFP4 modules in another scheme, from the parent's weights."""

    def edit(rows: list[Row]) -> list[Row]:
        parent, result = opened(TRAINED), list[Row]()
        for row in rows:
            module, _, suffix = row[0].rpartition(".")
            if suffix == "weight_packed":
                raw = np.frombuffer(data(parent, f"{module}.weight"), ml_dtypes.bfloat16)
                shape = parent.tensors[f"{module}.weight"].shape
                result += make(module, raw.astype(np.float32).reshape(shape))
            elif suffix not in ("weight_scale", "weight_global_scale"):
                result.append(row)
        return result

    return edit


def _row(name: str, dtype: str, values: npt.NDArray[Any]) -> Row:
    return name, dtype, values.shape, values.tobytes()


def _fp8_channel(module: str, weight: Weight) -> Iterator[Row]:
    scale = np.abs(weight).max(1, keepdims=True) / 448
    yield _row(f"{module}.weight", "F8_E4M3", (weight / scale).astype(E4M3))
    yield _row(f"{module}.weight_scale", "BF16", scale.astype(ml_dtypes.bfloat16))


def _fp8_block(module: str, weight: Weight) -> Iterator[Row]:
    high, wide = (size // BLOCK for size in weight.shape)
    blocks = weight.reshape(high, BLOCK, wide, BLOCK)
    scale = np.abs(blocks).max((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).astype(E4M3).reshape(weight.shape)
    yield _row(f"{module}.weight", "F8_E4M3", codes)
    yield _row(f"{module}.weight_scale_inv", "F32", scale)


def _int4(module: str, weight: Weight) -> Iterator[Row]:
    out, wide = weight.shape
    groups = weight.reshape(out, wide // GROUP, GROUP)
    scale = np.abs(groups).max(2) / 7
    codes = np.clip(np.rint(groups / scale[:, :, None]), -8, 7).astype(np.int64) + 8
    nibbles = codes.reshape(out, wide // 8, 8) << (4 * np.arange(8))
    yield _row(f"{module}.weight_packed", "I32", nibbles.sum(2).astype(np.uint32))
    yield _row(f"{module}.weight_scale", "BF16", scale.astype(ml_dtypes.bfloat16))
    yield _row(f"{module}.weight_shape", "I64", np.array(weight.shape, np.int64))


def _int8_channel(module: str, weight: Weight) -> Iterator[Row]:
    scale = np.abs(weight).max(1, keepdims=True) / 127
    yield _row(f"{module}.weight", "I8", np.rint(weight / scale).astype(np.int8))
    yield _row(f"{module}.weight_scale", "BF16", scale.astype(ml_dtypes.bfloat16))


FP8_CHANNEL: Final = _per_module(_fp8_channel)
FP8_BLOCKS: Final = _per_module(_fp8_block)
INT4: Final = _per_module(_int4)
INT8: Final = _per_module(_int8_channel)


def with_input_scales(rows: list[Row]) -> list[Row]:
    """Add an input scale beside every module's codes, as for activations in NVFP4."""
    scale = np.array([500], np.float32)
    modules = [row[0].rpartition(".")[0] for row in rows if row[0].endswith(".weight_packed")]
    return [*rows, *(_row(f"{module}.input_global_scale", "F32", scale) for module in modules)]


def as_modelopt(rows: list[Row]) -> list[Row]:
    """Return the same codes and scales under ModelOpt's names, with reciprocal global scales."""
    result: list[Row] = []
    for name, dtype, shape, raw in rows:
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            result.append((f"{module}.weight", dtype, shape, raw))
        elif suffix == "weight_global_scale":
            factor = 1 / np.frombuffer(raw, "<f4")
            result.append(_row(f"{module}.weight_scale_2", "F32", factor.reshape(())))
            result.append(_row(f"{module}.input_scale", "F32", np.array(0.01, np.float32)))
        else:
            result.append((name, dtype, shape, raw))
    return result


def declaring(form: str, weights: object, inputs: object) -> Callable[[dict[str, Any]], None]:
    """Return a change of the config to a format of compressed-tensors; `ignore` stays the same."""

    def change(config: dict[str, Any]) -> None:
        group = {"targets": ["Linear"], "format": form, "weights": weights}
        config["quantization_config"] |= {
            "format": form,
            "config_groups": {"group_0": {**group, "input_activations": inputs}},
        }

    return change


def w4a4(config: dict[str, Any]) -> None:
    """Declare activations in NVFP4."""
    (group,) = config["quantization_config"]["config_groups"].values()
    group["input_activations"] = {**_E2M1, "symmetric": True, "dynamic": "local"}


fp8_channel: Final = declaring(
    "float-quantized",
    {**_FP8, "strategy": "channel", "dynamic": False},
    {**_FP8, "strategy": "token", "dynamic": True},
)
int4: Final = declaring("pack-quantized", {**_INT4, "symmetric": True, "dynamic": False}, None)
int8: Final = declaring(
    "int-quantized",
    {**_INT8, "strategy": "channel", "dynamic": False},
    {**_INT8, "strategy": "token", "dynamic": True},
)


def fp8_blocks(config: dict[str, Any]) -> None:
    """Declare FP8 as in the original release, with smaller blocks."""
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }


def modelopt(config: dict[str, Any]) -> None:
    """Declare ModelOpt's flat config, with globs instead of `re:` entries."""
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "ignore": ["lm_head", "*.gate"],
        "producer": {"name": "modelopt", "version": "0.39.0"},
    }


__all__ = [
    "FP8_BLOCKS",
    "FP8_CHANNEL",
    "INT4",
    "INT8",
    "as_modelopt",
    "fp8_blocks",
    "fp8_channel",
    "int4",
    "int8",
    "modelopt",
    "w4a4",
    "with_input_scales",
]
