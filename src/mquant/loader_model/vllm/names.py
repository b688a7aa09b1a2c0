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
from mquant.loader_rows import Renames

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
_CACHE_SUFFIXES: Final = tuple(f".{x}_{end}" for end in ("scale", "zero_point") for x in "qkv")
_CACHE_ENDS: Final = ("k_scale", "v_scale", "q_scale", ".scale", "_zero_point")
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
    renames: Renames = ()
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
        renamed = rename(name, self.renames)
        if renamed is None:
            return None
        name = renamed
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


def rename(name: str, renames: Renames) -> str | None:
    """Return a name after vLLM's mapper of names; None if the mapper leaves the name out."""
    for old, new in renames:
        part = old.removeprefix("^").removesuffix("$")
        if old.startswith("^"):
            found = name.startswith(part)
        else:
            found = name.endswith(part) if old.endswith("$") else part in name
        if found and new is None:
            return None
        if found and new is not None:
            end = old.endswith("$")
            name = name.removesuffix(part) + new if end else name.replace(part, new, 1)
    return name


@dataclass
class Modules:
    """The model's modules as a tree: a layer, or a table of children by name."""

    children: dict[str, "Modules | Layer"] = field(default_factory=dict)

    def add(self, layer: Layer) -> None:
        """Put a layer at the place that the layer's name says."""
        *path, last = layer.name.split(".")
        node = self
        for place, part in enumerate(path, 1):
            child = node.children.setdefault(part, Modules())
            if not isinstance(child, Modules):
                # A layer inside a layer is loaded by the outer layer; so is a parameter that
                # vLLM's model puts into a layer.
                if isinstance(layer, Bare) and place == len(path):
                    child.parameters[last] = layer.parameters.pop("")
                return
            node = child
        node.children[last] = layer


def place(
    modules: Modules, renaming: Mapping[str, Renaming], copies: Copies, loaded: Loaded
) -> None:
    """Copy a tensor into the parameter that vLLM copies the tensor into, if there is one.

    `renaming` is that of every module with a loader of its own, by name; the whole model has the
    empty name. Raises LoadRefused if vLLM stops at the tensor, and Unknown.
    """
    name, loader = "", renaming[""]
    renamed = loader(loaded.name)
    while renamed:
        first, _, rest = renamed[0].partition(".")
        name = f"{name}.{first}" if name else first
        inner = modules.children.get(first) if name in renaming and rest else None
        if not isinstance(inner, Modules):
            _walk(modules, loader, copies, loaded, *renamed)
            return
        loader, modules, shard = renaming[name], inner, renamed[1]
        renamed = loader(rest)
        if renamed and renamed[1] is None:
            renamed = renamed[0], shard  # a place that an outer loader has found stays
    copies.used += loaded.numel  # vLLM passes over the tensor on purpose


def _walk(
    node: "Modules | Layer",
    loader: Renaming,
    copies: Copies,
    loaded: Loaded,
    path: str,
    shard: Shard,
) -> None:
    """Follow the parts of a name from module to module, as far as a layer."""
    rest = path
    while isinstance(node, Modules):
        part, dot, after = rest.partition(".")
        child = node.children.get(part)
        if child is None:
            here = path.removesuffix(f".{after}") if dot else path
            if not loader.passes_over(here):
                raise LoadRefused(loaded.name, f"vLLM builds no module or parameter {here}")
            return
        node, rest = child, after
        if not dot:
            break
    if isinstance(node, Modules):
        raise LoadRefused(loaded.name, f"vLLM's {path} is a module, not a tensor")
    _into(node, loader, copies, loaded, path, rest, shard)


def _into(
    layer: Layer,
    loader: Renaming,
    copies: Copies,
    loaded: Loaded,
    path: str,
    rest: str,
    shard: Shard,
) -> None:
    """Load a tensor into a layer; `rest` is the end of `path` below the layer."""
    part, _, after = rest.partition(".")
    whole = isinstance(layer, Bare) and not rest
    if whole or (rest and layer.loads_itself) or (part in layer.parameters and not after):
        layer.load(copies, rest, loaded, shard)
        return
    if not rest and layer.loads_itself and not layer.parameters:
        return
    nested = isinstance(layer, Bare) or part in layer.parameters
    here = path if nested or not after else path.removesuffix(f".{after}")
    if not rest or not loader.passes_over(here):
        raise LoadRefused(loaded.name, f"vLLM builds no parameter {here}")
