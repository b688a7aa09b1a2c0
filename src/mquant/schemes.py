"""Quantization schemes: a quantized weight's tensors on disk, and its entry in config.json."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

# The compressed-tensors release whose config.json and tensors mquant writes exactly.
FORMAT_VERSION: Final = "0.19.0"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SchemeTensor:
    """A tensor of a quantized module: its dtype (empty: the weight's own) and its shape.

    `shape` computes the shape from the weight's [out, in].
    """

    suffix: str
    dtype: str
    shape: Callable[[int, int], Shape]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a linear weight [out, in] is stored.

    `config_group` is the entry of compressed-tensors' `config_groups` without its targets. `in`
    must be a multiple of `columns`. `out` must be a multiple of `rows` if loaders stack another
    matrix of the fused set below this matrix, so that no block spans two matrices. `needs_data`:
    some values are measured while text goes through the model. `streamed`: mquant's own kernels can
    write the scheme; otherwise only llmcompressor can.
    """

    name: str
    parts: tuple[SchemeTensor, ...]
    config_group: dict[str, Any] = field(hash=False)
    columns: int = 1
    rows: int = 1
    needs_data: bool = False
    streamed: bool = True

    @property
    def format(self) -> str:
        """The compressed-tensors format."""
        return str(self.config_group["format"])

    def outputs(self, module: str, shape: Shape, dtype: str) -> tuple[tuple[str, str, Shape], ...]:
        """Return (name, dtype, shape) of the tensors that replace `module`.weight of [out, in]."""
        rows, columns = shape
        return tuple(
            (f"{module}.{part.suffix}", part.dtype or dtype, part.shape(rows, columns))
            for part in self.parts
        )


def _args(**keys: Any) -> dict[str, Any]:
    """Return quantization arguments with every key that compressed-tensors writes."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "tensor",
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
        **keys,
    }


def _group(
    storage_format: str, weights: dict[str, Any], inputs: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "format": storage_format,
        "input_activations": inputs,
        "output_activations": None,
        "weights": weights,
    }


_E2M1: Final = {
    "group_size": 16,
    "num_bits": 4,
    "scale_dtype": "torch.float8_e4m3fn",
    "strategy": "tensor_group",
}
_NVFP4_PARTS: Final = (
    SchemeTensor("weight_packed", "U8", lambda rows, columns: (rows, columns // 2)),
    SchemeTensor("weight_scale", "F8_E4M3", lambda rows, columns: (rows, columns // 16)),
    SchemeTensor("weight_global_scale", "F32", lambda _rows, _columns: (1,)),
)
_FP8_WEIGHT: Final = SchemeTensor("weight", "F8_E4M3", lambda rows, columns: (rows, columns))

# Two E2M1 codes a byte (the even element in the low nibble), one E4M3 scale per 16 elements, one
# F32 divisor: weight = fp4 * weight_scale / global_scale.
NVFP4A16: Final = Scheme(
    "NVFP4A16", _NVFP4_PARTS, _group("nvfp4-pack-quantized", _args(**_E2M1), None), columns=16
)
# As NVFP4A16, with activations in 4 bits too; modules with the same input share their divisor.
NVFP4: Final = Scheme(
    "NVFP4",
    (*_NVFP4_PARTS, SchemeTensor("input_global_scale", "F32", lambda _rows, _columns: (1,))),
    _group(
        "nvfp4-pack-quantized",
        _args(**_E2M1),
        _args(**_E2M1, dynamic="local", observer="static_minmax"),
    ),
    columns=16,
    needs_data=True,
)
# E4M3 codes with one scale per row; activations are scaled per token at run time.
FP8_DYNAMIC: Final = Scheme(
    "FP8_DYNAMIC",
    (_FP8_WEIGHT, SchemeTensor("weight_scale", "", lambda rows, _columns: (rows, 1))),
    _group("float-quantized", _args(strategy="channel"), _args(strategy="token", dynamic=True)),
)
# E4M3 codes with one scale per 128 x 128 codes; activations in groups of 128.
FP8_BLOCK: Final = Scheme(
    "FP8_BLOCK",
    (
        _FP8_WEIGHT,
        SchemeTensor(
            "weight_scale", "", lambda rows, columns: (-(-rows // 128), -(-columns // 128))
        ),
    ),
    _group(
        "float-quantized",
        _args(strategy="block", block_structure=[128, 128]),
        _args(strategy="group", group_size=128, dynamic=True),
    ),
    rows=128,
)

# Eight codes (-8 to 7, stored plus 8) per int32, lowest first; one scale per 128 codes.
W4A16: Final = Scheme(
    "W4A16",
    (
        SchemeTensor("weight_packed", "I32", lambda rows, columns: (rows, columns // 8)),
        SchemeTensor("weight_scale", "", lambda rows, columns: (rows, columns // 128)),
        SchemeTensor("weight_shape", "I64", lambda _rows, _columns: (2,)),
    ),
    _group("pack-quantized", _args(group_size=128, num_bits=4, strategy="group", type="int"), None),
    columns=128,
    streamed=False,
)

_MX: Final = {
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "strategy": "group",
    "zp_dtype": "torch.uint8",
}
_MX_SCALE: Final = SchemeTensor("weight_scale", "U8", lambda rows, columns: (rows, columns // 32))
# Two E2M1 codes a byte as in NVFP4, one E8M0 scale per 32. mquant only keeps such weights.
MXFP4A16: Final = Scheme(
    "MXFP4A16",
    (_NVFP4_PARTS[0], _MX_SCALE),
    _group("mxfp4-pack-quantized", _args(num_bits=4, **_MX), None),
    columns=32,
    streamed=False,
)
# E4M3 codes, one E8M0 scale per 32; activations in groups of 32. mquant only keeps such weights.
MXFP8: Final = Scheme(
    "MXFP8",
    (_FP8_WEIGHT, _MX_SCALE),
    _group("mxfp8-quantized", _args(**_MX), _args(dynamic=True, **_MX)),
    columns=32,
    streamed=False,
)

SCHEMES: Final[dict[str, Scheme]] = {
    scheme.name: scheme for scheme in (NVFP4A16, NVFP4, FP8_DYNAMIC, FP8_BLOCK, W4A16)
}
"""The schemes that a recipe can ask for, by name."""
KNOWN: Final = (*SCHEMES.values(), MXFP4A16, MXFP8)
"""The schemes with a name: those of `SCHEMES`, and those that mquant only keeps."""

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
