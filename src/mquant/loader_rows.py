"""What vLLM builds of a model family: the key `vllm` of a family file.

The rows are vLLM's layers, under the names of vLLM's model. Sizes and conditions refer to config
keys, as transformers' config class of the family reads config.json: with its aliases and defaults.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from mquant.formulas import check_condition, check_size, evaluate, holds, number

Size = Annotated[str, Field(max_length=200), AfterValidator(check_size)]
Condition = Annotated[str, AfterValidator(check_condition)]
Place = Literal["q", "k", "v", "index_q", "index_k", 0, 1, 2, 3] | tuple[int, ...]
Renames = tuple[tuple[str, str | None], ...]
"""Part of a name -> vLLM's; `^` before the part: names that begin so, `$` after it: names that end
so. None: passed over."""
NEWEST_KIND: Final[Mapping[str, str]] = {
    "attention": "full_attention",
    "mamba": "linear_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}
"""Old types of layer -> the names that transformers puts into `layer_types` instead."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRow(_Data):
    """A layer of vLLM's model, with `{layer}` for the number.

    `kind` is the class: `qkv` and `merged` are fused of several matrices on disk; `indexed_qkv` has
    two more, which select what attention reads. `rows` has the
    rows of each matrix, `columns` the columns of all; `mla` is multi-head latent attention.
    `asked_as` is the name under which vLLM asks the quantization config, if it is not `name`.
    """

    name: str
    kind: Literal[
        "qkv",
        "indexed_qkv",
        "merged",
        "column",
        "row",
        "replicated",
        "embedding",
        "head",
        "experts",
        "norm",
        "bare",
        "attention",
        "mla",
    ]
    rows: tuple[Size, ...] = ()
    columns: Size = "1"
    bias: str = ""
    """A key of `blocks`; if that condition holds, the layer has a bias."""
    heeds: bool = True
    """Whether vLLM gives the layer the quantization config."""
    spared_by: tuple[str, ...] = ()
    """The quantization methods whose config vLLM does not give the layer."""
    doubles: bool = False
    """Whether the tensors of k also fill v, which is not on disk."""
    optional: bool = False
    """Whether no checkpoint must fill the parameter: a buffer, say."""
    asked_as: str | None = None
    class_name: str = ""
    """The name of vLLM's class, if it is not that of the kind; targets may match the name."""
    split: bool = True
    """Whether tensor parallelism splits the layer; a `replicated` layer is never split."""
    when: str = ""
    """A key of `blocks`, with `not` before it or without; other layers do not have the row."""
    names: tuple[str, str, str] | tuple[str, str] = ("gate_proj", "down_proj", "up_proj")
    """Gate, down and up of an expert on disk, or up and down of an expert without a gate."""
    also: tuple[str, str, str] | None = None
    """Other names that vLLM takes for gate, down and up."""
    asked_names: tuple[str, ...] = ()
    """The names of the same for which vLLM asks the quantization config, if these are others."""
    stacks: Mapping[str, tuple[Literal["gate", "down", "up"], ...]] = Field(default_factory=dict)
    """Names of modules on disk, beside `name`, that hold these parts of all experts, if a table of
    parameters finds them."""
    transposed: bool = False
    """Whether vLLM takes tensors of all experts as [experts, columns, rows]."""
    dtype: Literal["BF16", "F32"] = "BF16"
    count: str = "num_hidden_layers"
    """The key of the number of layers that have the row, if `name` has `{layer}`."""


class WrappingRows(_Data):
    """The larger, multimodal model around the text model.

    config.json of one of the `model_types` has the text model's keys in the table `key`.
    """

    key: str = "text_config"
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    types: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    """The types of keys outside the table."""
    text_types: tuple[str, ...] = ()
    """The model_types in the table of which it is told what vLLM reads; empty: all."""
    ties_outside: bool = False
    """Whether vLLM reads tie_word_embeddings outside the table."""
    inside: str
    """vLLM's name of the text model in the larger model."""
    reads: tuple[str, ...] = ()
    """Keys outside the tables that sizes of `layers` name."""
    needs: tuple[str, ...] = ()
    """Keys of tables, `TABLE.KEY`, without which vLLM does not build the model."""
    renames: Renames = ()
    maps: bool = True
    """Whether vLLM also replaces `renames` in the names of modules in the quantization config."""
    stacked: tuple[tuple[str, str, Place], ...] = ()
    """As `stacked` of the text model, for fused layers outside the text model."""
    required: tuple[str, ...] = ()
    """Keys outside the table without which vLLM does not build the model."""
    unmodelled: tuple[str, ...] = ()
    """Keys outside the table, or of other tables, with which vLLM builds what is not told here."""
    fused: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    """The entries of vLLM's `packed_modules_mapping` that the text model does not have."""
    layers: tuple[LayerRow, ...] = ()
    """The layers outside the text model."""


class PatternRow(_Data):
    """A text in config.json with a letter for each layer, which counts without `layer_types`.

    `default` is the text without the key. The number of layers is that of the types.
    """

    key: str
    letters: Mapping[str, str]
    default: str


class RopeRow(_Data):
    """How transformers and vLLM read the rotary embedding of a family.

    `theta` is the base without `rope_theta`. `rotates` is the key of the number of dimensions of a
    head that are rotated. `scaled`: whether every type but `default` is DeepSeek's YaRN, or vLLM
    reads the keys of YaRN whatever the type. `default` are the parameters if no key says any.
    `share` is the part of a head that is rotated if no key says it. `sections`: whether vLLM reads
    `mrope_section`, the parts of a head for time, height and width. `stretches`: whether a factor
    makes the model's length longer. `by_layer`: the base may be a list with one for every layer.
    `built`: whether vLLM builds a rotary embedding. `mixed_in`: whether the config class has
    transformers' RotaryEmbeddingConfigMixin, which fills in the length before scaling.

    `each` has the types of layer with a table each in `rope_parameters`, and the tables that
    transformers makes without the key. `bases` are older keys, with the type of layer whose base
    the key tells; then `rope_scaling` changes the table of full attention.

    `longrope`: whether transformers takes no scaling but LongRoPE (`only`), or wants LongRoPE's
    factors of attention with any scaling (`factors`); what other families make of LongRoPE is not
    told. `alpha`: whether transformers' own code rotates, and knows `alpha` as the factor of the
    type `dynamic`.
    """

    theta: float = 10_000.0
    rotates: str = ""
    scaled: Literal["", "deepseek", "yarn"] = ""
    default: Mapping[str, Any] = Field(default_factory=dict)
    share: float | None = None
    sections: bool = False
    by_layer: bool = False
    stretches: bool = True
    each: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    bases: Mapping[str, str] = Field(default_factory=dict)
    built: bool | Condition = True
    longrope: Literal["", "only", "factors"] = ""
    alpha: bool = False
    mixed_in: bool = True


class VllmRows(_Data):
    """What vLLM builds of a family, and how vLLM names the tensors on disk."""

    architectures: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    """The model_types of the family that vLLM has no config class for."""
    bare: str = ""
    """The architecture without a head, which vLLM also builds of a config.json without one."""
    aliases: Mapping[str, str] = Field(default_factory=dict)
    """Other names of config keys. If both are there, the one that is no key of `types` wins."""
    types: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    """Type -> the keys that transformers' config class takes in this type only."""
    rope: RopeRow = RopeRow()
    pattern: PatternRow | None = None
    divides: tuple[tuple[Size, Size], ...] = ()
    """Pairs of sizes: transformers refuses a first number that does not divide the second."""
    below: tuple[tuple[str, str], ...] = ()
    """Pairs of keys: transformers refuses a first number that is not below the second."""
    divisors: tuple[str, ...] = ()
    """Keys that vLLM divides by: by 1 without a key, if `required` does not name it."""
    counts: tuple[str, ...] = ()
    """Keys that vLLM compares with numbers; it is not known what vLLM builds below 0."""
    per_layer: tuple[str, ...] = ()
    """Lists of which vLLM reads the item of every layer. A number stands for all layers."""
    numbers: tuple[str, ...] = ()
    """Keys that transformers lets be null, and vLLM does not."""
    tables: tuple[str, ...] = ()
    """Keys whose value vLLM's model takes for a table if config.json has the key."""
    positive: tuple[str, ...] = ()
    """Keys of which it is not known what vLLM builds if they are 0."""
    needs_experts: bool = False
    """Whether vLLM refuses a model in which no layer has experts."""
    cuts_types: bool = False
    """Whether the config class leaves out the types of layer beyond the last layer."""
    window: str = ""
    """The key that must be there if a layer has sliding attention."""
    windowed_from: str = ""
    """The key of the first layer with a sliding window; vLLM takes layers of one kind only, or this
    number must be the number of layers."""
    demands: Mapping[str, tuple[bool | str, ...]] = Field(default_factory=dict)
    """Keys of which vLLM refuses every value but these, or no value."""
    demands_of_items: Mapping[str, tuple[float | str | None, ...]] = Field(default_factory=dict)
    """Keys of lists of which vLLM refuses every item but these."""
    fixed: Mapping[str, bool | int | str] = Field(default_factory=dict)
    """Keys of which only this value, or no value, is told here."""
    needs_architectures: bool = False
    """Whether vLLM does not know the architecture by the model_type."""
    unmodelled: tuple[str, ...] = ()
    """Keys with which vLLM builds something that is not told here."""
    settings: Mapping[str, Any] = Field(default_factory=dict)
    """The values for keys that config.json leaves out: a value, an earlier key, or a size. A size
    also counts for a key that is null."""
    quiet: Mapping[str, Any] = Field(default_factory=dict)
    """Keys whose default in vLLM is not what any release of the family says."""
    required: tuple[str, ...] = ()
    """Keys without which vLLM does not build the model."""
    blocks: Mapping[str, Condition] = Field(default_factory=dict)
    """Name -> the layers that have a block, or whether the model has it."""
    stacked: tuple[tuple[str, str, Place], ...] = ()
    """Part of a name on disk, the part of vLLM's fused layer, and the place of the matrix there."""
    renames: Renames = ()
    """What vLLM replaces below `model.`; if `outer_renames` is empty, also in the names of modules
    in the quantization config."""
    outer_renames: Renames = ()
    """What vLLM replaces in whole names, and in the names of modules in the quantization config."""
    wrapped: WrappingRows | None = None
    fused: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    """Last part of a fused layer's name -> the last parts on disk, for `ignore` and targets."""
    fused_if: Mapping[str, str] = Field(default_factory=dict)
    """Fused layers, of `fused` and `stacked`, that vLLM has only under a condition of `blocks`."""
    ignores: tuple[str, ...] = ()
    """Ends of names that vLLM passes over if the model has no such parameter."""
    untold: tuple[str, ...] = ()
    """Parts of names of which it is not told how vLLM loads the tensor."""
    mtp: str = ""
    """The key of the number of layers after the last, which vLLM leaves out."""
    turned: Mapping[str, str] = Field(default_factory=dict)
    """Modules of which vLLM reorders the rows, and the key of the number of heads; if a table of
    parameters finds them."""
    walks: Literal["modules", "parameters", "whole experts"] = "modules"
    """Whether vLLM finds a tensor's parameter module by module, or in one table of all names; or in
    a table, where a tensor has the experts of a layer, with biases, as [experts, columns, rows]."""
    skips_unknown: bool = False
    """Whether such a table's loader passes over every name that it does not find."""
    expert_parts: tuple[str, ...] = ()
    """What the names of experts' parameters begin with, if a table's loader finds no others."""
    outer_quantization: bool = True
    """Whether the loader of the whole model knows the quantization config, and so KV scales."""
    inner_quantization: bool = True
    """Whether the model below `model.` knows the quantization config, and so KV scales."""
    ties_head: bool = True
    """Whether vLLM honours tie_word_embeddings."""
    activations: tuple[str, ...] = ()
    """The values of hidden_act that vLLM takes for merged layers; empty if vLLM does not look."""
    activation: str = "hidden_act"
    """The key of the activation."""
    layers: tuple[LayerRow, ...]

    @model_validator(mode="after")
    def _known_blocks(self) -> "VllmRows":
        for row in (*self.layers, *(self.wrapped.layers if self.wrapped else ())):
            for block in (row.bias, row.when.removeprefix("not ")):
                if block and block not in self.blocks:
                    raise ValueError(f"{row.name} names {block}, which blocks lacks")
        return self

    @cached_property
    def every_architecture(self) -> tuple[str, ...]:
        """The names for which vLLM builds the model, alone or inside a larger one."""
        larger = self.wrapped.architectures if self.wrapped else ()
        return tuple(filter(None, (*self.architectures, self.bare, *larger)))

    @cached_property
    def kinds_of_layer(self) -> frozenset[str]:
        """The values of `layer_types` that `blocks` names."""
        found = (
            re.findall(r"layer_types\[layer\] is (\w+)", text) for text in self.blocks.values()
        )
        return frozenset(kind for kinds in found for kind in kinds)

    @cached_property
    def layer_rows(self) -> tuple[LayerRow, ...]:
        """The rows of every decoder layer."""
        return tuple(row for row in self.layers if "{layer}" in row.name)

    @cached_property
    def model_rows(self) -> tuple[LayerRow, ...]:
        """The rows that the model has once."""
        return tuple(row for row in self.layers if "{layer}" not in row.name)


class Settings:
    """config.json as transformers' config class reads it: aliases resolved, defaults filled in.

    `outer` is config.json itself. `config` has the text model's keys: config.json, or a table of
    it. `wrapping` are the rows of the larger model that vLLM builds, if vLLM builds one.
    """

    def __init__(
        self, rows: VllmRows, config: Mapping[str, Any], read_as: VllmRows | None = None
    ) -> None:
        """`rows` are what vLLM builds; `read_as` is the family whose config class is read."""
        self.read_as = read_as or rows
        self.outer, named = config, config.get("architectures")
        first = named[0] if named and isinstance(named, list) else None
        larger, inner = rows.wrapped, self.read_as.wrapped
        self.nested = inner is not None and config.get("model_type") in inner.model_types
        """Whether the text model's keys are in a table of config.json."""
        self.wrapping = larger if larger and first in larger.architectures else None
        tables: Mapping[str, Any] = {}
        if inner is not None and self.nested:
            tables = {key: part for key, part in config.items() if isinstance(part, Mapping)}
            config = tables.get(inner.key, {})
        self.config, self.values = config, {**tables, **config}
        reads = self.wrapping.reads if self.wrapping else ()
        self.values |= {key: self.outer[key] for key in reads if key in self.outer}
        if self.wrapping and self.wrapping.ties_outside:
            usual = self.read_as.settings.get("tie_word_embeddings", False)
            self.values["tie_word_embeddings"] = self.outer.get("tie_word_embeddings", usual)
        typed = {key for keys in self.read_as.types.values() for key in keys}
        for alias, key in self.read_as.aliases.items():
            present = [name for name in (alias, key) if name in config]
            if present:
                self.values[key] = config[min(present, key=typed.__contains__)]
        for key, default in self.read_as.settings.items():
            formula = isinstance(default, str) and " " in default
            if key not in self.values or (formula and self.values[key] is None):
                self.values[key] = (
                    self.size(default) if formula else self.values.get(str(default), default)
                )
        for key in set(rows.divisors).difference(rows.required):
            self.values.setdefault(key, 1)
        if pattern := self.read_as.pattern:
            letters = self.values.get(pattern.key, pattern.default)
            if self.values.get("layer_types") is None and isinstance(letters, str):
                self.values["layer_types"] = [pattern.letters.get(each, each) for each in letters]
        if isinstance(kinds := self.values.get("layer_types"), list):
            self.values["layer_types"] = [NEWEST_KIND.get(str(kind), kind) for kind in kinds]
            if self.read_as.pattern:
                self.values["num_hidden_layers"] = len(kinds)
            if self.read_as.cuts_types and (count := self.number("num_hidden_layers")):
                self.values["layer_types"] = self.values["layer_types"][:count]
        for alias, key in self.read_as.aliases.items():
            if key in self.values:
                self.values[alias] = self.values[key]  # vLLM may read the one or the other
        self._rows = rows
        self.headless = bool(rows.bare) and (not named or first == rows.bare)
        """Whether vLLM builds the model without a head."""

    def lacks(self, key: str) -> bool:
        """Return whether a key, also one of a nested table, is not there."""
        table: Any = self.values
        for part in key.split("."):
            if not isinstance(table, Mapping) or part not in table:
                return True
            table = table[part]
        return False

    def number(self, key: str, layer: int | None = None) -> int | None:
        """Return the number of a key, the length of a list, or a layer's item; None without."""
        found = number(self.values, key, layer)
        value = self.values.get(key) if found is None and "." in key else found
        return value if type(value) is int else None

    def size(self, text: str, layer: int | None = None) -> int | None:
        """Return the value of a size; None if a key has no number."""
        return evaluate(text, lambda key: self.number(key, layer))

    def has(self, block: str, layer: int | None = None) -> bool:
        """Return whether a block's condition holds of a layer; `not ` before it reverses it."""
        if not block:
            return True
        name = block.removeprefix("not ")
        answer = holds(self._rows.blocks[name], layer, self.values, self.number)
        return answer is (name == block)
