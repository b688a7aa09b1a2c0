"""The trained checkpoint with experts in MXFP4, and other weights as the test wants them.

The codes and scales are made here, with numpy alone.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from judges import read_json
from make import Edit, Row, write_json
from mutate import mutated
from run import TRAINED
from schemes import declaring

GROUP: Final = 32
FP4: Final = np.dtype(ml_dtypes.float4_e2m1fn)
Scales = npt.NDArray[np.uint8]
Shift = Callable[[str, Scales], Scales]
"""A module's name and its E8M0 scales [out, in / 32] -> other scales for the same codes."""

mxfp4: Final = declaring(
    "mxfp4-pack-quantized",
    {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": GROUP,
        "scale_dtype": "torch.uint8",
        "symmetric": True,
        "dynamic": False,
    },
    None,
)


def is_expert(module: str) -> bool:
    """Return whether a module is a routed expert's."""
    return ".experts." in module


def in_mxfp4(wanted: Callable[[str], bool] = is_expert, shift: Shift | None = None) -> Edit:
    """Return an edit that stores the weights of some modules in MXFP4, in compressed-tensors."""

    def edit(rows: list[Row]) -> list[Row]:
        result: list[Row] = []
        for name, dtype, shape, raw in rows:
            module, _, suffix = name.rpartition(".")
            if suffix != "weight" or len(shape) != 2 or not wanted(module):
                result.append((name, dtype, shape, raw))
                continue
            weight = np.frombuffer(raw, ml_dtypes.bfloat16).astype(np.float32).reshape(shape)
            packed, scales = rounded(weight)
            scales = shift(module, scales) if shift else scales
            result.append((f"{module}.weight_packed", "U8", packed.shape, packed.tobytes()))
            result.append((f"{module}.weight_scale", "U8", scales.shape, scales.tobytes()))
        return result

    return edit


def rounded(weight: npt.NDArray[np.float32]) -> tuple[Scales, Scales]:
    """Return codes [out, in / 2] and E8M0 scales [out, in / 32] of a weight."""
    out, columns = weight.shape
    blocks = weight.reshape(out, columns // GROUP, GROUP)
    largest = np.maximum(np.abs(blocks).max(2), 2.0**-100)
    exponents = np.floor(np.log2(largest)).astype(np.int32) - 2
    codes = np.clip(np.ldexp(blocks, -exponents[..., None]), -6, 6).astype(FP4).view(np.uint8)
    codes = codes.reshape(out, columns)
    return codes[:, ::2] | codes[:, 1::2] << np.uint8(4), (exponents + 127).astype(np.uint8)


def source(
    folder: Path,
    edit: Edit | None = None,
    change: Callable[[dict[str, Any]], None] = mxfp4,
    parent: Path = TRAINED,
) -> Path:
    """Write the trained checkpoint with its experts in MXFP4."""
    made = mutated(parent, folder, edit=edit or in_mxfp4())
    config = read_json(made / "config.json")
    config.setdefault(
        "quantization_config",
        {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": []},
    )
    change(config)
    write_json(made / "config.json", config)
    return made


def tensors(folder: Path) -> Mapping[str, Any]:
    """Return all tensors of a checkpoint, as torch has them."""
    from safetensors.torch import load_file

    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
