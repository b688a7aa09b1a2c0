"""Inference engines that load mquant's schemes, the evidence for each, and their hardware.

There is one row for each engine and scheme. To add a new release of an engine, change its row.
"""

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine and a scheme: `loads` says whether the engine loads it, `seen` gives the evidence.

    `only_experts`: the row concerns checkpoints with experts.
    """

    name: str
    version: str
    loads: Literal["yes", "no", "wrongly"]
    what: str
    seen: str
    only_experts: bool = False


NVFP4A16: Final = (
    Engine(
        "vLLM",
        "0.32.0",
        "yes",
        "FP4 Marlin kernels, on NVIDIA GPUs of compute capability 7.5 or newer.",
        "its loader run on the headers; marlin_utils_fp4.py read",
    ),
    Engine(
        "SGLang",
        "0.5.23 or newer",
        "yes",
        "FP4 Marlin kernels, on NVIDIA GPUs of compute capability 8.0 or newer.",
        "compressed_tensors_w4a16_nvfp4_moe.py read",
    ),
    Engine(
        "TensorRT-LLM",
        "",
        "no",
        "TensorRT-LLM reads ModelOpt's layout, and takes compressed-tensors' NVFP4 for NVFP4 with "
        "4-bit activations.",
        "its parser of quantization_config read",
    ),
    Engine(
        "transformers",
        "5.17",
        "wrongly",
        "transformers loads the experts without an error and without weight_global_scale: the "
        "weights are wrong.",
        "run on a small model",
        only_experts=True,
    ),
    Engine(
        "llama.cpp",
        "",
        "no",
        "llama.cpp reads GGUF; GGUF files are made from the unquantized parent.",
        "its converter read",
    ),
)

# The other schemes were tried with vLLM's loader only. An untried pair has no row.
_LOADED: Final = "its loader run on the headers of a small checkpoint; not run on a GPU"
NVFP4: Final = (
    Engine(
        "vLLM",
        "0.32.0",
        "yes",
        "Weights and activations in 4 bits, on NVIDIA GPUs with FP4 units (Blackwell).",
        _LOADED,
    ),
)
FP8: Final = (
    Engine("vLLM", "0.32.0", "yes", "Weights and activations in 8-bit floating point.", _LOADED),
)
INT4: Final = (
    Engine("vLLM", "0.32.0", "yes", "Weights in 4-bit integers, multiplied in 16 bits.", _LOADED),
)

ENGINES: Final[dict[str, tuple[Engine, ...]]] = {
    "NVFP4A16": NVFP4A16,
    "NVFP4": NVFP4,
    "FP8_DYNAMIC": FP8,
    "FP8_BLOCK": FP8,
    "W4A16": INT4,
}

HARDWARE: Final[dict[str, str]] = {
    "NVFP4A16": "Only weights are in 4 bits: the kernel turns weights into 16 bits, and needs no "
    "GPU with FP4 units. The scheme saves memory and memory bandwidth."
}
