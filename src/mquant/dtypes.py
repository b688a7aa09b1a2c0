"""The only table of safetensors dtype names and of the dtypes' sizes in bits."""

from typing import Final

# Order and bits as in safetensors' own `Dtype` enum. Files list tensors by descending order in
# this enum, then by name, which keeps every tensor aligned to its element size.
BITS: Final[dict[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
RANK: Final[dict[str, int]] = {name: rank for rank, name in enumerate(BITS)}
FLOAT_WEIGHTS: Final = frozenset({"BF16", "F16", "F32"})
PLAIN_DTYPES: Final = FLOAT_WEIGHTS | {"F64"}
"""What loaders copy into a plain parameter without a change of meaning."""


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of safetensors `dtype` and `shape`.

    Raises ValueError if sub-byte elements do not fill whole bytes.
    """
    bits = BITS[dtype]
    for size in shape:
        bits *= size
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} does not fill whole bytes")
    return bits // 8
