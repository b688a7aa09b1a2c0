"""Model families: what a tensor's name means. One YAML file each, in `configs/`.

A family lists every tensor its checkpoints may hold, as exact names with `{layer}` and
`{expert}` in place of numbers. A name that no row matches is unknown, and nothing is done to
unknown tensors: mquant stops and names them.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mquant.data import folder, read_yaml
from mquant.errors import DataFileError

_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)")
_SHAPE = re.compile(r"[a-z_0-9]+(?: \* [a-z_0-9]+)*")


class Role(StrEnum):
    """What a tensor is for. Recipes speak of roles only, never of names."""

    EXPERT = "expert"
    ATTENTION = "attention"
    ROUTER = "router"
    ROUTING_BIAS = "routing_bias"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    OTHER = "other"

    @property
    def linear(self) -> bool:
        """Whether it is the weight of a linear layer (what `targets: Linear` means)."""
        return self in (Role.EXPERT, Role.ATTENTION, Role.ROUTER, Role.HEAD)

    @property
    def refused_by_loaders(self) -> bool:
        """Whether engines refuse, or wrongly load, a checkpoint that has this quantized."""
        return self in (Role.ROUTER, Role.EMBEDDING, Role.HEAD)


def _distinct(rows: "tuple[TensorRow, ...]") -> "tuple[TensorRow, ...]":
    twice = [key for key, count in Counter(row.key for row in rows).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} has two rows")
    return rows


def _product(text: str) -> str:
    if not _SHAPE.fullmatch(text):
        raise ValueError(f"{text!r} is no product of config keys and numbers")
    return text


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorRow(_Data):
    """One row of a family's `tensors`: a name, with {layer} and {expert} for numbers."""

    name: str
    role: Role
    shape: tuple[Annotated[str, AfterValidator(_product)], ...] = ()
    dtype: str = "BF16"
    fused: str = ""
    block: str = "layer"
    """Rows of one block stand or fall together: a layer has all of them or none."""

    @cached_property
    def key(self) -> str:
        """The name with every placeholder as `#`."""
        return self.name.replace("{layer}", "#").replace("{expert}", "#")

    def format(self, layer: int | None, expert: int | None) -> str:
        """The tensor's name in a given layer, for a given expert."""
        return self.name.replace("{layer}", str(layer)).replace("{expert}", str(expert))


class ConfigKeys(_Data):
    """Which keys of config.json say what; empty where the family has no such thing."""

    layers: str
    context: str
    vocabulary: str
    hidden: str
    intermediate: str
    experts: str = ""
    top_k: str = ""
    mtp: str = ""


class SynthData(_Data):
    """What `mquant synth` writes: a config.json of the real size, and what makes it tiny."""

    config: dict[str, Any]
    tiny: dict[str, Any]
    per_layer: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a tensor's name says: its row in the family, its layer and expert."""

    row: TensorRow
    layer: int | None
    expert: int | None


class Family(_Data):
    """A model family, as its file in `configs/` describes it."""

    name: str
    title: str
    model_types: tuple[str, ...]
    config: ConfigKeys
    tensors: Annotated[tuple[TensorRow, ...], AfterValidator(_distinct)]
    in_memory: tuple[tuple[str, str], ...] = ()
    unpruned_experts: int | None = None
    required_config: tuple[str, ...] = ()
    synth: SynthData

    @cached_property
    def _rows(self) -> dict[str, TensorRow]:
        return {row.key: row for row in self.tensors}

    @cached_property
    def fused_sets(self) -> Mapping[str, tuple[TensorRow, ...]]:
        """Fused set -> its member rows, in the family's order."""
        sets: dict[str, tuple[TensorRow, ...]] = {}
        for row in self.tensors:
            if row.fused:
                sets[row.fused] = (*sets.get(row.fused, ()), row)
        return sets

    @cached_property
    def shape_keys(self) -> tuple[str, ...]:
        """The keys of config.json that the tensors' shapes are made of."""
        factors = {f for row in self.tensors for size in row.shape for f in size.split(" * ")}
        return tuple(sorted(factor for factor in factors if not factor.isdigit()))

    def classify(self, name: str) -> Meaning | None:
        """What the tensor is, or None where the family does not know it."""
        row = self._rows.get(_NUMBER.sub("#", name))
        if row is None or "#" in name:
            return None
        numbers = [int(number) for number in _NUMBER.findall(name)]
        layer = numbers.pop(0) if "{layer}" in row.name else None
        expert = numbers.pop(0) if "{expert}" in row.name else None
        return Meaning(row, layer, expert)

    def in_memory_name(self, name: str) -> str:
        """The name transformers gives the same tensor, or module, in a loaded model."""
        probe = f"{name}."
        for old, new in self.in_memory:
            probe = probe.replace(old, new)
        return probe[:-1]

    def shape(self, row: TensorRow, config: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The shape config.json implies for a row, or None where it does not say."""
        sizes: list[int] = []
        for product in row.shape:
            size = 1
            for factor in product.split(" * "):
                value = int(factor) if factor.isdigit() else config.get(factor)
                if type(value) is not int:
                    return None
                size *= value
            sizes.append(size)
        return tuple(sizes) or None


def load_families() -> dict[str, Family]:
    """Every family that ships, by name, sorted."""
    return {path.stem: load_family(path) for path in sorted(folder("configs").glob("*.yaml"))}


def load_family(path: Path) -> Family:
    """A family file. Raises DataFileError, naming the key, where it is wrong."""
    try:
        return Family.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise DataFileError(
            f"{path.name}: {where}: {message}.", "Correct the family file."
        ) from None


def family_of(config: Mapping[str, Any], families: Mapping[str, Family]) -> Family | None:
    """The family whose `model_types` holds the config's model_type."""
    kind = config.get("model_type")
    return next((f for f in families.values() if kind in f.model_types), None)


__all__ = [
    "Family",
    "Meaning",
    "Role",
    "TensorRow",
    "family_of",
    "load_families",
    "load_family",
]
