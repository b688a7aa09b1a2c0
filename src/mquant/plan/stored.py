"""Weights that lie quantized in a source: what each is made of, and the weight that it holds.

Recognised by the tensors that are there; config.json is asked for what these leave open.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from mquant.checkpoint import Checkpoint, TensorInfo
from mquant.findings import Finding, Rule, rule
from mquant.schemes import NVFP4A16, QUANTIZED_SUFFIXES

GROUP: Final = NVFP4A16.columns
# Of F16 scales upstream takes products in F16; there is nothing that writes them.
_SCALES: Final = ("F32", "BF16")
_SCALARS: Final[tuple[tuple[int, ...], ...]] = ((1,), ())
_FP8_DTYPES: Final = ("F8_E4M3", "F8_E5M2")
# Scales of what is not a weight: of no use to one that is not quantized any more.
_OF_CACHE: Final = (".k_scale", ".v_scale", ".q_scale", ".output_scale")

PART_MISSING: Final = rule(
    "part-missing",
    "error",
    "structure",
    "A quantized module has its codes and all its scales.",
    "vLLM turns its missing-weight check off for quantized models: what is missing stays "
    "uninitialised, and the model talks nonsense.",
    "Quantize again, with a tool that writes the whole module.",
    knowing=("layout",),
)
PART_SHAPE: Final = rule(
    "part-shape",
    "error",
    "structure",
    "Codes and scales of a module fit each other.",
    "vLLM copies what fits of an expert's scales, without an error.",
    "Quantize again, with a tool that writes the whole module.",
    knowing=("layout",),
)


class Form(StrEnum):
    """The layouts that can be read, by the names a person knows them by."""

    FP8_BLOCK = "FP8 in blocks"
    FP8 = "compressed-tensors FP8"
    NVFP4 = "compressed-tensors NVFP4"
    MODELOPT_NVFP4 = "ModelOpt NVFP4"


NVFP4S: Final = frozenset({Form.NVFP4, Form.MODELOPT_NVFP4})

_CODES: Final[dict[Form, tuple[str, str]]] = {
    Form.FP8_BLOCK: ("weight", "F8_E4M3"),
    Form.FP8: ("weight", "F8_E4M3"),
    Form.NVFP4: ("weight_packed", "U8"),
    Form.MODELOPT_NVFP4: ("weight", "U8"),
}
"""Where the codes are, and their dtype."""
_SECOND: Final = {
    Form.NVFP4: ("weight_global_scale", "input_global_scale"),
    Form.MODELOPT_NVFP4: ("weight_scale_2", "input_scale"),
}
"""The scale of the whole weight, and that of its input."""


@dataclass(frozen=True, slots=True)
class Stored:
    """How one weight lies in the source.

    `block` are the rows and columns that share an element of `scale`; `second` is the scale of the
    whole weight, where there is one, and `input` that of the activations.
    """

    form: Form
    codes: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]
    second: TensorInfo | None = None
    input: TensorInfo | None = None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """What is read besides the codes."""
        return (self.scale, self.second) if self.second else (self.scale,)

    def under(self, prefix: str) -> "Stored":
        """The same, with another name of the files."""

        def moved(info: TensorInfo) -> TensorInfo:
            return replace(info, shard=prefix + info.shard)

        return replace(
            self,
            codes=moved(self.codes),
            scale=moved(self.scale),
            second=moved(self.second) if self.second else None,
            input=moved(self.input) if self.input else None,
        )


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """All stored weights of a checkpoint.

    `weights` has, by the codes' name, the weight they hold as a tensor in BF16 that lies where the
    codes lie, and how; `others` are all other tensors that only a quantized checkpoint has.
    """

    weights: Mapping[str, tuple[TensorInfo, Stored]]
    others: frozenset[str]
    findings: tuple[Finding, ...]


def find_stored(checkpoint: Checkpoint, forms: Collection[Form]) -> StoredWeights | None:
    """The weights that lie in one of `forms`; None where anything is quantized in another way."""
    config = checkpoint.config.get("quantization_config")
    config = config if isinstance(config, dict) else {}
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for info in checkpoint.tensors.values():
        module, _, suffix = info.name.rpartition(".")
        modules[module][suffix] = info
    weights: dict[str, tuple[TensorInfo, Stored]] = {}
    others: set[str] = set()
    broken: list[Finding] = []
    for module, tensors in modules.items():
        others.update(i.name for i in tensors.values() if i.name.endswith(_OF_CACHE))
        if not _is_quantized(tensors):
            continue
        form = _form(tensors, config)
        if form is None or form not in forms:
            return None
        stored = _stored(form, module, tensors, config)
        if isinstance(stored, Finding):
            broken.append(stored)
        else:
            columns = stored.codes.shape[1] * (2 if form in NVFP4S else 1)
            shape = (stored.codes.shape[0], columns)
            weight = replace(stored.codes, name=f"{module}.weight", dtype="BF16", shape=shape)
            weights[stored.codes.name] = (weight, stored)
        others.update(i.name for s, i in tensors.items() if f".{s}" in QUANTIZED_SUFFIXES)
    if not weights and not broken:
        return None
    return StoredWeights(weights, frozenset(others - weights.keys()), _first(broken))


def _first(broken: list[Finding]) -> tuple[Finding, ...]:
    """The first of many findings of one kind, and how many there are."""
    if len(broken) < 2:
        return tuple(broken)
    more = f" (and {len(broken) - 1:,} more modules like it)."
    return (replace(broken[0], message=broken[0].message.removesuffix(".") + more),)


def _is_quantized(tensors: Mapping[str, TensorInfo]) -> bool:
    weight = tensors.get("weight")
    codes = weight is not None and weight.dtype in ("U8", "I8", *_FP8_DTYPES)
    return codes or any(f".{suffix}" in QUANTIZED_SUFFIXES for suffix in tensors)


def _form(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Form | None:
    method, dtype = config.get("quant_method"), ""
    if "weight" in tensors:
        dtype = tensors["weight"].dtype
    if "weight_scale_inv" in tensors or (method == "fp8" and dtype in _FP8_DTYPES):
        form, block = Form.FP8_BLOCK, _block(config.get("weight_block_size"))
        known = {"weight", "weight_scale_inv", "input_scale"}
        if method != "fp8" or block is None:
            return None
    elif "weight_scale_2" in tensors or dtype == "U8":
        form = Form.MODELOPT_NVFP4
        known = {"weight", "weight_scale", *_SECOND[form]}
    elif "weight_global_scale" in tensors or (
        dtype not in _FP8_DTYPES and "nvfp4-pack-quantized" in _formats(config)
    ):
        form = Form.NVFP4
        known = {"weight_packed", "weight_scale", *_SECOND[form]}
    elif method == "compressed-tensors" and dtype in _FP8_DTYPES:
        form, known = Form.FP8, {"weight", "weight_scale", "input_scale"}
    else:
        return None
    # What is left (zero points, an order of the columns) changes what codes mean.
    unknown = [s for s in tensors if f".{s}" in QUANTIZED_SUFFIXES and s not in known]
    return None if unknown else form


def _stored(
    form: Form, module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> Stored | Finding:
    """How a module's weight lies, or what is wrong with its parts."""
    suffix, dtype = _CODES[form]
    scale_suffix = "weight_scale_inv" if form is Form.FP8_BLOCK else "weight_scale"
    second_suffix, input_suffix = _SECOND.get(form, ("", "input_scale"))
    for needed in filter(None, (suffix, scale_suffix, second_suffix)):
        if needed not in tensors:
            there = ", ".join(sorted(tensors))
            return _broken(module, PART_MISSING, f"{module} has no {needed} beside {there}")
    codes, scale, second = tensors[suffix], tensors[scale_suffix], tensors.get(second_suffix)
    if codes.dtype != dtype or len(codes.shape) != 2 or 0 in codes.shape:
        return _odd(codes, f"{dtype} with two dimensions")
    if form in NVFP4S:
        expected = (codes.shape[0], codes.shape[1] * 2 // GROUP)
        if codes.shape[1] * 2 % GROUP or (scale.dtype, scale.shape) != ("F8_E4M3", expected):
            return _odd(scale, f"F8_E4M3 {list(expected)} for codes {list(codes.shape)}")
        for scalar in filter(None, (second, tensors.get(input_suffix))):
            if scalar.dtype != "F32" or scalar.shape not in _SCALARS:
                return _odd(scalar, "F32 [1]")
        block = (1, GROUP)
    else:
        found = _fp8_block(form, codes, scale, config)
        if found is None:
            return _odd(scale, f"F32 or BF16, one for each block of {list(codes.shape)}")
        block = found
    return Stored(form, codes, scale, block, second, tensors.get(input_suffix))


def _fp8_block(
    form: Form, codes: TensorInfo, scale: TensorInfo, config: Mapping[str, Any]
) -> tuple[int, int] | None:
    """The block of FP8 codes that shares a scale; None where the scales' shape fits none."""
    rows, columns = codes.shape
    if scale.dtype not in _SCALES:
        return None
    if form is Form.FP8:
        by_shape = {(1,): (rows, columns), (): (rows, columns), (rows, 1): (1, columns)}
        if scale.shape in by_shape:
            return by_shape[scale.shape]
        groups = [group.get("weights") for group in _groups(config)]
        blocks = [_block(args.get("block_structure")) for args in groups if isinstance(args, dict)]
    else:
        blocks = [_block(config.get("weight_block_size"))]
    for block in filter(None, blocks):
        if scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
            return block
    return None


def _block(value: object) -> tuple[int, int] | None:
    match value:
        case [int(high), int(wide)] if high > 0 and wide > 0:
            return high, wide
    return None


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    table = config.get("config_groups")
    return [g for g in table.values() if isinstance(g, dict)] if isinstance(table, dict) else []


def _formats(config: Mapping[str, Any]) -> set[str]:
    return {str(each.get("format")) for each in (config, *_groups(config))}


def _odd(info: TensorInfo, meant: str) -> Finding:
    module = info.name.rpartition(".")[0]
    sentence = f"{info.name} is {info.dtype} {list(info.shape)}, but must be {meant}"
    return _broken(module, PART_SHAPE, sentence)


def _broken(module: str, rule: Rule, sentence: str) -> Finding:
    return rule.finding(module, f"{sentence}.", "Get the checkpoint again.")


__all__ = ["GROUP", "NVFP4S", "Form", "Stored", "StoredWeights", "find_stored"]
