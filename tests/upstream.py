"""Weights that llmcompressor and compressed-tensors quantize, for the numerics tests."""

from typing import Any, NamedTuple

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor.entrypoints.model_free.lifecycle import (
    calibrate_weight,
    initialize_quantized_linear,
)
from llmcompressor.modifiers.quantization.calibration import (
    apply_calibration_status,
    initialize_observer,
    observe,
    update_qparams,
)
from llmcompressor.observers.helpers import fuse_weight_observers

from mquant.numerics.floats import FLOATS, Array, Bytes

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SIGNED = {2: torch.int16, 4: torch.int32}


class Quantized(NamedTuple):
    packed: Bytes
    scales: Bytes
    global_scale: np.float32


def tensor(words: Array, dtype: str) -> torch.Tensor:
    """Return bit patterns [out, in] as a torch tensor."""
    signed = words.view(f"<i{FLOATS[dtype].word.itemsize}").copy()
    return torch.from_numpy(signed).view(DTYPES[dtype])


def linear(weight: torch.Tensor, observer: str = "") -> Any:
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    assert scheme.weights is not None
    scheme.weights.observer = observer or scheme.weights.observer
    return initialize_quantized_linear(weight, scheme, "cpu")


def compressed(module: Any) -> Quantized:
    state = {name: p.detach() for name, p in module._parameters.items() if p is not None}
    compressor: Any = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    with torch.no_grad():
        out = compressor.compress(state, module.quantization_scheme)
    return Quantized(
        out["weight_packed"].numpy(),
        out["weight_scale"].view(torch.uint8).numpy(),
        out["weight_global_scale"].numpy()[0],
    )


def alone(words: Array, dtype: str) -> Quantized:
    """Quantize one weight [out, in] as `model_free_ptq` does: calibrate, then compress."""
    module = linear(tensor(words, dtype))
    calibrate_weight(module)
    return compressed(module)


def fused(
    names: tuple[str, ...], members: list[tuple[Array, str]], observer: str = ""
) -> list[Quantized]:
    """Quantize the weights of one fused set, linked by their names in a module as in `oneshot`.

    `observer` is llmcompressor's name of the method that chooses scales; the preset has min-max.
    """
    parent = torch.nn.Module()
    for name, (words, dtype) in zip(names, members, strict=True):
        parent.add_module(name, linear(tensor(words, dtype), observer))
    modules: list[Any] = list(parent.children())
    for module in modules:
        initialize_observer(module, "weight")
        apply_calibration_status(module)
    fuse_weight_observers(parent)
    observe(modules, base_name="weight")
    update_qparams(modules, base_name="weight")
    return [compressed(module) for module in modules]


def with_scales(words: Array, dtype: str, scales: Bytes, global_scale: np.float32) -> Bytes:
    """Return the packed codes of weights [out, in] for given block scales and global scale."""
    module = linear(tensor(words, dtype))
    module.weight_scale.data.copy_(torch.from_numpy(scales.copy()).view(torch.float8_e4m3fn))
    module.weight_global_scale.data.fill_(float(global_scale))
    return compressed(module).packed


def decompressed(quantized: Quantized) -> torch.Tensor:
    """Return the BF16 weight [out, in] to which compressed-tensors decompresses `quantized`."""
    state = {
        "weight_packed": torch.from_numpy(quantized.packed),
        "weight_scale": torch.from_numpy(quantized.scales).view(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([quantized.global_scale]),
    }
    compressor: Any = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    weight: torch.Tensor = compressor.decompress(state, scheme)["weight"]
    return weight


def float_quantized(words: Array, dtype: str, scheme: str) -> tuple[Bytes, Array]:
    """Return the FP8 codes of a weight [out, in], and the bit patterns of its scales."""
    module = initialize_quantized_linear(
        tensor(words, dtype), preset_name_to_scheme(scheme, ["Linear"]), "cpu"
    )
    calibrate_weight(module)
    parameters: Any = module._parameters
    state = {name: p.detach() for name, p in parameters.items() if p is not None}
    compressor: Any = BaseCompressor.get_value_from_registry("float-quantized")
    with torch.no_grad():
        out = compressor.compress(state, module.quantization_scheme)
    scales = out["weight_scale"].view(SIGNED[FLOATS[dtype].word.itemsize]).numpy()
    return out["weight"].view(torch.uint8).numpy(), scales.view(FLOATS[dtype].word)
