"""How quantized modules lie on disk: the parts each layout has, and their dtypes and shapes.

A layout is recognised by the tensors that are there, since that is what a loader meets; what
config.json declares decides only what the tensors leave open.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from mquant.loader_model.modules import FP8_DTYPES, Module, ModuleView

Shape = tuple[int, ...]

GROUP: Final = 16
"""Elements along a row that share an NVFP4 block scale."""
SCALAR: Final[tuple[Shape, ...]] = ((1,), ())
FP8_BLOCK: Final = (128, 128)
_FLOATS: Final = ("F32", "BF16", "F16")


# What vLLM 0.32 knows (QUANTIZATIONMETHODS), and names that transformers has beside those.
METHODS: Final = frozenset(
    {
        "auto_awq",
        "auto_gptq",
        "awq",
        "awq_marlin",
        "bitsandbytes",
        "compressed-tensors",
        "deepseek_v4_fp8",
        "experts_int8",
        "fbgemm_fp8",
        "fp8",
        "fp8_per_block",
        "fp8_per_channel",
        "fp8_per_tensor",
        "fp_quant",
        "gpt_oss_mxfp4",
        "gptq",
        "gptq_marlin",
        "hqq",
        "humming",
        "inc",
        "int8_per_channel_weight_only",
        "modelopt",
        "modelopt_fp4",
        "modelopt_mixed",
        "modelopt_mxfp8",
        "moe_wna16",
        "mxfp4",
        "mxfp8",
        "nvfp4_per_token",
        "online",
        "quark",
        "torchao",
    }
)


class Kind(StrEnum):
    """The layouts whose parts are known here. OTHER is quantized in a way that is not judged."""

    NVFP4 = "NVFP4"
    MODELOPT_NVFP4 = "ModelOpt NVFP4"
    FP8 = "FP8"
    INT = "packed integers"
    OTHER = "other"


CODES: Final[dict[Kind, str]] = {
    Kind.NVFP4: "weight_packed",
    Kind.MODELOPT_NVFP4: "weight",
    Kind.FP8: "weight",
    Kind.INT: "weight_packed",
}
"""Where the codes of the weight are."""

_DECLARED: Final[dict[Kind, dict[str, object]]] = {
    Kind.NVFP4: {"type": "float", "num_bits": 4, "group_size": GROUP},
    Kind.FP8: {"type": "float", "num_bits": 8},
    Kind.INT: {"type": "int"},
}
"""What `weights` of a config group must say where it says anything."""


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor of a quantized module: the dtypes and shapes it may have."""

    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    required: bool = True


def kind_of(view: ModuleView, module: Module) -> Kind | None:
    """How a module is quantized, or None for a plain one."""
    if not module.quantized:
        return None
    tensors = module.tensors
    weight, packed = tensors.get("weight"), tensors.get("weight_packed")
    formats = {str(group.get("format")) for group in groups(view)}
    formats.add(str(view.config.get("format")))
    if "weight_shape" in tensors or (packed is not None and packed.dtype == "I32"):
        return Kind.INT
    if any(name.startswith(("mxfp", "int-", "naive", "marlin")) for name in formats):
        return Kind.OTHER
    if "weight_scale_2" in tensors or (weight is not None and weight.dtype == "U8"):
        fp8 = weight is not None and weight.dtype in FP8_DTYPES
        return Kind.FP8 if fp8 else Kind.MODELOPT_NVFP4
    if weight is not None and weight.dtype in FP8_DTYPES:
        return Kind.FP8
    if packed is not None or "weight_global_scale" in tensors:
        return Kind.NVFP4
    if "nvfp4-pack-quantized" in formats:
        return Kind.NVFP4
    if {"qweight", "qzeros", "scales", "g_idx"} & tensors.keys():
        return Kind.OTHER
    return Kind.FP8 if {"weight_scale", "weight_scale_inv"} & tensors.keys() else Kind.OTHER


def groups(view: ModuleView) -> Iterator[Mapping[str, Any]]:
    """The well-formed `config_groups` of the quantization config."""
    table = view.config.get("config_groups")
    for group in table.values() if isinstance(table, dict) else ():
        if isinstance(group, dict):
            yield group


def weight_args(kind: Kind, view: ModuleView) -> Mapping[str, Any]:
    """What config.json says of weights in a layout; nothing where several groups may be meant."""
    found = [group["weights"] for group in _groups_of(kind, view)]
    return found[0] if found and all(args == found[0] for args in found) else {}


def integer_bits(view: ModuleView) -> int | None:
    """How many bits config.json says packed integers have; None where that cannot be."""
    bits = weight_args(Kind.INT, view).get("num_bits")
    return bits if type(bits) is int and bits in (2, 4, 8) else None


def _groups_of(kind: Kind, view: ModuleView) -> list[Mapping[str, Any]]:
    """The groups that can be of a layout: all but those that say otherwise."""
    return [
        group
        for group in groups(view)
        if isinstance(args := group.get("weights"), dict) and not _wrong(kind, args)
    ]


def _wrong(kind: Kind, args: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} {str(args[key])[:40]}"
        for key, value in _DECLARED.get(kind, {}).items()
        if args.get(key, value) != value
    ]


def misdeclared(kind: Kind, view: ModuleView) -> str:
    """What no config group of compressed-tensors should say of a layout, but the first one does.

    Empty where some group fits, or none is there to be judged.
    """
    said = []
    for group in groups(view):
        args = group.get("weights")
        if args is not None and not isinstance(args, dict):
            return ""  # no loader can parse that
        said.append("no weights" if args is None else ", ".join(_wrong(kind, args)))
    return said[0] if said and all(said) else ""


def activations(kind: Kind, view: ModuleView) -> bool | None:
    """Whether static scales of activations are declared; None where some modules may have them."""
    said = set()
    for group in _groups_of(kind, view) or groups(view):
        args = group.get("input_activations")
        # Dynamic per token needs no tensor; NVFP4's "local" needs the global scale.
        said.add(isinstance(args, dict) and args.get("dynamic") in (False, "local"))
    algorithm = view.config.get("quant_algo")
    if algorithm in ("NVFP4", "FP8"):
        said.add(True)
    elif isinstance(algorithm, str):
        said.add(False)
    return said.pop() if len(said) == 1 else None


def weight_shape(kind: Kind, module: Module, view: ModuleView) -> tuple[int, int] | None:
    """[out, in] of the weight that a quantized module holds; None where its codes are missing."""
    codes = module.tensors.get(CODES.get(kind, ""))
    if codes is None or len(codes.shape) != 2:
        return None
    rows, columns = codes.shape
    if kind is Kind.INT:
        bits = integer_bits(view)
        return (rows, columns * 32 // bits) if bits else None
    return (rows, columns if kind is Kind.FP8 else columns * 2)


def parts(
    kind: Kind, module: Module, shape: tuple[int, int], view: ModuleView
) -> dict[str, ExpectedTensor]:
    """What a module with a weight of [out, in] is made of, by suffix."""
    rows, columns = shape
    if kind in (Kind.NVFP4, Kind.MODELOPT_NVFP4):
        theirs = kind is Kind.MODELOPT_NVFP4
        return {
            CODES[kind]: ExpectedTensor(("U8",), ((rows, columns // 2),)),
            "weight_scale": ExpectedTensor(("F8_E4M3",), ((rows, columns // GROUP),)),
            ("weight_scale_2" if theirs else "weight_global_scale"): ExpectedTensor(
                ("F32",), SCALAR
            ),
            ("input_scale" if theirs else "input_global_scale"): ExpectedTensor(
                ("F32",), SCALAR, False
            ),
        }
    if kind is Kind.FP8:
        inverse = "weight_scale_inv" in module.tensors or view.method == "fp8"
        return {
            "weight": ExpectedTensor(FP8_DTYPES, (shape,)),
            ("weight_scale_inv" if inverse else "weight_scale"): ExpectedTensor(
                _FLOATS, _fp8_scales(rows, columns, view)
            ),
            "input_scale": ExpectedTensor(_FLOATS, SCALAR, False),
        }
    return _integers(rows, columns, view) if kind is Kind.INT else {}


def fp8_block(view: ModuleView) -> tuple[int, int]:
    """The block that shares a scale in FP8 weights with blocks."""
    for block in (
        view.config.get("weight_block_size"),
        weight_args(Kind.FP8, view).get("block_structure"),
    ):
        if (
            isinstance(block, list)
            and len(block) == 2
            and all(type(n) is int and n > 0 for n in block)
        ):
            return block[0], block[1]
    return FP8_BLOCK


def _fp8_scales(rows: int, columns: int, view: ModuleView) -> tuple[Shape, ...]:
    high, wide = fp8_block(view)
    blocks = (-(-rows // high), -(-columns // wide))
    by_strategy = {"tensor": SCALAR, "channel": ((rows, 1), (rows,)), "block": (blocks,)}
    strategy = weight_args(Kind.FP8, view).get("strategy")
    if isinstance(strategy, str) and strategy in by_strategy:
        return by_strategy[strategy]
    if view.config.get("weight_block_size"):
        return (blocks,)
    return (*SCALAR, (rows, 1), (rows,), blocks)


def _integers(rows: int, columns: int, view: ModuleView) -> dict[str, ExpectedTensor]:
    args = weight_args(Kind.INT, view)
    bits, size = integer_bits(view), args.get("group_size")
    if bits is None or not columns:
        # Nothing says how many codes are in an integer, or the codes are missing.
        scales: tuple[Shape, ...] = ()
        zeros: tuple[Shape, ...] = ()
        packed: tuple[Shape, ...] = ()
    else:
        count = -(-columns // (size if type(size) is int and size > 0 else columns))
        scales = ((rows, count),)
        zeros = ((-(-rows * bits // 32), count), (rows, count))
        packed = ((rows, columns * bits // 32),)
    symmetric = args.get("symmetric") is not False
    return {
        "weight_packed": ExpectedTensor(("I32",), packed),
        "weight_scale": ExpectedTensor(_FLOATS, scales),
        "weight_shape": ExpectedTensor(("I64", "I32"), ((2,),)),
        "weight_zero_point": ExpectedTensor((*_FLOATS, "I32", "I8"), zeros, not symmetric),
        "weight_g_idx": ExpectedTensor(("I32",), ((columns,),) if packed else (), False),
    }


__all__ = [
    "CODES",
    "GROUP",
    "METHODS",
    "ExpectedTensor",
    "Kind",
    "activations",
    "fp8_block",
    "groups",
    "integer_bits",
    "kind_of",
    "misdeclared",
    "parts",
    "weight_args",
    "weight_shape",
]
