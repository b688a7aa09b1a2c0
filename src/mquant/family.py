"""Model families: what a tensor's name means. Each family is one YAML file in `configs/`.

A family lists every tensor that its checkpoints may hold, by exact name with `{layer}` and
`{expert}` in place of numbers. A name that matches no row is unknown. mquant refuses to quantize a
checkpoint with unknown tensors, and names the tensors.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic import ValidationInfo as Info

from mquant.data_files import folder, read_yaml
from mquant.errors import DataFileError
from mquant.formulas import check_condition, check_size, condition_keys, evaluate, holds, size_keys
from mquant.loader_rows import VllmRows

_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)")
_EVERY_LAYER = "layer"
_MTP = "mtp"
_ROW_NAME = r"^[\w.-]+(\{layer\}[\w.-]+(\{expert\}[\w.-]+)?)?$"
_MOST_LAYERS, _MOST_SIZE, _LONGEST_NAME = 1_000, 10_000_000, 1_000

FusedSet = tuple[str, int | None, int | None]
"""The name of a fused set, its layer and its expert."""


class Role(StrEnum):
    """The use of a tensor. Recipes refer to roles, never to names."""

    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    MLP = "mlp"
    ATTENTION = "attention"
    ROUTER = "router"
    ROUTING_BIAS = "routing_bias"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    OTHER = "other"

    @property
    def linear(self) -> bool:
        """Whether the role is the weight of a linear layer (what `targets: Linear` means)."""
        return self not in (Role.ROUTING_BIAS, Role.EMBEDDING, Role.NORM, Role.OTHER)

    @property
    def refused_by_loaders(self) -> bool:
        """Whether loaders refuse, or load wrongly, a checkpoint that has the role quantized."""
        return self in (Role.ROUTER, Role.EMBEDDING, Role.HEAD)


def _distinct(rows: "tuple[TensorRow, ...]") -> "tuple[TensorRow, ...]":
    repeated = [key for key, count in Counter(row.key for row in rows).items() if count > 1]
    if repeated:
        raise ValueError(f"{repeated[0]} has two rows")
    return rows


def _in_order(defaults: Mapping[str, str]) -> Mapping[str, str]:
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


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorRow(_Data):
    """One row of a family's `tensors`: a name, with {layer} and {expert} for numbers."""

    name: RowName
    role: Role
    shape: tuple[Size, ...] = ()
    dtype: Literal["BF16", "F16", "F32"] = "BF16"
    fused: str = ""
    block: str = _EVERY_LAYER
    """The block of the row: a layer has all rows of a block or no row of the block. The family's
    `blocks` says which layers have a block; any layer may have a block that `blocks` lacks."""
    optional: bool = False
    """Whether a complete checkpoint may leave the tensor out."""
    unless: str = ""
    """A key of config.json; if the key is true, a complete checkpoint may leave the tensor out."""

    @cached_property
    def key(self) -> str:
        """The name with `#` for every placeholder."""
        return self.name.replace("{layer}", "#").replace("{expert}", "#")

    @property
    def short(self) -> str:
        """The last part of the module's name."""
        return self.name.removesuffix(".weight").rpartition(".")[2]

    def format(self, layer: int | None, expert: int | None) -> str:
        """Return the tensor's name in a layer, for an expert."""
        return self.name.replace("{layer}", str(layer)).replace("{expert}", str(expert))

    def patterns(self, *names: Callable[[str], str]) -> Iterator[str]:
        """Yield entries for `ignore` or `targets` that match the row's module in every layer.

        Each of `names` maps the hub's name to a name; each distinct result gives one entry.
        """
        module = self.name.removesuffix(".weight")
        for name in dict.fromkeys(rename(module) for rename in names):
            if "{" in name:
                escaped = name.replace(".", r"\.")
                yield "re:" + re.sub(r"\{(layer|expert)\}", r"\\d+", escaped) + "$"
            else:
                yield name


class ConfigKeys(_Data):
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


class Forward(_Data):
    """The facts about the forward pass of a family that names and shapes do not show."""

    qk_norm: Literal["none", "all heads", "each head"] = "none"
    """The span of the norm of q and k: the whole projection, or each head."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """The function from router logits to routing weights. A routing bias only selects experts."""
    normalised: str = ""
    """A key of config.json; if the key is true, or this field is empty, the chosen experts' weights
    are scaled to add up to 1."""


class SynthData(_Data):
    """The config.json of `mquant synth`: the real model's, and the changes for a tiny model."""

    config: dict[str, Any]
    tiny: dict[str, Any]
    per_layer: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorRole:
    """The meaning of a tensor's name: the family's row, the layer and the expert."""

    row: TensorRow
    layer: int | None
    expert: int | None

    @property
    def fused_set(self) -> FusedSet | None:
        """The tensor's fused set; None if the tensor belongs to none."""
        return (self.row.fused, self.layer, self.expert) if self.row.fused else None

    @property
    def loaded_with(self) -> FusedSet:
        """The unit that loaders load: a layer's experts, a fused set, or the tensor alone."""
        if self.row.role is Role.EXPERT:
            return ("experts", self.layer, None)
        return self.fused_set or (self.row.name, self.layer, self.expert)


class Family(_Data):
    """A model family, as its file in `configs/` describes it."""

    name: str
    title: str
    model_types: tuple[str, ...]
    config: ConfigKeys
    tensors: Annotated[tuple[TensorRow, ...], AfterValidator(_distinct)]
    in_memory: tuple[tuple[str, str], ...] = ()
    in_vllm: tuple[tuple[str, str], ...] = ()
    unpruned_experts: int | None = None
    tp_within_experts: bool = False
    """Whether vLLM and SGLang refuse to split the model over more ranks than it has experts."""
    required_config: tuple[str, ...] = ()
    defaults: Annotated[Mapping[str, Size], AfterValidator(_in_order)] = Field(default_factory=dict)
    """The sizes for keys that config.json leaves out, or sets to null."""
    blocks: Mapping[str, Condition] = Field(default_factory=dict)
    """Block -> the layers that have the block. The block `mtp` adds layers after the last layer."""
    smoothing: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    """Last part of a module's name -> the last parts of all modules that read its output, all
    linear: smoothing may divide the output by factors and multiply the readers' columns by them."""
    forward: Forward | None = None
    vllm: VllmRows | None = None
    synth: SynthData
    own: bool = Field(default=False, exclude=True)
    """Whether the user gave the file. The file's content is then part of a plan's fingerprint."""

    @field_validator("synth")
    @classmethod
    def _of_the_family(cls, synth: SynthData, info: Info) -> SynthData:
        config = {**synth.config, **synth.tiny}
        if config.get("model_type") not in info.data.get("model_types", ()):
            raise ValueError("config.model_type is none of model_types")
        keys: ConfigKeys | None = info.data.get("config")
        if keys is None:
            return synth
        for key in (keys.layers, keys.vocabulary, keys.experts, keys.top_k):
            most = _MOST_LAYERS if key == keys.layers else _MOST_SIZE
            if key and not (type(config.get(key)) is int and 0 < config[key] <= most):
                raise ValueError(f"config has no integer {key} from 1 to {most:,}")
            if key in synth.per_layer:
                raise ValueError(f"per_layer holds the size {key}")
        return synth

    @field_validator("smoothing")
    @classmethod
    def _of_modules(
        cls, smoothing: Mapping[str, tuple[str, ...]], info: Info
    ) -> Mapping[str, tuple[str, ...]]:
        known = {row.short for row in info.data.get("tensors", ())}
        for name in (name for key, readers in smoothing.items() for name in (key, *readers)):
            if name not in known:
                raise ValueError(f"there is no module {name}")
        return smoothing

    @cached_property
    def _rows(self) -> dict[str, TensorRow]:
        return {row.key: row for row in self.tensors}

    @cached_property
    def _rows_in_memory(self) -> dict[str, TensorRow]:
        return {self.in_memory_name(row.key): row for row in self.tensors}

    @cached_property
    def fused_sets(self) -> Mapping[str, tuple[TensorRow, ...]]:
        """Fused set -> its member rows, in the family's order."""
        sets: dict[str, tuple[TensorRow, ...]] = {}
        for row in (row for row in self.tensors if row.fused):
            sets[row.fused] = (*sets.get(row.fused, ()), row)
        return sets

    @cached_property
    def smoothings(self) -> tuple[tuple[TensorRow, ...], ...]:
        """The rows of each entry of `smoothing`: the row to divide, then its readers' rows."""
        rows = {row.short: row for row in self.tensors}
        names = ((name, *readers) for name, readers in self.smoothing.items())
        return tuple(tuple(rows[name] for name in group) for group in names)

    @property
    def smoothing_patterns(self) -> Iterator[tuple[str, list[str]]]:
        """The entries of `smoothing` as patterns of transformers' names."""
        for group in self.smoothings:
            entries = [entry for row in group for entry in row.patterns(self.in_memory_name)]
            yield entries[0], entries[1:]

    def needed_keys(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the keys of config.json that decide which tensors exist, and the shapes."""
        sizes = {
            size
            for row in self.tensors
            for size in row.shape
            if self.has_block(row.block, None, config) is not False
        }
        keys = {key for size in sizes for key in size_keys(size)}
        keys = keys.union(*map(condition_keys, self.blocks.values()))
        for key in list(self.defaults)[::-1]:  # a default refers to earlier ones only
            if key in keys and config.get(key) is None:
                keys = (keys - {key}) | size_keys(self.defaults[key])
        return tuple(sorted(keys))

    def value(self, key: str, config: Mapping[str, Any]) -> int | None:
        """Return a key's number in config.json, or the key's default; None without a number."""
        value = config.get(key)
        if value is None and key in self.defaults:
            return evaluate(self.defaults[key], lambda inner: self.value(inner, config))
        return value if type(value) is int else None

    def has_block(self, block: str, layer: int | None, config: Mapping[str, Any]) -> bool | None:
        """Return whether a layer, or any layer if `layer` is None, has a block; None if unknown."""
        if block == _EVERY_LAYER:
            return True
        if block not in self.blocks:
            return None
        return holds(self.blocks[block], layer, config, partial(self.value, config=config))

    def may_lack(self, row: TensorRow, config: Mapping[str, Any]) -> bool:
        """Return whether a checkpoint with this config.json may leave the row out."""
        return row.optional or (bool(row.unless) and config.get(row.unless) is True)

    def tied_heads(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the heads that share the embeddings' weight, and have no tensor of their own."""
        heads = (row for row in self.tensors if row.role is Role.HEAD and row.unless)
        return tuple(r.name.removesuffix(".weight") for r in heads if config.get(r.unless) is True)

    def mtp_layers(self, config: Mapping[str, Any]) -> int:
        """Return the number of multi-token prediction layers, which may follow the last layer."""
        return (self.value(self.config.mtp, config) or 0) if _MTP in self.blocks else 0

    def classify(self, name: str) -> TensorRole | None:
        """Return the meaning of a tensor's name; None if the family does not know the name."""
        return _meaning(self._rows.get(_NUMBER.sub("#", name)), name)

    def classify_in_memory(self, name: str) -> TensorRole | None:
        """Return the meaning of a name in transformers' memory, or of a mix with the hub's name.

        A tool that saves a loaded model without mapping all names back writes such mixes. This
        method knows hub names too, so call `classify` first.
        """
        key = self.in_memory_name(_NUMBER.sub("#", name))
        return _meaning(self._rows_in_memory.get(key), name)

    def in_memory_name(self, name: str) -> str:
        """Return the name of the same tensor, or module, in a model that transformers loaded."""
        return _replaced(name, self.in_memory)

    def in_vllm_name(self, name: str) -> str:
        """Return the name by which vLLM looks a tensor or module up in `ignore` and `targets`."""
        return _replaced(name, self.in_vllm)

    def shape(self, row: TensorRow, config: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Return the shape that config.json implies for a row; None if no shape is known."""
        sizes: list[int] = []
        for text in row.shape:
            size = evaluate(text, partial(self.value, config=config))
            if size is None:
                return None
            sizes.append(size)
        return tuple(sizes) or None


def _meaning(row: TensorRow | None, name: str) -> TensorRole | None:
    if row is None or "#" in name:
        return None
    numbers = [int(number) for number in _NUMBER.findall(name)]
    layer = numbers.pop(0) if "{layer}" in row.name else None
    expert = numbers.pop(0) if "{expert}" in row.name else None
    return TensorRole(row, layer, expert)


def _replaced(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    # Add a dot, so that a pattern that ends in a dot matches the name's last part, too.
    probe = f"{name}."
    for old, new in pairs:
        grown = len(probe) + probe.count(old) * (len(new) - len(old))
        if old and grown <= max(len(probe), _LONGEST_NAME):  # anybody may write the pairs
            probe = probe.replace(old, new)
    return probe[:-1]


def load_families(own: Path | None = None) -> dict[str, Family]:
    """Return the shipped families by name, sorted; first the family of the file `own`, by path."""
    first = {} if own is None else {str(own): load_family(own).model_copy(update={"own": True})}
    return {**first, **_shipped()}


@cache
def _shipped() -> dict[str, Family]:
    return {path.stem: load_family(path) for path in sorted(folder("configs").glob("*.yaml"))}


def load_family(path: Path) -> Family:
    """Read a family file. Raises DataFileError, which names the key, if the file is wrong."""
    content = read_yaml(path)
    try:
        return Family.model_validate(content).model_copy(update={"own": False})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) + _row_at(content, first["loc"])
        text = f"{path.name}: {where}: {first['msg'].removeprefix('Value error, ')}."
        raise DataFileError(text, "Correct the family file.") from None


def _row_at(content: Mapping[str, Any], where: tuple[int | str, ...]) -> str:
    """Return the name, in brackets, of the wrong row of `tensors`; empty without such a row."""
    if where[0] != "tensors" or len(where) == 1 or not isinstance(where[1], int):
        return ""
    row = content["tensors"][where[1]]
    return f" ({str(row.get('name'))[:120]})" if isinstance(row, dict) else ""


def family_of(config: Mapping[str, Any], families: Mapping[str, Family]) -> Family | None:
    """Return the family whose `model_types` holds the config's model_type, or None."""
    kind = config.get("model_type")
    return next((f for f in families.values() if kind in f.model_types), None)
