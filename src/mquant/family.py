"""Model families: what a tensor's name means. Each family is one YAML file in `configs/`.

A family lists every tensor that its checkpoints may hold, by exact name with `{layer}` and
`{expert}` in place of numbers. A name that matches no row is unknown. mquant refuses to quantize a
checkpoint with unknown tensors, and names the tensors.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic import ValidationInfo as Info

from mquant.family_rows import (
    DRAFTS,
    EVERY_LAYER,
    NUMBER,
    Condition,
    ConfigKeys,
    Data,
    Forward,
    Role,
    Size,
    Stack,
    SynthData,
    TensorRow,
    Wrapping,
    distinct,
    in_order,
    replaced,
)
from mquant.formulas import condition_keys, evaluate, find, holds, number, size_keys
from mquant.loader_rows import VllmRows

_MTP: Final = "mtp"
_MOST_LAYERS, _MOST_SIZE = 1_000, 10_000_000

FusedSet = tuple[str, int | None, int | None]
"""The name of a fused set, its layer and its expert."""


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
    def name(self) -> str:
        """The tensor's name in the family's rows."""
        return self.row.format(self.layer, self.expert)

    @property
    def loaded_with(self) -> FusedSet:
        """The unit that loaders load: a layer's experts, a fused set, or the tensor alone."""
        if self.row.role is Role.EXPERT:
            return ("experts", self.layer, None)
        return self.fused_set or (self.row.name, self.layer, self.expert)


class Family(Data):
    """A model family, as its file in `configs/` describes it."""

    name: str
    title: str
    model_types: tuple[str, ...]
    config: ConfigKeys
    nested: str = ""
    """The key of the table that has the text model's keys, in config.json of a larger model."""
    wrapped: tuple[Wrapping, ...] = ()
    """The names of the same model inside larger ones."""
    tensors: Annotated[tuple[TensorRow, ...], AfterValidator(distinct)]
    stacks: tuple[Stack, ...] = ()
    """Tensors that may be on disk instead of the tensors of each expert."""
    in_memory: tuple[tuple[str, str], ...] = ()
    in_vllm: tuple[tuple[str, str], ...] = ()
    unpruned_experts: int | None = None
    tp_within_experts: bool = False
    """Whether vLLM and SGLang refuse to split the model over more ranks than it has experts."""
    required_config: tuple[str, ...] = ()
    defaults: Annotated[Mapping[str, Size], AfterValidator(in_order)] = Field(default_factory=dict)
    """The sizes for keys that config.json leaves out, or sets to null."""
    blocks: Mapping[str, Condition] = Field(default_factory=dict)
    """Block -> the layers that have the block. The block `mtp` adds layers after the last layer; a
    copy may leave out the block `drafts`, whose layers have numbers of their own."""
    drafts_in_vllm: str = ""
    """What vLLM's names of `drafts` begin with, before numbers that go on from the last layer."""
    smoothing: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    """Last part of a module's name -> the last parts of all modules that read its output, all
    linear: smoothing may divide the output by factors and multiply the readers' columns by them."""
    forward: Forward | None = None
    vllm: VllmRows | None = None
    synth: SynthData
    own: bool = Field(default=False, exclude=True)
    """Whether the user gave the file. The file's content is then part of a plan's fingerprint."""

    @model_validator(mode="after")
    def _of_the_family(self) -> "Family":
        config = self.with_settings(self.synth.config, self.synth.tiny)
        if config.get("model_type") not in self.model_types:
            raise ValueError("synth: config.model_type is none of model_types")
        keys = self.config
        for key in (keys.layers, keys.vocabulary, keys.experts, keys.top_k):
            most = _MOST_LAYERS if key == keys.layers else _MOST_SIZE
            size = self.value(key, config) if key else 1
            if size is None or not 0 < size <= most:
                raise ValueError(f"synth: config has no integer {key} from 1 to {most:,}")
            if key in self.synth.per_layer:
                raise ValueError(f"synth: per_layer holds the size {key}")
        return self

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

    @field_validator("stacks")
    @classmethod
    def _of_experts(cls, stacks: tuple[Stack, ...], info: Info) -> tuple[Stack, ...]:
        known = {row.name for row in info.data.get("tensors", ())}
        for stack in stacks:
            if "{expert}" in stack.name or not all("{expert}" in name for name in stack.holds):
                raise ValueError(f"{stack.name} must hold rows with {{expert}}, and have none")
            for name in stack.holds:
                if name not in known:
                    raise ValueError(f"there is no row {name}")
        return stacks

    @cached_property
    def _stacks(self) -> dict[str, tuple[TensorRow, Stack]]:
        rows = ((TensorRow(name=each.name, role=Role.EXPERT), each) for each in self.stacks)
        return {row.numberless: (row, stack) for row, stack in rows}

    @cached_property
    def stacked_rows(self) -> frozenset[str]:
        """The names of the rows that a stack may hold."""
        return frozenset(name for stack in self.stacks for name in stack.holds)

    def stack_of(self, name: str) -> tuple[Stack, int | None] | None:
        """Return the stack of a tensor's name, and its layer; None if the name is no stack's."""
        row, stack = self._stacks.get(NUMBER.sub("#", name), (None, None))
        meaning = _meaning(row, name)
        if stack is None or meaning is None or meaning.name != name:
            return None
        return stack, meaning.layer

    def held_by(self, stack: Stack, layer: int | None) -> TensorRole:
        """Return the meaning of a stack: that of the first tensor in it, but of no one expert."""
        row = next(row for row in self.tensors if row.name == stack.holds[0])
        return TensorRole(row, layer, None)

    @cached_property
    def _rows(self) -> dict[str, tuple[TensorRow, ...]]:
        rows: dict[str, tuple[TensorRow, ...]] = defaultdict(tuple)
        for row in self.tensors:
            rows[row.numberless] += (row,)
        return dict(rows)

    @cached_property
    def _prefixes(self) -> tuple[tuple[str, TensorRow], ...]:
        return tuple((row.prefix, row) for row in self.tensors if row.prefix)

    @cached_property
    def _rows_in_memory(self) -> dict[str, TensorRow]:
        return {self.in_memory_name(row.key): row for row in self.tensors}

    @cached_property
    def _wrappings(self) -> tuple["Family", ...]:
        return tuple(self._inside(wrapping) for wrapping in self.wrapped)

    def _inside(self, wrapping: Wrapping) -> "Family":
        rows = (row.renamed(wrapping.rename(row.name)) for row in self.tensors)
        values = {name: getattr(self, name) for name in type(self).model_fields}
        changed = {
            "tensors": tuple(rows),
            "stacks": tuple(stack.renamed(wrapping.rename) for stack in self.stacks),
            "in_vllm": (*wrapping.in_vllm, *self.in_vllm),
        }
        return Family.model_construct(**{**values, **changed})

    def named_as(self, names: Collection[str]) -> "Family":
        """Return the family with its rows named as in a checkpoint with these tensors.

        The checkpoint has the names of the rows, or of one entry of `wrapped`.
        """
        own = [row.name for row in self.tensors if "{" not in row.name] if self.wrapped else ()
        for family, wrapping in zip(self._wrappings, self.wrapped, strict=True):
            renamed = {name: wrapping.rename(name) for name in own}
            # Names that both have, such as lm_head.weight, say nothing.
            if any(new in names for name, new in renamed.items() if new != name):
                return family
        return self

    def named_for(self, config: Mapping[str, Any]) -> "Family":
        """Return the family with its rows named as in the release of a config.json.

        A larger model has the text model's keys in a table, and the names of the first entry of
        `wrapped`.
        """
        larger = self._wrappings and self.settings(config) is not config
        return self._wrappings[0] if larger else self

    def settings(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the keys of the text model: those of config.json, and of its nested table."""
        table = config.get(self.nested) if self.nested else None
        return {**config, **table} if isinstance(table, Mapping) else config

    def with_settings(
        self, config: Mapping[str, Any], changes: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return a config.json with changes, each in the table of the text model's keys."""
        table = config.get(self.nested) if self.nested else None
        if not isinstance(table, Mapping):
            return {**config, **changes}
        outer = {key: value for key, value in changes.items() if key in config and key not in table}
        inner = {key: value for key, value in changes.items() if key not in outer}
        return {**config, **outer, self.nested: {**table, **inner}}

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
        rows = [row for row in self.tensors if self.has_block(row.block, None, config) is not False]
        of_blocks = (
            shape
            for row in rows
            for block, shape in row.shapes.items()
            if self.has_block(block, None, config) is not False
        )
        sizes = {size for shape in (*(row.shape for row in rows), *of_blocks) for size in shape}
        keys = {key for size in sizes for key in size_keys(size)}
        keys = keys.union(*map(condition_keys, self.blocks.values()))
        settings = self.settings(config)
        for key in list(self.defaults)[::-1]:  # a default refers to earlier ones only
            if key in keys and find(settings, key) is None:
                keys = (keys - {key}) | size_keys(self.defaults[key])
        return tuple(sorted(keys))

    def value(self, key: str, config: Mapping[str, Any], layer: int | None = None) -> int | None:
        """Return a key's number in config.json, or the key's default; None without a number.

        `key` may be `KEY[layer]`, the item of a list at the number of a layer, or `len(KEY)`.
        """
        settings = self.settings(config)
        if key in self.defaults and find(settings, key) is None:
            return evaluate(self.defaults[key], lambda inner: self.value(inner, config, layer))
        return number(settings, key, layer)

    def has_block(self, block: str, layer: int | None, config: Mapping[str, Any]) -> bool | None:
        """Return whether a layer, or any layer if `layer` is None, has a block; None if unknown."""
        if block == EVERY_LAYER:
            return True
        if block not in self.blocks:
            return None
        lookup = partial(self.value, config=config, layer=layer)
        return holds(self.blocks[block], layer, self.settings(config), lookup)

    def may_lack(self, row: TensorRow, config: Mapping[str, Any]) -> bool:
        """Return whether a checkpoint with this config.json may leave the row out."""
        return row.optional or row.prefix is not None or self._left_out(row, config)

    def _left_out(self, row: TensorRow, config: Mapping[str, Any]) -> bool:
        """Return whether config.json, or its config class without a word, leaves the row out."""
        if not row.unless:
            return False
        value = find(self.settings(config), row.unless)
        if value is None and self.vllm:
            value = self.vllm.settings.get(row.unless)
        return value is True

    def tied_heads(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the heads that share the embeddings' weight, and have no tensor of their own."""
        heads = (row for row in self.tensors if row.role is Role.HEAD)
        tied = (row for row in heads if self._left_out(row, config))
        return tuple(row.name.removesuffix(".weight") for row in tied)

    def mtp_layers(self, config: Mapping[str, Any]) -> int:
        """Return the number of multi-token prediction layers, which may follow the last layer."""
        return (self.value(self.config.mtp, config) or 0) if _MTP in self.blocks else 0

    def classify(self, name: str) -> TensorRole | None:
        """Return the meaning of a tensor's name; None if the family does not know the name."""
        for row in self._rows.get(NUMBER.sub("#", name), ()):
            meaning = _meaning(row, name)
            if row.key == row.numberless or (meaning and meaning.name == name):
                return meaning
        for prefix, row in self._prefixes:
            if name.startswith(prefix) and "{" not in name:
                return TensorRole(row.renamed(name, optional=True), None, None)
        return None

    def classify_in_memory(self, name: str) -> TensorRole | None:
        """Return the meaning of a name in transformers' memory, or of a mix with the hub's name.

        A tool that saves a loaded model without mapping all names back writes such mixes. This
        method knows hub names too, so call `classify` first.
        """
        key = self.in_memory_name(NUMBER.sub("#", name))
        return _meaning(self._rows_in_memory.get(key), name)

    def in_memory_name(self, name: str) -> str:
        """Return the name of the same tensor, or module, in a model that transformers loaded."""
        return replaced(name, self.in_memory)

    def in_vllm_name(self, name: str) -> str:
        """Return the name by which vLLM looks a tensor or module up in `ignore` and `targets`."""
        return replaced(name, self.in_vllm)

    @property
    def looked_up_by(self) -> tuple[Callable[[str], str], ...]:
        """The functions that make of a hub name the names by which loaders look a module up."""
        in_vllm = (self.in_vllm_name, self.third_in_vllm, self.draft_in_vllm)
        return str, *in_vllm, self.in_memory_name

    def draft_in_vllm(self, name: str, config: Mapping[str, Any] | None = None) -> str:
        """Return vLLM's name of a draft layer's module, with a number if `config` tells, or `name`.

        `name` may have {layer} and {expert}, if there is no `config`.
        """
        probe = name.replace("{layer}", "0").replace("{expert}", "0")
        meaning = self.classify(f"{probe}.weight") if self.drafts_in_vllm else None
        if meaning is None or meaning.row.block != DRAFTS:
            return name
        _, number, rest = name.split(".", 2)
        if config is not None:
            number = str(int(number) + (self.value(self.config.layers, config) or 0))
        return f"{self.drafts_in_vllm}{number}.{rest}"

    def third_in_vllm(self, name: str) -> str:
        """Return the name of the third matrix that vLLM asks for if an expert has two, or `name`'s.

        vLLM asks for gate, down and up of the first expert. Without a gate, one is named `None`.
        """
        name = self.in_vllm_name(name)
        rows = self.vllm.layers if self.vllm and ".experts." in name else ()
        for row in (row for row in rows if row.kind == "experts" and len(row.names) == 2):
            if name.endswith(end := f".{row.names[0]}"):
                return f"{name.removesuffix(end)}.None"
        return name

    def shape(
        self, row: TensorRow, config: Mapping[str, Any], layer: int | None = None
    ) -> tuple[int, ...] | None:
        """Return the shape that config.json implies for a row; None if no shape is known.

        `layer` is needed if the shape differs from layer to layer (`row.varies`).
        """
        of_blocks = (block for block in row.shapes if self.has_block(block, layer, config))
        shape = row.shapes[block] if (block := next(of_blocks, None)) else row.shape
        sizes: list[int] = []
        for text in shape:
            size = evaluate(text, partial(self.value, config=config, layer=layer))
            if size is None:
                return None
            sizes.append(size)
        return tuple(sizes) or None


def _meaning(row: TensorRow | None, name: str) -> TensorRole | None:
    return None if row is None or "#" in name else TensorRole(row, *row.numbers(name))
