"""How quantized modules are stored: the tensors of each layout, with their dtypes and shapes.

The tensors on disk decide which layout a module has, because a loader reads these tensors;
config.json decides only what the tensors leave open.
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple

from mquant.checkpoint import TensorInfo
from mquant.loader_model.integer_parts import (
    FLOATS,
    SCALAR,
    ExpectedTensor,
    Shape,
    byte_parts,
    packed_parts,
)
from mquant.loader_model.modules import FP8_DTYPES, Module, ModuleView, quantized_suffixes

GROUP: Final = 16
"""Elements along a row that share an NVFP4 block scale."""
DEFAULT_BLOCK: Final = (128, 128)
MX_GROUP: Final = 32
"""Elements along a row that share a scale in the MX formats."""
E8M0S: Final = ("U8", "F8_E8M0")
"""The dtypes of E8M0 scales: a byte e is the scale 2^(e - 127), and 255 is NaN."""


class StorageFormat(StrEnum):
    """How the weight of a quantized module is stored. OTHER: in a format that mquant does not know.

    The value is the name that plans state and digest. FP8_BLOCK has its scales under
    `weight_scale_inv`, FP8 under `weight_scale`, FP8_SCALE, the FP8 of DeepSeek-V4, under `scale`.
    The three have scales of blocks or not.

    MXFP4 has two E2M1 codes a byte, the even element in the low nibble, and an E8M0 scale for 32
    elements: under compressed-tensors' names, under those of DeepSeek-V4 (MXFP4_SCALE), or as
    gpt-oss stores the experts of a layer (MXFP4_BLOCKS). MXFP8 has E4M3 codes under E8M0 scales.
    INT is compressed-tensors' `pack-quantized`; INT8 is its `int-quantized`, an I8 for each weight.
    """

    FP8_BLOCK = "FP8 in blocks"
    FP8 = "compressed-tensors FP8"
    FP8_SCALE = "DeepSeek FP8"
    NVFP4 = "compressed-tensors NVFP4"
    MODELOPT_NVFP4 = "ModelOpt NVFP4"
    MXFP4 = "compressed-tensors MXFP4"
    MXFP4_SCALE = "DeepSeek MXFP4"
    MXFP4_BLOCKS = "gpt-oss MXFP4"
    MXFP8 = "MXFP8"
    INT = "packed integers"
    INT8 = "compressed-tensors INT8"
    OTHER = "other"

    @property
    def short(self) -> str:
        """The name for reports and comparisons: FP8 and MXFP4 for all kinds of FP8 and MXFP4."""
        if self in MXFP4S:
            return "MXFP4"
        return "FP8" if self in FP8S else self.value.removeprefix("compressed-tensors ")


FP8S: Final = frozenset({StorageFormat.FP8_BLOCK, StorageFormat.FP8, StorageFormat.FP8_SCALE})
NVFP4S: Final = frozenset({StorageFormat.NVFP4, StorageFormat.MODELOPT_NVFP4})
MXFP4S: Final = frozenset(
    {StorageFormat.MXFP4, StorageFormat.MXFP4_SCALE, StorageFormat.MXFP4_BLOCKS}
)
E4M3S: Final = FP8S | {StorageFormat.MXFP8}
"""The formats with a code of 8 bits for each element."""
FP4S: Final = NVFP4S | MXFP4S
"""The formats with two E2M1 codes a byte."""
INTEGERS: Final = (StorageFormat.INT, StorageFormat.INT8)


class Suffixes(NamedTuple):
    """The suffixes of a module's tensors: codes, scales, scale of the whole weight, input scale.

    The suffix is empty for a tensor that the format does not have.
    """

    codes: str
    scale: str
    second: str = ""
    input: str = ""


SUFFIXES: Final[dict[StorageFormat, Suffixes]] = {
    StorageFormat.FP8_BLOCK: Suffixes("weight", "weight_scale_inv", "", "input_scale"),
    StorageFormat.FP8: Suffixes("weight", "weight_scale", "", "input_scale"),
    StorageFormat.FP8_SCALE: Suffixes("weight", "scale"),
    StorageFormat.NVFP4: Suffixes(
        "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"
    ),
    StorageFormat.MODELOPT_NVFP4: Suffixes(
        "weight", "weight_scale", "weight_scale_2", "input_scale"
    ),
    StorageFormat.MXFP4: Suffixes("weight_packed", "weight_scale", "", "input_global_scale"),
    StorageFormat.MXFP4_SCALE: Suffixes("weight", "scale"),
    StorageFormat.MXFP4_BLOCKS: Suffixes("blocks", "scales"),
    StorageFormat.MXFP8: Suffixes("weight", "weight_scale"),
    StorageFormat.INT: Suffixes("weight_packed", "weight_scale"),
    StorageFormat.INT8: Suffixes("weight", "weight_scale", "", "input_scale"),
}
SCALES: Final = frozenset(names.scale for names in SUFFIXES.values())
SECOND_SCALES: Final = frozenset(names.second for names in SUFFIXES.values() if names.second)
INPUT_SCALES: Final = frozenset(
    {*(names.input for names in SUFFIXES.values() if names.input), "activation_scale"}
)

_DECLARED: Final[dict[StorageFormat, dict[str, object]]] = {
    StorageFormat.NVFP4: {"type": "float", "num_bits": 4, "group_size": GROUP},
    StorageFormat.MXFP4: {"type": "float", "num_bits": 4, "group_size": MX_GROUP},
    StorageFormat.MXFP8: {"type": "float", "num_bits": 8, "group_size": MX_GROUP},
    **{fp8: {"type": "float", "num_bits": 8} for fp8 in FP8S},
    StorageFormat.INT: {"type": "int"},
    StorageFormat.INT8: {"type": "int"},
}
"""The values that keys in `weights` of a config group must have, for each format."""


_STATIC_BY_ALGORITHM: Final = {"NVFP4": {True}, "FP8": {True}, "MIXED_PRECISION": {True, False}}


def recognize(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> StorageFormat | None:
    """Return the format of a module's `tensors`, keyed by suffix; None for a plain module.

    Only this function decides the format. `config` is the quantization config; it decides what the
    tensors leave open. No module is refused: `plan` itself takes only modules with known parts, and
    `format_of` itself returns OTHER for formats that `verify` has no expected tensors for.
    """
    if not quantized_suffixes(tensors):
        return None
    weight, packed = tensors.get("weight"), tensors.get("weight_packed")
    dtype = weight.dtype if weight else ""
    if "blocks" in tensors:
        return StorageFormat.MXFP4_BLOCKS
    if "scale" in tensors:
        fp8 = dtype in FP8_DTYPES
        return StorageFormat.FP8_SCALE if fp8 else StorageFormat.MXFP4_SCALE
    if "weight_shape" in tensors or (packed is not None and packed.dtype == "I32"):
        return StorageFormat.INT
    if dtype == "I8" and _says_integers(config):
        return StorageFormat.INT8
    if dtype in FP8_DTYPES:
        return _fp8_format(tensors, config)
    if SUFFIXES[StorageFormat.MODELOPT_NVFP4].second in tensors or dtype == "U8":
        return StorageFormat.MODELOPT_NVFP4
    if packed is not None or says_nvfp4(tensors, config):
        return StorageFormat.MXFP4 if _in_mxfp4(tensors, config) else StorageFormat.NVFP4
    if {"qweight", "qzeros", "scales", "g_idx"} & tensors.keys():
        return StorageFormat.OTHER
    return _fp8_format(tensors, config) if SCALES & tensors.keys() else StorageFormat.OTHER


def _fp8_format(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> StorageFormat:
    """Return the format of FP8 codes, or of scales without codes."""
    if SUFFIXES[StorageFormat.FP8_BLOCK].scale in tensors:
        return StorageFormat.FP8_BLOCK
    weight, scale = tensors.get("weight"), tensors.get("weight_scale")
    if weight and scale and scale.dtype in E8M0S and len(weight.shape) == 2:
        rows, columns = weight.shape
        if scale.shape == (rows, -(-columns // MX_GROUP)):
            return StorageFormat.MXFP8
    blocks = config.get("quant_method") == "fp8" and scale is None
    return StorageFormat.FP8_BLOCK if blocks else StorageFormat.FP8


def _in_mxfp4(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> bool:
    """Return whether the scales, or config.json, mark compressed-tensors' FP4 codes as MXFP4."""
    scale, formats = tensors.get("weight_scale"), declared_formats(config)
    says_mxfp4 = "mxfp4-pack-quantized" in formats
    if SUFFIXES[StorageFormat.NVFP4].second in tensors:
        return False
    if scale is not None and scale.dtype in E8M0S:
        return says_mxfp4 or "nvfp4-pack-quantized" not in formats
    return says_mxfp4 and scale is None


def format_of(view: ModuleView, module: Module) -> StorageFormat | None:
    """Return the format by which `verify` judges a module; None for a plain module.

    The result is OTHER also if config.json names a format that `parts` does not know.
    """
    storage = recognize(module.tensors, view.config)
    if storage in (None, *INTEGERS, *MXFP4S, StorageFormat.MXFP8):
        return storage
    unjudged = ("mxfp6", "int-", "naive", "marlin")
    if any(name.startswith(unjudged) for name in declared_formats(view.config)):
        return StorageFormat.OTHER
    return storage


def groups(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the well-formed `config_groups` of a quantization config."""
    table = config.get("config_groups")
    for group in table.values() if isinstance(table, dict) else ():
        if isinstance(group, dict):
            yield group


def declared_formats(config: Mapping[str, Any]) -> set[str]:
    """Return every `format` that a quantization config of compressed-tensors names."""
    return {str(table.get("format")) for table in (config, *groups(config))}


def _says_integers(config: Mapping[str, Any]) -> bool:
    """Return whether a config group has weights in integers."""
    weights = (group.get("weights") for group in groups(config))
    return any(isinstance(args, dict) and args.get("type") == "int" for args in weights)


def says_nvfp4(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> bool:
    """Return whether the global scale or config.json marks codes as compressed-tensors NVFP4."""
    scale = SUFFIXES[StorageFormat.NVFP4].second
    return scale in tensors or "nvfp4-pack-quantized" in declared_formats(config)


def weight_args(storage: StorageFormat, view: ModuleView) -> Mapping[str, Any]:
    """Return what config.json says of weights in a layout; empty if the groups disagree."""
    candidates = [group["weights"] for group in _groups_of(storage, view)]
    return candidates[0] if candidates and all(args == candidates[0] for args in candidates) else {}


def integer_args(module: Module, view: ModuleView) -> Mapping[str, Any]:
    """Return what config.json says of a module's integers; of several groups, the one that fits."""
    if common := weight_args(StorageFormat.INT, view):
        return common
    groups_ = (group["weights"] for group in _groups_of(StorageFormat.INT, view))
    fitting = [args for args in groups_ if _fits(args, module)]
    return fitting[0] if fitting and all(args == fitting[0] for args in fitting) else {}


def _fits(args: Mapping[str, Any], module: Module) -> bool:
    codes, scale = (module.tensors.get(suffix) for suffix in SUFFIXES[StorageFormat.INT][:2])
    bits, size = args.get("num_bits"), args.get("group_size")
    if codes is None or scale is None or type(bits) is not int or bits < 1:
        return True  # another rule judges what is missing
    columns = codes.shape[-1] * 32 // bits if codes.shape else 0
    groups_ = -(-columns // size) if type(size) is int and size > 0 else 1
    return scale.shape[-1:] == (groups_,)


def integer_bits(module: Module, view: ModuleView) -> int | None:
    """Return the bits of packed integers in config.json; None if the number is unusable."""
    bits = integer_args(module, view).get("num_bits")
    return bits if type(bits) is int and bits in (2, 4, 8) else None


def _groups_of(storage: StorageFormat, view: ModuleView) -> list[Mapping[str, Any]]:
    """Return the groups that can describe a layout: all but the groups that contradict it."""
    return [
        group
        for group in groups(view.config)
        if isinstance(args := group.get("weights"), dict) and not _wrong(storage, args)
    ]


def _wrong(storage: StorageFormat, args: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} {str(args[key])[:40]}"
        for key, value in _DECLARED.get(storage, {}).items()
        if args.get(key, value) != value
    ]


def misdeclared(storage: StorageFormat, view: ModuleView) -> str:
    """Return what the first config group says that contradicts a layout.

    The result is empty if some group fits the layout, a group is malformed, or there is no group.
    """
    faults = []
    for group in groups(view.config):
        args = group.get("weights")
        bits = args.get("num_bits") if isinstance(args, dict) else None
        if args is not None and type(bits) is not int:
            return ""  # no loader can parse such a group
        faults.append("no weights" if args is None else ", ".join(_wrong(storage, args)))
    return faults[0] if faults and all(faults) else ""


def activations(storage: StorageFormat, view: ModuleView) -> bool | None:
    """Return whether config.json declares static activation scales; None if modules differ."""
    static = set()
    for group in _groups_of(storage, view) or groups(view.config):
        args = group.get("input_activations")
        # Dynamic per token needs no tensor; NVFP4's "local" needs the global scale.
        static.add(isinstance(args, dict) and args.get("dynamic") in (False, "local"))
    if isinstance(algorithm := view.config.get("quant_algo"), str):
        static |= _STATIC_BY_ALGORITHM.get(algorithm, {False})
    return static.pop() if len(static) == 1 else None


def weight_shape(
    storage: StorageFormat, module: Module, view: ModuleView
) -> tuple[int, int] | None:
    """Return [out, in] of a quantized module's weight; None if codes or bits are unusable."""
    codes = module.tensors.get(SUFFIXES[storage].codes) if storage in SUFFIXES else None
    if codes is None or len(codes.shape) != 2:
        return None
    rows, columns = codes.shape
    if storage is StorageFormat.INT:
        bits = integer_bits(module, view)
        return (rows, columns * 32 // bits) if bits else None
    whole = storage in E4M3S or storage is StorageFormat.INT8
    return (rows, columns if whole else columns * 2)


def parts(
    storage: StorageFormat, shape: tuple[int, int], module: Module, view: ModuleView
) -> dict[str, ExpectedTensor]:
    """Return the tensors of a module with a weight [out, in], by suffix, as loaders accept them.

    Loaders accept more than `plan` reads (E5M2 codes, weight_scale_inv in F16): upstream has no
    reference bytes for such tensors.
    """
    rows, columns = shape
    suffixes = SUFFIXES.get(storage)
    if suffixes and storage in NVFP4S:
        return {
            suffixes.codes: ExpectedTensor(("U8",), ((rows, columns // 2),)),
            suffixes.scale: ExpectedTensor(("F8_E4M3",), ((rows, columns // GROUP),)),
            suffixes.second: ExpectedTensor(("F32",), SCALAR),
            suffixes.input: ExpectedTensor(("F32",), SCALAR, False),
        }
    if suffixes and storage in MXFP4S:
        codes = ("I8", "U8") if storage is StorageFormat.MXFP4_SCALE else ("U8",)
        return {
            suffixes.codes: ExpectedTensor(codes, ((rows, columns // 2),)),
            suffixes.scale: ExpectedTensor(E8M0S, ((rows, columns // MX_GROUP),)),
        }
    if storage is StorageFormat.MXFP8:
        return {
            "weight": ExpectedTensor(("F8_E4M3",), (shape,)),
            "weight_scale": ExpectedTensor(E8M0S, ((rows, -(-columns // MX_GROUP)),)),
        }
    if suffixes and storage in FP8S:
        expected = {
            suffixes.codes: ExpectedTensor(FP8_DTYPES, (shape,)),
            suffixes.scale: ExpectedTensor(
                fp8_scale_dtypes(view.config), _fp8_scales(rows, columns, view)
            ),
        }
        if suffixes.input:
            expected[suffixes.input] = ExpectedTensor(FLOATS, SCALAR, False)
        return expected
    if storage is StorageFormat.INT8:
        return byte_parts(rows, columns, weight_args(storage, view))
    if storage is not StorageFormat.INT:
        return {}
    return packed_parts(rows, columns, integer_bits(module, view), integer_args(module, view))


def fp8_scale_dtypes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the dtypes of FP8 scales: bytes are E8M0 only if config.json says so."""
    e8m0 = config.get("scale_fmt") == "ue8m0" or config.get("quant_method") == "mxfp8"
    return (*FLOATS, *(E8M0S if e8m0 else E8M0S[1:]))


def fp8_block(view: ModuleView) -> tuple[int, int]:
    """Return the rows and columns that share a scale in FP8 weights with blocks."""
    declared = block_of(view.config.get("weight_block_size"))
    from_groups = block_of(weight_args(StorageFormat.FP8, view).get("block_structure"))
    mx = (1, MX_GROUP) if view.config.get("quant_method") == "mxfp8" else None
    return declared or from_groups or mx or DEFAULT_BLOCK


def block_of(value: object) -> tuple[int, int] | None:
    """Return the rows and columns of a block in config.json; None if `value` is no block."""
    match value:
        case [int(high), int(wide)] if high > 0 and wide > 0:
            return high, wide
    return None


def _fp8_scales(rows: int, columns: int, view: ModuleView) -> tuple[Shape, ...]:
    high, wide = fp8_block(view)
    blocks = (-(-rows // high), -(-columns // wide))
    by_strategy = {"tensor": SCALAR, "channel": ((rows, 1), (rows,)), "block": (blocks,)}
    strategy = weight_args(StorageFormat.FP8, view).get("strategy")
    if isinstance(strategy, str) and strategy in by_strategy:
        return by_strategy[strategy]
    if view.config.get("weight_block_size"):
        return (blocks,)
    return (*SCALAR, (rows, 1), (rows,), blocks)
