"""Model families: what a tensor's name means. One YAML file each, in `configs/`.

A family lists every tensor its checkpoints may hold, as exact names with `{layer}` and
`{expert}` in place of numbers. A name that no row matches is unknown, and nothing is done to
unknown tensors: mquant stops and names them.

Two little languages speak of config.json's keys. A size is a sum of products and quotients:
`num_attention_heads * head_dim`, `kv_lora_rank + qk_rope_head_dim`. A condition says which layers
hold something, in clauses joined by `and`: `KEY`, `not KEY`, `layer < SIZE`, `layer >= SIZE`,
`layer in KEY`, `layer not in KEY`, where SIZE is one key or number.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mquant.data import folder, read_yaml
from mquant.errors import DataFileError

_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)")
_EVERY_LAYER = "layer"
_MTP = "mtp"

MOST_LAYERS: Final = 1_000
"""No model has more layers, or more entries in a list of some of them."""

Lookup = Callable[[str], int | None]

_FACTOR: Final = r"[a-z0-9_]+"
_SIZE: Final = re.compile(rf"{_FACTOR}(?: [*/+] {_FACTOR})*")
_CLAUSE: Final = re.compile(
    rf"layer (?P<operator><|>=|in|not in) (?P<right>{_FACTOR})"
    rf"|(?P<not>not )?(?P<key>(?!(?:layer|not)\b){_FACTOR})"
)


class Role(StrEnum):
    """What a tensor is for. Recipes speak of roles only, never of names."""

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
        """Whether it is the weight of a linear layer (what `targets: Linear` means)."""
        return self in (
            Role.EXPERT,
            Role.SHARED_EXPERT,
            Role.MLP,
            Role.ATTENTION,
            Role.ROUTER,
            Role.HEAD,
        )

    @property
    def refused_by_loaders(self) -> bool:
        """Whether engines refuse, or wrongly load, a checkpoint that has this quantized."""
        return self in (Role.ROUTER, Role.EMBEDDING, Role.HEAD)


def _check_size(text: str) -> str:
    """The text, where it is a size. Raises ValueError where it is not."""
    if not _SIZE.fullmatch(text):
        raise ValueError(f"{text!r} is no sum of products of config keys and numbers")
    return text


def _check_condition(text: str) -> str:
    """The text, where it is a condition. Raises ValueError where it is not."""
    if not all(_CLAUSE.fullmatch(clause) for clause in text.split(" and ")):
        raise ValueError(f"{text!r} is no condition on layers and config keys")
    return text


def _size_keys(text: str) -> set[str]:
    """The config keys a size is made of."""
    return {word for word in re.findall(_FACTOR, text) if not word.isdigit()}


def _condition_keys(text: str) -> set[str]:
    """The config keys that must be numbers for a condition to say anything."""
    clauses = [clause for clause in map(_CLAUSE.fullmatch, text.split(" and ")) if clause]
    compared = [clause["right"] for clause in clauses if clause["operator"] in ("<", ">=")]
    return {key for key in compared if not key.isdigit()}


def _evaluate(text: str, lookup: Lookup) -> int | None:
    """The value of a size; None where a key has none, or a quotient is not whole."""
    total = 0
    for term in text.split(" + "):
        value: int | None = 1
        operator = "*"
        for word in term.split(" "):
            if word in ("*", "/"):
                operator = word
                continue
            factor = int(word) if word.isdigit() else lookup(word)
            value = _apply(value, operator, factor)
        if value is None:
            return None
        total += value
    return total


def _apply(left: int | None, operator: str, right: int | None) -> int | None:
    if left is None or right is None:
        return None
    if operator == "*":
        return left * right
    return left // right if right and left % right == 0 else None


def _holds(text: str, layer: int | None, config: Mapping[str, Any], lookup: Lookup) -> bool:
    """Whether a condition is true of a layer; of some layer or other, where that is None."""
    return all(_clause(clause, layer, config, lookup) for clause in text.split(" and "))


def _clause(text: str, layer: int | None, config: Mapping[str, Any], lookup: Lookup) -> bool:
    match = _CLAUSE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no condition")
    if match["key"]:
        return bool(config.get(match["key"])) is not bool(match["not"])
    operator, right = match["operator"], match["right"]
    if layer is None:
        return True
    if operator in ("in", "not in"):
        listed = config.get(right)
        listed = listed if isinstance(listed, list) and len(listed) <= MOST_LAYERS else []
        return (layer in listed) is (operator == "in")
    limit = int(right) if right.isdigit() else lookup(right)
    return limit is not None and (layer < limit if operator == "<" else layer >= limit)


def _distinct(rows: "tuple[TensorRow, ...]") -> "tuple[TensorRow, ...]":
    twice = [key for key, count in Counter(row.key for row in rows).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} has two rows")
    return rows


def _in_order(defaults: Mapping[str, str]) -> Mapping[str, str]:
    known: set[str] = set()
    for key, default in defaults.items():
        later = _size_keys(default) & (defaults.keys() - known)
        if later:
            raise ValueError(f"{key} is made of {min(later)}, which must stand above it")
        known.add(key)
    return defaults


Size = Annotated[str, AfterValidator(_check_size)]
Condition = Annotated[str, AfterValidator(_check_condition)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorRow(_Data):
    """One row of a family's `tensors`: a name, with {layer} and {expert} for numbers."""

    name: str
    role: Role
    shape: tuple[Size, ...] = ()
    dtype: str = "BF16"
    fused: str = ""
    block: str = _EVERY_LAYER
    """Rows of one block stand or fall together: a layer has all of them or none. The family's
    `blocks` says which layers; a block it does not name may be in any."""
    optional: bool = False
    """A whole checkpoint may lack it."""
    unless: str = ""
    """A whole checkpoint may lack it where this key of config.json is true."""

    @cached_property
    def key(self) -> str:
        """The name with every placeholder as `#`."""
        return self.name.replace("{layer}", "#").replace("{expert}", "#")

    def format(self, layer: int | None, expert: int | None) -> str:
        """The tensor's name in a given layer, for a given expert."""
        return self.name.replace("{layer}", str(layer)).replace("{expert}", str(expert))

    def patterns(self, *names: Callable[[str], str]) -> Iterator[str]:
        """Entries for `ignore` or `targets` that match the row's module in every layer.

        `names` make another name of the hub's; an entry comes for each that is another.
        """
        module = self.name.removesuffix(".weight")
        for name in dict.fromkeys(each(module) for each in names):
            if "{" in name:
                escaped = name.replace(".", r"\.")
                yield "re:" + re.sub(r"\{(layer|expert)\}", r"\\d+", escaped) + "$"
            else:
                yield name


class ConfigKeys(_Data):
    """Which keys of config.json say what; empty where the family has no such thing."""

    layers: str
    context: str
    vocabulary: str
    hidden: str
    heads: str
    intermediate: str
    kv_heads: str = ""
    experts: str = ""
    top_k: str = ""
    mtp: str = ""


class Forward(_Data):
    """How a model of the family computes, where names and shapes do not say."""

    qk_norm: Literal["none", "all heads", "each head"] = "none"
    """Over what q and k are normed: their whole projection, or each head's part of it."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What makes routing weights of the router's outputs. A routing bias only chooses."""
    normalised: str = ""
    """The key of config.json that has the chosen weights add up to 1; empty: they always do."""


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
    in_vllm: tuple[tuple[str, str], ...] = ()
    unpruned_experts: int | None = None
    tp_within_experts: bool = False
    """vLLM and SGLang refuse to split the model over more ranks than it has experts."""
    required_config: tuple[str, ...] = ()
    defaults: Annotated[Mapping[str, Size], AfterValidator(_in_order)] = Field(default_factory=dict)
    """What a size is where config.json leaves it out, or says null."""
    blocks: Mapping[str, Condition] = Field(default_factory=dict)
    """Block -> which layers have it. `mtp` is of the layers numbered beyond the last one."""
    smoothing: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    """Last part of a module's name -> those of the linear modules that read its output, and
    nothing else does: it may be divided by what their columns are multiplied with."""
    forward: Forward | None = None
    synth: SynthData

    @model_validator(mode="after")
    def _smooths_modules(self) -> Self:
        try:
            _ = self.smoothings
        except KeyError as error:
            raise ValueError(f"smoothing: there is no module {error}") from None
        return self

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
        for row in self.tensors:
            if row.fused:
                sets[row.fused] = (*sets.get(row.fused, ()), row)
        return sets

    @cached_property
    def smoothings(self) -> tuple[tuple[TensorRow, ...], ...]:
        """The rows of each entry of `smoothing`: what may be divided, then all that it feeds."""
        rows = {row.name.removesuffix(".weight").rpartition(".")[2]: row for row in self.tensors}
        names = ((name, *fed) for name, fed in self.smoothing.items())
        return tuple(tuple(rows[name] for name in group) for group in names)

    @property
    def smoothing_patterns(self) -> Iterator[tuple[str, list[str]]]:
        """The same as patterns of transformers' names: what may be divided, and what it feeds."""
        for group in self.smoothings:
            first, *fed = (entry for row in group for entry in row.patterns(self.in_memory_name))
            yield first, fed

    def needed_keys(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The keys of config.json that say what tensors there are, and their shapes."""
        sizes = {
            size
            for row in self.tensors
            for size in row.shape
            if self.has_block(row.block, None, config) is not False
        }
        keys = {key for size in sizes for key in _size_keys(size)}
        for condition in self.blocks.values():
            keys |= _condition_keys(condition)
        for key in list(self.defaults)[::-1]:  # a default is made of those above it
            if key in keys and config.get(key) is None:
                keys = (keys - {key}) | _size_keys(self.defaults[key])
        return tuple(sorted(keys))

    def value(self, key: str, config: Mapping[str, Any]) -> int | None:
        """A number of config.json, or its default; None where it does not say."""
        value = config.get(key)
        if value is None and key in self.defaults:
            return _evaluate(self.defaults[key], lambda inner: self.value(inner, config))
        return value if type(value) is int else None

    def has_block(self, block: str, layer: int | None, config: Mapping[str, Any]) -> bool | None:
        """Whether a layer has a block, or any layer where that is None; None: it may have it."""
        if block == _EVERY_LAYER:
            return True
        if block not in self.blocks:
            return None
        lookup = partial(self.value, config=config)
        return _holds(self.blocks[block], layer, config, lookup)

    def may_lack(self, row: TensorRow, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this config.json is whole without the row."""
        return row.optional or (bool(row.unless) and config.get(row.unless) is True)

    def tied_heads(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The heads whose weight is the embeddings': modules that a checkpoint has no tensor of."""
        heads = (row for row in self.tensors if row.role is Role.HEAD and row.unless)
        return tuple(r.name.removesuffix(".weight") for r in heads if config.get(r.unless) is True)

    def mtp_layers(self, config: Mapping[str, Any]) -> int:
        """How many layers of multi-token prediction may be numbered after the last layer."""
        return (self.value(self.config.mtp, config) or 0) if _MTP in self.blocks else 0

    def classify(self, name: str) -> Meaning | None:
        """What the tensor is, or None where the family does not know it."""
        return _meaning(self._rows.get(_NUMBER.sub("#", name)), name)

    def classify_in_memory(self, name: str) -> Meaning | None:
        """What the tensor is, by transformers' name for it, or a mix of that and the hub's.

        Saving a loaded model without mapping all names back writes such mixes. A hub name is
        known here too, so ask `classify` first.
        """
        key = self.in_memory_name(_NUMBER.sub("#", name))
        return _meaning(self._rows_in_memory.get(key), name)

    def in_memory_name(self, name: str) -> str:
        """The name transformers gives the same tensor, or module, in a loaded model."""
        return _replaced(name, self.in_memory)

    def in_vllm_name(self, name: str) -> str:
        """The name by which vLLM looks the same tensor, or module, up in `ignore` and `targets`."""
        return _replaced(name, self.in_vllm)

    def shape(self, row: TensorRow, config: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The shape config.json implies for a row, or None where it does not say."""
        sizes: list[int] = []
        for text in row.shape:
            size = _evaluate(text, partial(self.value, config=config))
            if size is None:
                return None
            sizes.append(size)
        return tuple(sizes) or None


def _meaning(row: TensorRow | None, name: str) -> Meaning | None:
    if row is None or "#" in name:
        return None
    numbers = [int(number) for number in _NUMBER.findall(name)]
    layer = numbers.pop(0) if "{layer}" in row.name else None
    expert = numbers.pop(0) if "{expert}" in row.name else None
    return Meaning(row, layer, expert)


def _replaced(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    # The end of a module's name is the end of a part, too.
    probe = f"{name}."
    for old, new in pairs:
        probe = probe.replace(old, new)
    return probe[:-1]


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
    "MOST_LAYERS",
    "Family",
    "Forward",
    "Meaning",
    "Role",
    "TensorRow",
    "family_of",
    "load_families",
    "load_family",
]
