"""The names that vLLM gives a checkpoint's tensors, and the way from a name to a parameter.

vLLM renames each tensor (`WeightsMapper`), then follows the parts of the name from module to module
(`AutoWeightsLoader`), once for the whole model and once for the model below `model.`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from mquant.loader_model.vllm.layers import Bare, Layer, Shard
from mquant.loader_model.vllm.tensors import Copies, Loaded, LoadRefused

_CACHE_SCALES: Final = (
    (r"\.kv_scale$", ".attn.k_scale"),
    (r"\.self_attn\.[kv]_proj\.([kv])_scale$", r".self_attn.attn.\1_scale"),
    (r"\.self_attn\.qk(?:qk)?v_proj\.([kv])_scale$", r".self_attn.attn.\1_scale"),
    (r"\.mixer\.[kv]_proj\.([kv])_scale$", r".mixer.attn.\1_scale"),
    (r"\.self_attn\.q\.scale$", ".self_attn.attn.q_scale"),
    (r"\.self_attn\.([kv])_cache\.scale$", r".self_attn.attn.\1_scale"),
    (r"(?<!\.attn)\.([qkv])_scale$", r".attn.\1_scale"),
    (r"(?<!\.attn)\.([qkv])_zero_point$", r".attn.\1_zero_point"),
)
_CACHE_NAMES: Final = tuple((re.compile(old), new) for old, new in _CACHE_SCALES)
_CACHE_ENDS: Final = (*(f".{x}_scale" for x in ("q", "k", "v", "kv")), ".scale", "_zero_point")
"""The ends of all names that one of the patterns matches: few names have one."""
_CACHE_SUFFIXES: Final = tuple(f".{x}_{end}" for end in ("scale", "zero_point") for x in "qkv")
_UNUSED: Final = tuple(
    f"rotary_{end}"
    for end in ("pos_emb.inv_freq", "emb.inv_freq", "emb.cos_cached", "emb.sin_cached")
)


@dataclass(frozen=True)
class Renaming:
    """The renaming of one loader. `stacked` is part of a name -> vLLM's, and the matrix's place.

    `drops` are prefixes of tensors that vLLM leaves out. `quantized`: whether the loader sees the
    quantization config, and so renames scales of the KV cache.
    """

    stacked: tuple[tuple[str, str, Shard], ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    drops: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    quantized: bool = False
    suffixes: tuple[tuple[str, str], ...] = ()
    """Ends of names that the quantization method renames."""

    def __call__(self, name: str) -> tuple[str, Shard] | None:
        """Return vLLM's name and the place in a fused layer; None if vLLM leaves the tensor out."""
        if self.quantized and name.endswith(_CACHE_ENDS):
            for pattern, new in _CACHE_NAMES:
                name = pattern.sub(new, name)
        for old, new in self.renames:
            name = name.replace(old, new, 1)
        if "rotary_" in name and any(part in name for part in _UNUSED):
            return None
        shard: Shard = None
        for old, new, place in self.stacked:
            if old in name:
                name, shard = name.replace(old, new, 1), place
        if name.startswith(self.drops) if self.drops else False:
            return None
        for old, new in self.suffixes:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if self.quantized and name.endswith(".g_idx"):
            return None
        return name, shard

    def passes_over(self, name: str) -> bool:
        """Return whether the loader passes over a module or parameter that the model lacks."""
        suffixes = (".bias", *self.ignores, *(_CACHE_SUFFIXES if self.quantized else ()))
        return name.endswith(suffixes) or f"{name}.".endswith(suffixes)


@dataclass
class Modules:
    """The model's modules as a tree: a layer, or a table of children by name."""

    children: dict[str, "Modules | Layer"] = field(default_factory=dict)

    def add(self, layer: Layer) -> None:
        """Put a layer at the place that the layer's name says."""
        *path, last = layer.name.split(".")
        node = self
        for part in path:
            child = node.children.setdefault(part, Modules())
            if not isinstance(child, Modules):
                return  # a layer inside a layer: loaded by the outer layer
            node = child
        node.children[last] = layer


def place(
    modules: Modules, renaming: Mapping[str, Renaming], copies: Copies, loaded: Loaded
) -> None:
    """Copy a tensor into the parameter that vLLM copies the tensor into, if there is one.

    `renaming` is that of the whole model, under the empty name, and that of the model below
    `model.`. Raises LoadRefused if vLLM stops at the tensor.
    """
    loader = renaming[""]
    renamed = loader(loaded.name)
    first, _, rest = renamed[0].partition(".") if renamed else ("", "", "")
    inner = modules.children.get(first) if first in renaming and rest else None
    if isinstance(inner, Modules):
        loader, modules, renamed = renaming[first], inner, renaming[first](rest)
    if renamed is None:
        copies.used[loaded.name] += loaded.numel  # vLLM passes over the tensor on purpose
    else:
        _walk(modules, loader, copies, loaded, *renamed)


def _walk(
    node: "Modules | Layer",
    loader: Renaming,
    copies: Copies,
    loaded: Loaded,
    path: str,
    shard: Shard,
) -> None:
    parts = path.split(".")
    for number, part in enumerate(parts):
        if isinstance(node, Modules):
            child = node.children.get(part)
        elif node.loads_itself:
            node.load(copies, ".".join(parts[number:]), loaded, shard)
            return
        else:
            child, last = None, number == len(parts) - 1
            if isinstance(node, Bare) or (not last and part in node.parameters):
                if not loader.passes_over(path):
                    here = ".".join(parts[: number + 1])
                    raise LoadRefused(loaded.name, f"vLLM's {here} is no module")
                return
            if part in node.parameters:
                node.load(copies, part, loaded, shard)
                return
        if child is None:
            here = ".".join(parts[: number + 1])
            if not loader.passes_over(here):
                raise LoadRefused(loaded.name, f"vLLM builds no module or parameter {here}")
            return
        node = child
    if isinstance(node, Bare):
        node.load(copies, "", loaded, shard)
    elif not (isinstance(node, Layer) and node.loads_itself and not node.parameters):
        raise LoadRefused(loaded.name, f"vLLM's {path} is a module, not a tensor")
