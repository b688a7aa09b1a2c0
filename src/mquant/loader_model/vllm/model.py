"""vLLM's model of a checkpoint: the layers that an architecture builds under a config.json."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Protocol

from mquant.loader_model.vllm.config_stage import check
from mquant.loader_model.vllm.experts import Experts, asked_matrices
from mquant.loader_model.vllm.layers import (
    Attention,
    Bare,
    Column,
    Embedding,
    IndexedQkv,
    Layer,
    Linear,
    Merged,
    Qkv,
    Replicated,
    Row,
)
from mquant.loader_model.vllm.names import Modules, Renaming
from mquant.loader_model.vllm.tensors import LoadRefused, Parameter, Unknown
from mquant.loader_rows import LayerRow, Renames, Settings, VllmRows

MOST_LAYERS: Final = 1_000
_LINEAR: Final[Mapping[str, tuple[type[Linear], str]]] = {
    "qkv": (Qkv, "QKVParallelLinear"),
    "indexed_qkv": (IndexedQkv, "MinimaxM3QKVParallelLinearWithIndexer"),
    "merged": (Merged, "MergedColumnParallelLinear"),
    "column": (Column, "ColumnParallelLinear"),
    "row": (Row, "RowParallelLinear"),
    "replicated": (Replicated, "ReplicatedLinear"),
}
_SPLIT: Final = ("qkv", "indexed_qkv", "merged", "column", "row", "experts")


class Method(Protocol):
    """A quantization method under one quantization config, as vLLM parses it.

    Every function is asked in the order in which vLLM builds the layers. Each returns the
    parameters of the layer, or None for a plain layer. Each raises LoadRefused where vLLM stops,
    and Unknown where it is not known what vLLM does.
    """

    kind: str
    """The quantization method, as `quant_method` names it."""
    fused: Mapping[str, tuple[str, ...]]
    """Last part of a fused layer's name -> the last parts on disk (`packed_modules_mapping`)."""
    suffixes: tuple[tuple[str, str], ...]
    """Ends of tensors' names that the method renames, to scales of the KV cache."""
    renames: Renames | None
    """Parts of names on disk -> vLLM's, which vLLM replaces in the config's names of modules too;
    None if the model's class has no mapper of names."""
    asked: frozenset[str]
    """The names for which vLLM will ask: of layers, and of the matrices of a first expert."""

    def linear(self, layer: Linear) -> Iterable[Parameter] | None:
        """Return the parameters of a linear layer."""

    def embedding(self, layer: Embedding, *, head: bool) -> Iterable[Parameter] | None:
        """Return the parameters of the embeddings, or of the head."""

    def experts(self, layer: Experts) -> Iterable[Parameter] | None:
        """Return the parameters of the experts of a layer; the method may set `layer.layout`."""

    def attention(self, layer: Attention, kv_heads: int) -> Iterable[Parameter]:
        """Return the parameters of an attention layer: scales of the KV cache."""


@dataclass(frozen=True)
class Model:
    """The layers of vLLM's model in the order in which vLLM builds them, and how names reach them.

    `aliases`: parameters that share another parameter, which vLLM does not load on their own.
    """

    layers: tuple[Layer, ...]
    modules: Modules
    renaming: Mapping[str, Renaming]
    aliases: Mapping[str, str]
    rows: VllmRows
    settings: Settings

    @property
    def inside(self) -> str:
        """What the names of the text model begin with, in vLLM's model."""
        around = self.settings.wrapping
        return f"{around.inside}." if around else ""

    def parameters(self) -> Iterator[Parameter]:
        """Yield every parameter."""
        for layer in self.layers:
            yield from layer.parameters.values()


def build(rows: VllmRows, settings: Settings, method: Method | None, ranks: int = 1) -> Model:
    """Build vLLM's model, or the part of one of several ranks that share the model.

    Raises LoadRefused if vLLM stops, at config.json too, and Unknown.
    """
    check(settings, rows)
    needs = settings.wrapping.needs if settings.wrapping else ()
    for key in (*rows.required, *needs):
        if settings.lacks(key):
            raise LoadRefused("config.json", f"has no {key}")
    if method:
        _tell(method, rows, settings)
    layers, modules = [], Modules()
    act = settings.values.get(rows.activation)
    for place in _every(rows, settings):
        merged = place.row.kind == "merged" and place.row in rows.layers  # none of a tower's
        if merged and rows.activations and act not in rows.activations:
            raise LoadRefused("config.json", f"says {rows.activation} {act!r}")
        layer = _layer(place, _Sizes(settings, ranks), method)
        layers.append(layer)
        modules.add(layer)
    if rows.needs_experts and not any(isinstance(layer, Experts) for layer in layers):
        raise LoadRefused("config.json", "says that no layer has experts")
    aliases = _tied(rows, settings, layers)
    return Model(tuple(layers), modules, _renaming(rows, settings, method), aliases, rows, settings)


def _tell(method: Method, rows: VllmRows, settings: Settings) -> None:
    """Tell the method what vLLM's class of the model says of names."""
    around = settings.wrapping
    method.fused = {
        **{
            name: of for name, of in rows.fused.items() if settings.has(rows.fused_if.get(name, ""))
        },
        **(around.fused if around else {}),
    }
    # A table's own renames are in no mapper of names.
    own = rows.outer_renames or (rows.renames if rows.walks == "modules" else None)
    renames = own if around is None else around.renames if around.maps else None
    if renames is not None:
        method.renames = tuple((old, new) for old, new in renames if new is not None)
    method.asked = frozenset(_asked(rows, settings, method.kind))


@dataclass(frozen=True)
class _Place:
    """A layer of the model: its row, and the number of the decoder layer, if there is one.

    `inside` is what the layer's name begins with if the model is a part of a larger one.
    """

    row: LayerRow
    number: int | None = None
    inside: str = ""

    @property
    def name(self) -> str:
        return self.inside + self.row.name.replace("{layer}", str(self.number))

    @property
    def asked(self) -> str:
        """The name under which vLLM asks the quantization config."""
        asked = self.row.asked_as
        return self.name if asked is None else asked.replace("{layer}", str(self.number))


def _every(rows: VllmRows, settings: Settings) -> Iterator[_Place]:
    """Yield every layer of the model."""
    inside = ""
    if settings.wrapping:
        yield from _repeated(settings.wrapping.layers, settings)
        inside = f"{settings.wrapping.inside}."
    head = [row for row in rows.model_rows if row.kind == "head"]
    others = [row for row in rows.model_rows if row not in head]
    yield from _repeated((*others, *rows.layer_rows), settings, inside)
    for row in () if settings.headless else head:
        yield _Place(row, None, inside)


def layers_outside(settings: Settings) -> Iterator[tuple[LayerRow, Layer]]:
    """Yield the rows and layers of a larger model outside the text model, all plain."""
    rows = settings.wrapping.layers if settings.wrapping else ()
    for place in _repeated(rows, settings):
        yield place.row, _layer(place, _Sizes(settings, 1), None)


def _repeated(rows: Iterable[LayerRow], settings: Settings, inside: str = "") -> Iterator[_Place]:
    """Yield the layers of the rows; rows of one count are repeated together."""
    for count, group in groupby(rows, lambda row: row.count if "{layer}" in row.name else ""):
        if not count:
            yield from (_Place(row, None, inside) for row in group if settings.has(row.when))
            continue
        size, together = settings.size(count), tuple(group)
        if size is None or not 0 <= size <= MOST_LAYERS:
            raise Unknown(f"{count} in config.json")
        for number in range(size):
            for row in together:
                if settings.has(row.when, number):
                    yield _Place(row, number, inside)


def _asked(rows: VllmRows, settings: Settings, kind: str) -> Iterator[str]:
    for place in _every(rows, settings):
        row = place.row
        if not row.heeds or kind in row.spared_by:
            continue
        if row.kind == "experts":
            names = asked_matrices(row.asked_names or row.names)
            yield from (f"{place.asked}.0.{matrix}" for matrix in names)
        elif row.kind not in ("norm", "bare"):
            yield place.asked


@dataclass(frozen=True)
class _Sizes:
    """The sizes of layers on one rank of `ranks`."""

    settings: Settings
    ranks: int

    def of(self, place: _Place) -> tuple[tuple[int, ...], int, int]:
        """Return the rows and columns of a layer, and the number of ranks that share the layer.

        Raises LoadRefused if the ranks cannot share the layer evenly.
        """
        row, name = place.row, place.name
        rows = tuple(_size(self.settings, text, place.number) for text in row.rows)
        columns, ranks = _size(self.settings, row.columns, place.number), self.ranks
        if ranks == 1 or not row.split or row.kind not in _SPLIT:
            return rows, columns, 1
        if row.kind == "row":
            return rows, _share(name, "reads", columns, ranks), ranks
        if row.kind == "experts":
            return (rows[0], _share(name, "has", rows[1], ranks)), columns, ranks
        # Of fewer KV heads than ranks, several ranks have the same.
        kv_heads = self.settings.number("num_key_value_heads") or ranks
        shares = [ranks] * len(rows)
        if row.kind in ("qkv", "indexed_qkv"):
            shares[1:] = [*[min(ranks, kv_heads)] * 3, 1][: len(rows) - 1]
        pairs = zip(rows, shares, strict=True)
        return tuple(_share(name, "writes", size, share) for size, share in pairs), columns, ranks


def _share(name: str, does: str, size: int, ranks: int) -> int:
    if size % ranks:
        raise LoadRefused(name, f"{does} a part of {size}, which {ranks} does not divide")
    return size // ranks


def _layer(place: _Place, sizes_of: _Sizes, method: Method | None) -> Layer:
    row, name, asked = place.row, place.name, place.asked
    bias = bool(row.bias) and sizes_of.settings.has(row.bias, place.number)
    sizes, columns, ranks = sizes_of.of(place)
    method = method if row.heeds and method and method.kind not in row.spared_by else None
    if row.kind in _LINEAR:
        made, class_name = _LINEAR[row.kind]
        class_name = row.class_name or class_name
        linear = made(
            name, asked, class_name, outputs=sizes, inputs=columns, ranks=ranks, bias=bias
        )
        if isinstance(linear, Qkv):
            linear.doubles = row.doubles
        linear.build(method.linear(linear) if method else None)
        return linear
    if row.kind in ("embedding", "head"):
        head = row.kind == "head"
        class_name = "ParallelLMHead" if head else "VocabParallelEmbedding"
        embedding = Embedding(
            name, asked, class_name, vocabulary=sizes[0], inputs=columns, bias=bias
        )
        embedding.build(method.embedding(embedding, head=head) if method else None)
        return embedding
    if row.kind == "experts":
        experts = Experts(
            name,
            asked,
            "RoutedExperts",
            count=sizes[0],
            hidden=columns,
            intermediate=sizes[1],
            ranks=ranks,
            names=row.names,
            asked_names=row.asked_names,
            stacks=row.stacks,
            also=row.also,
            transposed=row.transposed,
            biased=bias,
        )
        experts.build(method.experts(experts) if method else None)
        return experts
    if row.kind in ("attention", "mla"):
        attention = Attention(name, asked, "MLAAttention" if row.kind == "mla" else "Attention")
        attention.add(*(method.attention(attention, sizes[0]) if method else ()))
        return attention
    if row.kind == "bare":
        bare = Bare(name, asked)
        bare.parameters[""] = Parameter(name, row.dtype, sizes, optional=row.optional)
        return bare
    norm = Layer(name, asked, "RMSNorm")
    norm.add(*(Parameter(each, "BF16", sizes) for each in ("weight", "bias")[: 1 + bias]))
    return norm


def _size(settings: Settings, text: str, layer: int | None) -> int:
    size = settings.size(text, layer)
    if size is None or size < 0:
        raise Unknown(f"{text} of config.json")
    return size


def _tied(rows: VllmRows, settings: Settings, layers: list[Layer]) -> dict[str, str]:
    """Return the head's parameters that are those of the embeddings."""
    if (
        settings.headless
        or not rows.ties_head
        or settings.values.get("tie_word_embeddings") is not True
    ):
        return {}
    head = next(layer for layer in layers if layer.class_name == "ParallelLMHead")
    embedding = next(layer for layer in layers if layer.class_name == "VocabParallelEmbedding")
    if embedding.parameters.keys() != {"weight"}:
        raise Unknown("tied embeddings that are quantized")
    head.parameters["weight"] = embedding.parameters["weight"]
    return {f"{head.name}.weight": f"{embedding.name}.weight"}


def _renaming(rows: VllmRows, settings: Settings, method: Method | None) -> dict[str, Renaming]:
    quantized, around = method is not None, settings.wrapping
    drops: tuple[str, ...] = ()
    if rows.mtp and (count := settings.number(rows.mtp)):
        base = settings.number("num_hidden_layers") or 0
        drops = tuple(f"layers.{base + number}." for number in range(min(count, MOST_LAYERS)))
    suffixes = method.suffixes if method else ()
    apart = {name for name, block in rows.fused_if.items() if not settings.has(block)}
    inner = Renaming(
        tuple(row for row in rows.stacked if row[1].rpartition(".")[2] not in apart),
        rows.renames,
        drops,
        rows.ignores,
        quantized and rows.inner_quantization,
        suffixes if rows.inner_quantization else (),
    )
    head = ("lm_head.",) if settings.headless else ()
    outer = Renaming(
        (),
        rows.outer_renames,
        head,
        (),
        quantized and rows.outer_quantization,
        suffixes if rows.outer_quantization else (),
    )
    if around is None:
        return {"": outer, "model": inner}
    larger = Renaming(around.stacked, around.renames, (), (), quantized, suffixes)
    return {"": larger, around.inside: outer, f"{around.inside}.model": inner}
