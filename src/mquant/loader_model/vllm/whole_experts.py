"""The loader of models that take all experts of a layer in one tensor, with biases.

The source is vLLM 0.32's `gpt_oss.py`: `_load_weights_other` and `GptOssRoutedExperts`. Names are
those below the text model's `model.`. Tensors have columns before rows.
"""

import re
from dataclasses import replace
from typing import Final

from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.layers import Bare, Layer
from mquant.loader_model.vllm.table import Table
from mquant.loader_model.vllm.tensors import Copies, Loaded, LoadRefused, View

_ONE: Final = re.compile(
    r"(.*?\.mlp\.experts)\.([0-9]+)\.((w13|w2)_(?:weight|bias|weight_scale|weight_packed))"
)
_WHOLE: Final = (".w13_weight", ".w2_weight", ".w13_bias", ".w2_bias")
_FLAT: Final = ("weight", "weight_packed")


class WholeExperts(Table):
    """The parameters of vLLM's model by name; tensors without a parameter are passed over."""

    def place_below(self, copies: Copies, name: str, loaded: Loaded) -> None:
        """Copy a tensor of the model below `model.`, by its name there, as `load_weights` does."""
        match = _ONE.fullmatch(name)
        experts = self._experts.get(match[1]) if match else None
        if match and experts and match[3] in experts.parameters:
            _copy_one(copies, experts, match, loaded)
            return
        if part := next((part for part in _WHOLE if part in name), None):
            self._copy_all(copies, name, part, loaded)
            return
        if "sinks" in name:
            _, target = self._target(name, loaded)
            heads = self._model.settings.number("num_attention_heads") or 0
            copies.copy(target, loaded.narrow(0, 0, heads))
            return
        for old, new, shard in self._model.renaming["model"].stacked:
            if old in name:
                layer, key = self._find(name.replace(old, new), loaded)
                layer.load(copies, key, loaded, shard)
                return
        if name in self._parameters:
            layer, key = self._find(name, loaded)
            layer.load(copies, key, loaded, None)

    def _copy_all(self, copies: Copies, name: str, part: str, loaded: Loaded) -> None:
        """Copy a tensor of all experts, or their biases."""
        layer, target = self._target(name, loaded)
        if not isinstance(layer, Experts):
            raise LoadRefused(loaded.name, "is no tensor of experts")
        if part != ".w2_bias":
            size = layer.intermediate * (2 if part.startswith(".w13") else 1)
            dim = 2 if part == ".w13_weight" else 1
            if dim >= len(loaded.shape):
                raise LoadRefused(loaded.name, f"has shape {list(loaded.shape)}")
            loaded = loaded.narrow(dim, 0, min(size, loaded.shape[dim]))
        if part.endswith("_weight"):
            if len(loaded.shape) != 3:
                raise LoadRefused(loaded.name, f"has shape {list(loaded.shape)}, not of experts")
            first, second, third = loaded.shape
            loaded = replace(loaded, shape=(first, third, second))
        copies.copy(target, loaded)

    def _target(self, name: str, loaded: Loaded) -> tuple[Layer, View]:
        name = name.replace(".experts.routed_experts.", ".experts.")
        if name not in self._parameters:
            raise LoadRefused(loaded.name, f"vLLM builds no parameter {name}")
        layer, key = self._parameters[name]
        return layer, layer.parameters["" if isinstance(layer, Bare) else key].whole()


def _copy_one(copies: Copies, layer: Experts, match: re.Match[str], loaded: Loaded) -> None:
    """Copy a tensor of one expert, whose gate and up are one matrix."""
    number, key, which = int(match[2]), match[3], match[4]
    target = layer.parameters[key].whole().index(number)
    rows, kind = target.shape[0] if target.shape else 1, key.partition("_")[2]
    if kind == "bias":
        if which == "w13":
            loaded = _first(loaded, 0, rows)
    elif "w2_weight_packed" in layer.parameters:
        if kind in _FLAT and loaded.shape and loaded.shape[0]:
            loaded = loaded.reshape((loaded.shape[0], loaded.numel // loaded.shape[0]))
        last = len(loaded.shape) - 1
        loaded = _first(loaded, *((0, rows) if which == "w13" else (last, target.shape[-1])))
    else:
        side = rows if which == "w13" else (*target.shape, 1, 1)[1]
        loaded = _first(loaded, 1 if which == "w13" else 0, side)
        if len(loaded.shape) > 2:
            raise LoadRefused(loaded.name, f"has shape {list(loaded.shape)}, not of a matrix")
        loaded = replace(loaded, shape=loaded.shape[::-1])
    _into_corner(copies, target, loaded)


def _first(loaded: Loaded, dim: int, size: int) -> Loaded:
    if not -len(loaded.shape) <= dim < len(loaded.shape):
        raise LoadRefused(loaded.name, f"has shape {list(loaded.shape)}, without dimension {dim}")
    return loaded.narrow(dim, 0, min(size, loaded.shape[dim]))


def _into_corner(copies: Copies, target: View, loaded: Loaded) -> None:
    while len(loaded.shape) > len(target.shape) and loaded.shape[-1] == 1:
        loaded = replace(loaded, shape=loaded.shape[:-1])
    for dim in range(min(len(target.shape), len(loaded.shape))):
        target = target.narrow(dim, 0, min(target.shape[dim], loaded.shape[dim]))
    copies.copy(target, loaded)
