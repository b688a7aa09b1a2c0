"""The loader of models that look every name up in one table of parameters.

The sources are vLLM 0.32's `DeepseekV2Model.load_weights` and
`GraniteMoeHybridModel.load_weights`. Names are those below the text model's `model.`.
"""

import re
from collections import defaultdict
from dataclasses import replace
from typing import Final

from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.layers import Bare, Layer
from mquant.loader_model.vllm.model import Model
from mquant.loader_model.vllm.names import Renaming, place, rename
from mquant.loader_model.vllm.tensors import Copies, Loaded, LoadRefused, Unknown

_EXPERT: Final = re.compile(r"(.*\bexperts)\.((\d+)\.([^.]+)\.(.+))")
_OUTER: Final = "model."
_PAIR: Final = ("w13_", "w2_")
_INDEXER_KEY: Final = re.compile(r"(.*indexer\.)wk\.(.*)")


class Table:
    """The parameters of vLLM's model by name, and how a tensor's name reaches one."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._parameters: dict[str, tuple[Layer, str]] = {}
        self._experts: dict[str, Experts] = {}
        self._stacks: dict[str, tuple[Experts, str]] = {}
        self._found = tuple(f"{w}{part}" for part in model.rows.expert_parts for w in _PAIR)
        self._lenient = model.rows.skips_unknown
        self._outer = model.inside + _OUTER
        # Fused layers outside the text model may have the names of the text model's.
        self._outermost = replace(model.renaming[""], stacked=())
        self._waiting: dict[str, dict[bool, Loaded]] = defaultdict(dict)
        for layer in model.layers:
            if not layer.name.startswith(self._outer):
                continue
            name = layer.name.removeprefix(self._outer)
            if isinstance(layer, Experts):
                self._experts[name] = layer
                above = name.rpartition(".")[0]
                self._stacks |= {f"{above}.{stack}": (layer, stack) for stack in layer.stacks}
            for key in layer.parameters:
                self._parameters[f"{name}.{key}" if key else name] = (layer, key)

    def place(self, copies: Copies, loaded: Loaded) -> None:
        """Copy a tensor into its parameter. Raises LoadRefused if vLLM stops at the tensor."""
        model = self._model
        outer = self._outermost(loaded.name)
        if outer is None:
            copies.used += loaded.numel  # vLLM passes over the tensor on purpose
            return
        if not outer[0].startswith(self._outer):
            place(model.modules, model.renaming, copies, loaded)
            return
        self._check_turned(loaded)
        inner = model.renaming[f"{model.inside}model"]
        name = rename(outer[0].removeprefix(self._outer), inner.renames)
        if name is None or name.startswith(inner.drops or ("\0",)):
            copies.used += loaded.numel
            return
        self.place_below(copies, name, loaded)

    def place_below(self, copies: Copies, name: str, loaded: Loaded) -> None:
        """Copy a tensor of the model below `model.`, by its name there, as `load_weights` does."""
        inner = self._model.renaming[f"{self._model.inside}model"]
        if self._dequantized(copies, name, loaded) or self._stack(copies, name, loaded):
            return
        for old, new, shard in inner.stacked:
            if old not in name or (".experts." in name and name not in self._parameters):
                continue
            mapped = name.replace(old, new)
            if self._lenient and self._passes_over(mapped, inner):
                continue
            name = mapped
            if name.endswith(".bias") and self._passes_over(name, inner):
                continue
            layer, key = self._find(name, loaded)
            layer.load(copies, key, loaded, shard)
            return
        if self._expert(copies, name, loaded):
            return
        if self._passes_over(name, inner):
            return
        layer, key = self._find(name, loaded)
        layer.load(copies, key, loaded, None)

    def _check_turned(self, loaded: Loaded) -> None:
        """Raise LoadRefused if vLLM cannot reorder the rows of a head, two by two."""
        model, (*path, last) = self._model, loaded.name.split(".")
        scale = last == "weight_scale" and loaded.numel > 1
        if not (scale or last in ("weight", "weight_packed")):
            return
        for module, key in model.rows.turned.items():
            heads = model.settings.number(key) or 0
            if module not in path:
                continue
            rows = loaded.shape[0] if len(loaded.shape) in (1, 2) else 0
            if not heads or not rows or rows % (2 * heads):
                shape = list(loaded.shape)
                raise LoadRefused(
                    loaded.name, f"has shape {shape}, no pairs of rows of {heads} heads"
                )

    def _passes_over(self, name: str, inner: Renaming) -> bool:
        return name not in self._parameters and (self._lenient or name.endswith(inner.ignores))

    def _stack(self, copies: Copies, name: str, loaded: Loaded) -> bool:
        """Load a tensor of all experts; return whether it is one."""
        module, _, suffix = name.rpartition(".")
        if name in self._stacks:
            module, suffix = name, "weight"
        if module not in self._stacks:
            if any(name.startswith(f"{known}_") for known in self._stacks):  # scales in FP8
                raise Unknown(f"experts in one tensor ({loaded.name})")
            return False
        experts, stack = self._stacks[module]
        experts.load_stack(copies, stack, loaded, suffix)
        return True

    def _dequantized(self, copies: Copies, name: str, loaded: Loaded) -> bool:
        """Load an indexer's key in FP8, which vLLM dequantizes; return whether it is one.

        vLLM waits until it has both the weight and the scales; without one, the place stays empty.
        """
        match = _INDEXER_KEY.fullmatch(name)
        scale = match is not None and "weight_scale" in match[2]
        weight = match is not None and name.endswith(".weight") and loaded.dtype == "F8_E4M3"
        if match is None or not (weight or scale):
            return False
        both = self._waiting[match[1]]
        both[weight] = loaded
        if len(both) == 2:
            del self._waiting[match[1]]
            layer, key = self._find(f"{match[1]}wk_weights_proj.weight", loaded)
            layer.load(copies, key, replace(both[True], dtype="BF16"), 0)
        copies.used = loaded.numel
        return True

    def _expert(self, copies: Copies, name: str, loaded: Loaded) -> bool:
        """Load a tensor of an expert that the model has; return whether it is one."""
        match = _EXPERT.fullmatch(name)
        experts = self._experts.get(match[1]) if match else None
        if match is None or experts is None or match[4] not in experts.names:
            return False
        if int(match[3]) >= experts.count or str(int(match[3])) != match[3]:
            return False
        key = ("w2_" if match[4] == experts.names[1] else "w13_") + match[5]
        if key not in experts.parameters and self._lenient:
            return True
        if key not in experts.parameters or not key.startswith(self._found or ("",)):
            raise LoadRefused(loaded.name, f"vLLM's {experts.name} has no parameter {match[5]}")
        experts.load(copies, match[2], loaded, None)
        return True

    def _find(self, name: str, loaded: Loaded) -> tuple[Layer, str]:
        if name not in self._parameters:
            raise LoadRefused(loaded.name, f"vLLM builds no parameter {name}")
        layer, key = self._parameters[name]
        if isinstance(layer, Experts):
            raise LoadRefused(loaded.name, "is a parameter of the loaded model's experts")
        if isinstance(layer, Bare):
            return layer, ""
        return layer, key
