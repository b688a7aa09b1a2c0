"""A checkpoint as modules: which are quantized, in which layout, with which tensors.

The tensors on disk decide first, because a loader reads these tensors; config.json decides second.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from sys import intern
from typing import Any, Final

from mquant.checkpoint import Checkpoint, TensorInfo, read_json
from mquant.family import Family, TensorRole
from mquant.family_files import family_of
from mquant.family_rows import Role
from mquant.loader_model.declared import declared_config
from mquant.loader_model.stacks import unstacked
from mquant.loader_model.vllm.load import Outcome
from mquant.loader_model.vllm.predict import MODELOPT_FILE, predict
from mquant.loader_model.vllm_methods import INSTEAD
from mquant.schemes import QUANTIZED_SUFFIXES

MODELOPT_NAME: Final = MODELOPT_FILE
FP8_DTYPES: Final = ("F8_E4M3", "F8_E5M2")
_CODE_DTYPES: Final = ("U8", "I8", *FP8_DTYPES)
"""Dtypes of a `weight` that holds codes: ModelOpt and FP8 layouts keep the name `weight`."""
_BESIDE_CODES: Final = ("scale", "activation_scale")
"""Suffixes that are those of scales beside codes, and may be those of plain parameters."""


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors of one module, by suffix (`weight`, `weight_packed`, ...).

    `tensor_role` is what the family says of the module's weight; None if the family does not know
    the weight.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    tensor_role: TensorRole | None

    @property
    def role(self) -> Role | None:
        """The module's role, if the family knows the module."""
        return self.tensor_role.row.role if self.tensor_role else None

    @property
    def quantized(self) -> tuple[str, ...]:
        """The suffixes on disk that only a quantized module has; empty for a plain module."""
        return quantized_suffixes(self.tensors)


@dataclass(frozen=True)
class ModuleView:
    """A checkpoint's modules and its quantization method.

    Experts that lie in one tensor on disk are modules of their own.

    `method` is `compressed-tensors`, `modelopt`, `fp8`, another name in config.json, or empty if
    nothing says that the checkpoint is quantized. `config` is the quantization config.
    """

    checkpoint: Checkpoint
    family: Family | None
    modules: Mapping[str, Module]
    method: str
    config: Mapping[str, Any]

    @property
    def quantized(self) -> tuple[Module, ...]:
        """Modules that are quantized on disk."""
        return tuple(module for module in self.modules.values() if module.quantized)

    def of(self, *roles: Role) -> tuple[Module, ...]:
        """Return the modules of some roles."""
        return tuple(module for module in self.modules.values() if module.role in roles)

    @cached_property
    def outcome(self) -> Outcome:
        """What vLLM does with the checkpoint, or why it is not known."""
        if self.vllm_method != self.method:
            return Outcome(unknown=f"the quantization method {self.vllm_method}")
        return predict(self.checkpoint, self.family)

    @property
    def vllm_method(self) -> str:
        """The method that vLLM takes: `method`, or a method of the model_type's own instead."""
        kind = self.checkpoint.config.get("model_type")
        return INSTEAD.get(str(kind), {}).get(self.method, self.method)

    @property
    def ignore(self) -> tuple[str, ...]:
        """The entries that keep modules from being quantized, under any of the methods' keys."""
        first = ("ignored_layers",) if self.method == "fp8" else ()
        for key in (*first, "ignore", "exclude_modules", "modules_to_not_convert"):
            entries = self.config.get(key)
            if isinstance(entries, list) and entries:
                return tuple(entry for entry in entries if isinstance(entry, str))
        return ()


def read_modules(checkpoint: Checkpoint, families: Mapping[str, Family]) -> ModuleView:
    """Group a checkpoint's tensors by module and find out how it was quantized."""
    family = family_of(checkpoint.config, families, checkpoint.tensors)
    modules = {
        name: Module(name, tensors, family.classify(f"{name}.weight") if family else None)
        for name, tensors in by_module(unstacked(checkpoint, family)).items()
    }
    method, config = method_of(checkpoint)
    return ModuleView(checkpoint, family, modules, method, config)


def by_module(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors of a checkpoint by the name of their module and by suffix."""
    grouped: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for info in tensors.values():
        module, _, suffix = info.name.rpartition(".")
        grouped[module][intern(suffix)] = info
    return grouped


def quantized_suffixes(tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return the sorted suffixes of one module's tensors that only a quantized module has."""
    suffixes = [suffix for suffix in tensors if f".{suffix}" in QUANTIZED_SUFFIXES]
    weight = tensors.get("weight")
    if weight is not None and weight.dtype in _CODE_DTYPES:
        suffixes += ["weight", *(suffix for suffix in _BESIDE_CODES if suffix in tensors)]
    if "blocks" in tensors and "scales" in tensors:
        suffixes.append("blocks")
    return tuple(sorted(suffixes))


def method_of(checkpoint: Checkpoint) -> tuple[str, Mapping[str, Any]]:
    """Return the quantization method and config, of config.json or of ModelOpt's own file.

    The method is empty, and the config too, if nothing says that the checkpoint is quantized.
    """
    config = declared_config(checkpoint)
    if config is not None:
        method = config.get("quant_method")
        return (method if isinstance(method, str) else "unknown"), config
    if MODELOPT_NAME in checkpoint.source.files:
        content = read_json(checkpoint.source, MODELOPT_NAME)
        # Newer releases of ModelOpt write the keys flat, as in config.json.
        table = content.get("quantization", content)
        table = table if isinstance(table, dict) else {}
        method = table.get("quant_method")
        return (method if isinstance(method, str) else "modelopt"), table
    return "", {}
