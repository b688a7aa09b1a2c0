"""The parts of a family file: rows of tensors, keys of config.json, data for synthetic models."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mquant.formulas import check_condition, check_size, depends_on_layer, size_keys

EVERY_LAYER = "layer"
"""The block that every layer has."""
DRAFTS = "drafts"
"""The block of layers of multi-token prediction that have numbers, and names, of their own."""
NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)")
_LONGEST_NAME = 1_000
_ROW_NAME = r"^[\w.-]+(\{layer\}[\w.-]+(\{expert\}[\w.-]+)?)?(\.\*)?$"


class Role(StrEnum):
    """The use of a tensor. Recipes refer to roles, never to names."""

    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    MLP = "mlp"
    ATTENTION = "attention"
    ROUTER = "router"
    ROUTING_BIAS = "routing_bias"
    LINEAR_ATTENTION = "linear_attention"
    MAMBA = "mamba"
    INDEXER = "indexer"
    LATENT = "latent"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    VISION = "vision"
    MTP = "mtp"
    OTHER = "other"

    @property
    def linear(self) -> bool:
        """Whether the role is the weight of a linear layer (what `targets: Linear` means)."""
        return self not in (
            Role.ROUTING_BIAS,
            Role.EMBEDDING,
            Role.NORM,
            Role.VISION,
            Role.MTP,
            Role.OTHER,
        )

    @property
    def refused_by_loaders(self) -> bool:
        """Whether loaders refuse, or load wrongly, a checkpoint that has the role quantized."""
        return self in (Role.ROUTER, Role.EMBEDDING, Role.HEAD)


def distinct(rows: "tuple[TensorRow, ...]") -> "tuple[TensorRow, ...]":
    """Return the rows. Raises ValueError if two rows have one name."""
    repeated = [key for key, count in Counter(row.key for row in rows).items() if count > 1]
    if repeated:
        raise ValueError(f"{repeated[0]} has two rows")
    return rows


def in_order(defaults: Mapping[str, str]) -> Mapping[str, str]:
    """Return the defaults. Raises ValueError if one refers to a later one."""
    known: set[str] = set()
    for key, default in defaults.items():
        later = size_keys(default) & (defaults.keys() - known)
        if later:
            raise ValueError(f"{key} refers to {min(later)}, which must stand above {key}")
        known.add(key)
    return defaults


Size = Annotated[str, Field(max_length=200), AfterValidator(check_size)]
Condition = Annotated[str, AfterValidator(check_condition)]
Key = Annotated[str, Field(min_length=1)]
RowName = Annotated[str, Field(max_length=200, pattern=_ROW_NAME)]


class Data(BaseModel):
    """A part of a family file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with changes; what was derived of the old values is derived anew."""
        copied = super().model_copy(update=update, deep=deep)
        for cached in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[cached]
        return copied


class TensorRow(Data):
    """One row of a family's `tensors`: a name, with {layer} and {expert} for numbers.

    A name that ends in `.*` is a prefix: the row stands for all tensors below the prefix, which a
    checkpoint may have, and which are copied. Digits that are parts of a name stand for themselves.
    """

    name: RowName
    role: Role
    shape: tuple[Size, ...] = ()
    shapes: Mapping[str, tuple[Size, ...]] = Field(default_factory=dict)
    """Block -> the shape in layers that have the block, if it is not `shape` in every layer."""
    dtype: Literal["BF16", "F16", "F32", "I64"] = "BF16"
    fused: str = ""
    block: str = EVERY_LAYER
    """The block of the row: a layer has all rows of a block or no row of the block. The family's
    `blocks` says which layers have a block; any layer may have a block that `blocks` lacks."""
    optional: bool = False
    """Whether a complete checkpoint may leave the tensor out."""
    unless: str = ""
    """A key of config.json; if the key is true, a complete checkpoint may leave the tensor out."""

    def __hash__(self) -> int:
        """Hash the name; `shapes` is a table, which has no hash."""
        return hash(self.name)

    @cached_property
    def key(self) -> str:
        """The name with `#` for every placeholder."""
        return self.name.replace("{layer}", "#").replace("{expert}", "#")

    @cached_property
    def numberless(self) -> str:
        """The name with `#` for every number, also for digits of the family's own names."""
        return NUMBER.sub("#", self.key)

    @property
    def prefix(self) -> str | None:
        """What all names of the row begin with, if the row stands for all tensors below a name."""
        return self.name[:-1] if self.name.endswith(".*") else None

    @property
    def varies(self) -> bool:
        """Whether the shape differs from layer to layer."""
        return bool(self.shapes) or any(depends_on_layer(size) for size in self.shape)

    @property
    def short(self) -> str:
        """The last part of the module's name."""
        return self.name.removesuffix(".weight").rpartition(".")[2]

    def renamed(self, name: str, *, optional: bool = False) -> "TensorRow":
        """Return the row with another name."""
        return self.model_copy(update={"name": name, "optional": optional or self.optional})

    def numbers(self, name: str) -> tuple[int | None, int | None]:
        """Return the layer and the expert in a name with the row's `numberless` form."""
        numbers = [int(number) for number in NUMBER.findall(name)]
        # Of the row's own digits, each is at the same place in both names.
        own = NUMBER.findall(self.name.replace("{layer}", "#").replace("{expert}", "#"))
        if own:
            places = re.findall(r"\{layer\}|\{expert\}|" + NUMBER.pattern, self.name)
            numbers = [n for n, place in zip(numbers, places, strict=True) if place[0] == "{"]
        layer = numbers.pop(0) if "{layer}" in self.name else None
        return layer, numbers.pop(0) if "{expert}" in self.name else None

    def format(self, layer: int | None, expert: int | None) -> str:
        """Return the tensor's name in a layer, for an expert."""
        return self.name.replace("{layer}", str(layer)).replace("{expert}", str(expert))

    def patterns(self, *names: Callable[[str], str]) -> Iterator[str]:
        """Yield entries for `ignore` or `targets` that match the row's module in every layer.

        Each of `names` maps the hub's name to a name; each distinct result gives one entry.
        """
        module = self.name.removesuffix(".weight")
        for name in dict.fromkeys(rename(module) for rename in names):
            if "{" in name or name.endswith(".*"):
                end = "" if name.endswith(".*") else "$"
                escaped = name.removesuffix("*").replace(".", r"\.")
                yield "re:" + re.sub(r"\{(layer|expert)\}", r"\\d+", escaped) + end
            else:
                yield name


class Stack(Data):
    """A tensor on disk that holds the tensors of all experts of a layer: [experts, rows, columns].

    `holds` are the names of rows of `tensors`, in the order in which an expert's part of the tensor
    holds their rows: all rows of one after all rows of the other, or, if `interleaved`, a row of
    each in turn. If `transposed`, an expert's part has the rows as its columns.
    """

    name: RowName
    holds: Annotated[tuple[RowName, ...], Field(min_length=1)]
    interleaved: bool = False
    transposed: bool = False

    def renamed(self, rename: Callable[[str], str]) -> "Stack":
        """Return the same stack under another name, with rows under other names."""
        names = {"name": rename(self.name), "holds": tuple(map(rename, self.holds))}
        return self.model_copy(update=names)


class Wrapping(Data):
    """The names of the same model inside a larger one, as multimodal models have.

    `names` is prefix in the rows -> prefix on disk. `in_vllm` is prefix on disk -> vLLM's, which is
    replaced before the family's `in_vllm`.
    """

    names: Mapping[str, str]
    in_vllm: tuple[tuple[str, str], ...] = ()

    def rename(self, name: str) -> str:
        """Return the name on disk for a name in the rows."""
        for old, new in self.names.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


class ConfigKeys(Data):
    """The keys of config.json by meaning; a key is empty if the family has no such thing."""

    layers: Key
    context: Key
    vocabulary: Key
    hidden: Key
    heads: Key
    intermediate: Key
    kv_heads: str = ""
    experts: str = ""
    top_k: str = ""
    mtp: str = ""


class Forward(Data):
    """The facts about the forward pass of a family that names and shapes do not show."""

    qk_norm: Literal["none", "all heads", "each head", "each head, rotated"] = "none"
    """The span of the norm of q and k: the whole projection, or each head, before or after RoPE."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """The function from router logits to routing weights. A routing bias only selects experts."""
    normalised: str = ""
    """A key of config.json; if the key is true, or this field is empty, the chosen experts' weights
    are scaled to add up to 1."""
    scaled: str = ""
    """A key of config.json: the factor of the chosen experts' weights after that."""
    grouped: Condition | None = None
    """When a token chooses among the experts of its best groups only: `topk_group` of `n_group`."""
    group_score: Literal["largest", "two largest"] = "two largest"
    """The values of a group's experts whose sum is the group's score."""
    rope_neighbours: bool = False
    """Whether RoPE rotates pairs of neighbours, if `rope_interleave` in config.json is not false;
    otherwise it rotates pairs of one number of each half."""
    rope_share: float = 1.0
    """The part of a head that RoPE rotates if config.json does not say."""
    sliding: Condition | None = None
    """The layers whose attention slides, if config.json has `sliding_window` and no `layer_types`;
    None: mquant refuses a window shorter than the context."""
    takes: Mapping[str, tuple[bool | int | str | None, ...]] = Field(default_factory=dict)
    """Keys of config.json with the values that mquant can compute, that of the config class first.
    """


class ReleasedFormat(Data):
    """How the family's release stores weights in a format of `mquant synth --dtype`.

    `also` are patterns (`*` for any characters) of rows that the release quantizes, besides the
    usual roles. `scale` is the suffix of scales, if it is not the usual one. `config` is the
    release's quantization config; an entry of a list with `{layer}` stands for those in each layer
    that has such a module.
    """

    also: tuple[str, ...] = ()
    scale: str = ""
    config: dict[str, Any] = Field(default_factory=dict)


class SynthData(Data):
    """The config.json of `mquant synth`: the real model's, and the changes for a tiny model.

    `tiny_in_blocks` are further changes for a tiny model in FP8 blocks, which must divide its rows.
    `releases` are those with whose config.json `mquant plan` was tried, at their real shapes.
    """

    config: dict[str, Any]
    tiny: dict[str, Any]
    tiny_in_blocks: dict[str, Any] = Field(default_factory=dict)
    per_layer: dict[str, Any] = Field(default_factory=dict)
    releases: tuple[str, ...] = ()
    formats: Mapping[str, ReleasedFormat] = Field(default_factory=dict)


def replaced(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Return a name with the parts of `pairs` replaced in order: `.old.` by `.new.`."""
    # Add a dot, so that a pattern that ends in a dot matches the name's last part, too.
    probe = f"{name}."
    for old, new in pairs:
        grown = len(probe) + probe.count(old) * (len(new) - len(old))
        if old and grown <= max(len(probe), _LONGEST_NAME):  # anybody may write the pairs
            probe = probe.replace(old, new)
    changed = probe[:-1]
    return name if changed == name else changed  # one object for equal names
