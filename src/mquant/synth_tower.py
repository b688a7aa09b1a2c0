"""The tensors of a larger model around the text model, as vLLM's rows of the family tell them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mquant.family import Family
from mquant.family_rows import Role
from mquant.loader_model.vllm.layers import Layer, Linear, Merged
from mquant.loader_model.vllm.model import layers_outside
from mquant.loader_rows import Settings, WrappingRows

_PLACES: Final = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True, slots=True)
class TowerTensor:
    """A tensor outside the text model, under its name on disk.

    `linear`: it is the weight of a layer that vLLM gives the quantization config.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    norm: bool
    linear: bool


def tower_tensors(family: Family, config: Mapping[str, Any]) -> Iterator[TowerTensor]:
    """Yield the tensors that a checkpoint with this config.json has outside the text model.

    `family` has the names of the checkpoint. There are none if config.json is that of the text
    model, or if the family does not tell the layers.
    """
    if family.vllm is None:
        return
    settings = Settings(family.vllm, config)
    around = settings.wrapping
    if around is None:
        return
    for row, layer in layers_outside(settings):
        for name, dtype, shape in _parts(layer, around):
            weight = name.endswith(".weight")
            norm = weight and row.kind == "norm"
            linear = weight and row.heeds and isinstance(layer, Linear)
            yield TowerTensor(_on_disk(name, family, around), dtype, shape, norm, linear)


def _parts(layer: Layer, around: WrappingRows) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield vLLM's name, the dtype and the shape of each tensor that fills a layer."""
    for parameter in layer.parameters.values():
        fused = [(old, new, place) for old, new, place in around.stacked if new in parameter.name]
        if not isinstance(layer, Merged) or not fused:
            yield parameter.name, parameter.dtype, parameter.shape
            continue
        for old, new, place in fused:
            number = _PLACES[place] if isinstance(place, str) else place
            rows = layer.outputs[number] if isinstance(number, int) else 0
            shape = (rows, *parameter.shape[1:])
            yield parameter.name.replace(new, old, 1), parameter.dtype, shape


def _on_disk(name: str, family: Family, around: WrappingRows) -> str:
    """Return the name on disk of vLLM's name: the one that the family knows as a tower's."""
    before = [
        name.replace(new, old.removeprefix("^"), 1)
        for old, new in around.renames
        if new and (name.startswith(new) if old.startswith("^") else new in name)
    ]
    roles = ((each, family.classify(each)) for each in (*before, name))
    return next((each for each, found in roles if found and found.row.role is Role.VISION), name)
