"""The layers that vLLM builds, without data, and how each loads its parameters.

Layers are those of one rank: of several, each rank has layers of smaller sizes, and loads a part of
each tensor, which is not told here. The source is vLLM 0.32's `linear.py`,
`parameter.py` and `vocab_parallel_embedding.py`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from mquant.loader_model.vllm.tensors import (
    MODEL_DTYPE,
    Copies,
    Kind,
    Loaded,
    LoadRefused,
    Parameter,
    View,
)

Shard = str | int | tuple[int, ...] | None
_QKV: Final = {"q": 0, "k": 1, "v": 2, "index_q": 3, "index_k": 4}
_VOCABULARY_PADDING: Final = 64


def _same_or_scalar(copies: Copies, target: View, loaded: Loaded) -> None:
    """Copy a tensor of the same shape, or a scalar into a vector of one element."""
    copies.same(target, loaded.scalar_as_vector() if target.shape == (1,) else loaded)


@dataclass(eq=False)
class Layer:
    """A layer with parameters of its own, by the last part of the name.

    `name` is the name in the model; `prefix` is the name that the quantization config is asked for.
    `class_name` is vLLM's, which targets may match.
    """

    name: str
    prefix: str
    class_name: str = ""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    loads_itself = False
    """Whether vLLM's layer has a `load_weights`, which gets every tensor below the layer."""

    def add(self, *parameters: Parameter) -> None:
        """Add parameters, whose names are given without the layer's."""
        for parameter in parameters:
            self.parameters[parameter.name] = parameter
            parameter.name = f"{self.name}.{parameter.name}"

    def load(self, copies: Copies, last: str, loaded: Loaded, shard: Shard) -> None:
        """Copy a tensor into the parameter `last`, as torch's default loader of vLLM does."""
        target = self.parameters[last].whole()
        if target.parameter.numel == 1 and loaded.numel == 1:
            loaded = loaded.reshape(target.shape)
        copies.same(target, loaded)


@dataclass(eq=False)
class Linear(Layer):
    """A linear layer of one matrix, or of several matrices fused along the outputs.

    `outputs` are the rows of each matrix and `inputs` the columns of all, of one rank; `ranks` is
    the number of ranks that share the layer.
    """

    outputs: tuple[int, ...] = ()
    inputs: int = 0
    ranks: int = 1
    bias: bool = False

    def check_blocks(self, high: int, wide: int) -> None:
        """Raise LoadRefused if the ranks that share the layer would cut a block of the weight.

        vLLM refuses it, or each rank takes scales of other weights.
        """
        if self.ranks > 1:
            for size in self.outputs:
                if size % high:
                    raise LoadRefused(self.name, f"writes {size}, no multiple of {high}")

    @property
    def rows(self) -> int:
        """The rows of the weight."""
        return sum(self.outputs)

    def build(self, parameters: Iterable[Parameter] | None) -> None:
        """Create the parameters: those of a quantization method, or a plain weight."""
        plain = Parameter("weight", MODEL_DTYPE, (self.rows, self.inputs), Kind.MATRIX, 0, 1)
        self.add(*([plain] if parameters is None else parameters))
        if self.bias:
            self.add(Parameter("bias", MODEL_DTYPE, (self.rows,), Kind.PLAIN, 0))


class Replicated(Linear):
    """vLLM's ReplicatedLinear: every shape must be the parameter's."""

    def load(self, copies: Copies, last: str, loaded: Loaded, shard: Shard) -> None:
        """Copy a tensor as vLLM's layer does."""
        copies.same(self.parameters[last].whole(), loaded.scalar_as_vector())


class Column(Linear):
    """vLLM's ColumnParallelLinear."""

    def load(self, copies: Copies, last: str, loaded: Loaded, shard: Shard) -> None:
        """Copy a tensor as vLLM's layer does."""
        parameter, loaded = self.parameters[last], loaded.scalar_as_vector()
        if parameter.output_dim is not None and parameter.kind is not Kind.ROW:
            dim = parameter.output_dim
            loaded = loaded.narrow(dim, 0, parameter.shape[dim])
        copies.same(parameter.whole(), loaded)


class Row(Linear):
    """vLLM's RowParallelLinear."""

    def check_blocks(self, high: int, wide: int) -> None:
        """Raise LoadRefused if the ranks that share the layer would cut a block of the weight."""
        if self.ranks > 1 and self.inputs % wide:
            raise LoadRefused(self.name, f"reads {self.inputs}, no multiple of {wide}")

    def load(self, copies: Copies, last: str, loaded: Loaded, shard: Shard) -> None:
        """Copy a tensor as vLLM's layer does."""
        parameter, loaded = self.parameters[last], loaded.scalar_as_vector()
        if parameter.input_dim is not None and parameter.kind in (Kind.MATRIX, Kind.ROW):
            dim = parameter.input_dim
            loaded = loaded.narrow(dim, 0, parameter.shape[dim])
        copies.same(parameter.whole(), loaded)


class Merged(Linear):
    """vLLM's MergedColumnParallelLinear: matrices fused along the outputs."""

    loads_itself = True

    def load(self, copies: Copies, last: str, loaded: Loaded, shard: Shard) -> None:
        """Copy a tensor as vLLM's layer does."""
        if last not in self.parameters:
            if last == "bias":
                return  # vLLM passes over the biases of a layer without biases
            raise LoadRefused(loaded.name, f"vLLM's {self.name} has no parameter {last}")
        parameter = self.parameters[last]
        numbers = self._numbers(shard)
        if shard is not None and not isinstance(shard, tuple):
            self._load_shard(copies, parameter, loaded, numbers[0])
        elif parameter.kind is Kind.SCALES:
            for number in numbers if shard is not None else range(parameter.shape[0]):
                self._load_shard(copies, parameter, loaded, number)
        elif parameter.kind in (Kind.ROW, Kind.WHOLE) or parameter.output_dim is None:
            _same_or_scalar(copies, parameter.whole(), loaded)
        else:
            # The matrices of a tensor that holds several stand one above the other.
            spans = list(self._spans(parameter))
            first = spans[numbers[0]][0]
            for number in numbers:
                start, size = spans[number]
                part = loaded.narrow(parameter.output_dim, start - first, size)
                self._load_shard(copies, parameter, part, number)

    def _numbers(self, shard: Shard) -> tuple[int, ...]:
        """Return the numbers of the matrices that a tensor holds."""
        if shard is None:
            return tuple(range(len(self.outputs)))
        numbers = (_QKV.get(shard, -1),) if isinstance(shard, str) else shard
        numbers = numbers if isinstance(numbers, tuple) else (numbers,)
        if not all(0 <= number < len(self.outputs) for number in numbers):
            raise LoadRefused(self.name, f"has no part {shard}")
        return numbers

    def _spans(self, parameter: Parameter) -> Iterator[tuple[int, int]]:
        """Yield where each matrix starts, and its size, along the parameter's outputs."""
        start = 0
        for rows in self.outputs:
            first, size = start, rows
            if parameter.block:
                first, size = -(-first // parameter.block), -(-size // parameter.block)
            if parameter.packed_dim is not None and parameter.packed_dim == parameter.output_dim:
                first, size = first // parameter.packed_factor, size // parameter.packed_factor
            yield first, size
            start += rows

    def _load_shard(
        self, copies: Copies, parameter: Parameter, loaded: Loaded, number: int
    ) -> None:
        if parameter.kind is Kind.SCALES:
            if loaded.shape:
                if loaded.shape[0] != 1:
                    raise LoadRefused(
                        loaded.name, f"has shape {list(loaded.shape)}, and vLLM takes one scale"
                    )
                loaded = loaded.first()
            copies.same(parameter.whole().index(number), loaded)
        elif parameter.output_dim is None:
            _same_or_scalar(copies, parameter.whole(), loaded)
        else:
            start, size = list(self._spans(parameter))[number]
            dim = parameter.output_dim
            part = parameter.whole().narrow(dim, start, size)
            copies.same(part, loaded.narrow(dim, 0, size))


@dataclass(eq=False)
class Qkv(Merged):
    """vLLM's QKVParallelLinear: q, k and v. `doubles`: the tensors of k fill v too."""

    doubles: bool = False

    def load(self, copies: Copies, last: str, loaded: Loaded, shard: Shard) -> None:
        """Copy a tensor as vLLM's layer does."""
        if self.doubles and shard == "v":
            raise LoadRefused(loaded.name, f"vLLM's {self.name} takes its keys for its values")
        super().load(copies, last, loaded, shard)
        if self.doubles and shard == "k":
            super().load(copies, last, loaded, "v")


class IndexedQkv(Qkv):
    """vLLM's MinimaxM3QKVParallelLinearWithIndexer: q, k, v, and q and k of an index."""

    def load(self, copies: Copies, last: str, loaded: Loaded, shard: Shard) -> None:
        """Copy a tensor as vLLM's layer does: of one matrix, and no scale of an index's matrix."""
        scalar = last in self.parameters and self.parameters[last].kind is Kind.SCALES
        if shard is None or (scalar and shard not in ("q", "k", "v")):
            raise LoadRefused(loaded.name, f"vLLM's {self.name} takes no {last} of the matrix")
        super().load(copies, last, loaded, shard)


@dataclass(eq=False)
class Embedding(Layer):
    """vLLM's VocabParallelEmbedding, and ParallelLMHead, whose rows are padded to 64."""

    vocabulary: int = 0
    inputs: int = 0
    bias: bool = False

    @property
    def rows(self) -> int:
        """The rows of the weight, with padding."""
        return -(-self.vocabulary // _VOCABULARY_PADDING) * _VOCABULARY_PADDING

    outputs = property(lambda self: (self.rows,))

    def build(self, parameters: Iterable[Parameter] | None) -> None:
        """Create the parameters: those of a quantization method, or a plain weight."""
        plain = Parameter("weight", MODEL_DTYPE, (self.rows, self.inputs), Kind.PLAIN, 0, 1)
        self.add(*([plain] if parameters is None else parameters))
        if self.bias:
            self.add(Parameter("bias", MODEL_DTYPE, (self.rows,), Kind.PLAIN, 0))

    def load(self, copies: Copies, last: str, loaded: Loaded, shard: Shard) -> None:
        """Copy a tensor as vLLM's layer does."""
        parameter = self.parameters[last]
        target, dim = parameter.whole(), parameter.output_dim
        if dim is None:
            _same_or_scalar(copies, target, loaded)
            return
        wanted = self.vocabulary
        if parameter.packed_dim == dim:
            wanted //= parameter.packed_factor
        if dim >= len(loaded.shape) or loaded.shape[dim] != wanted:
            raise LoadRefused(
                loaded.name, f"has shape {list(loaded.shape)}, and config.json has {wanted} rows"
            )
        first = min(loaded.shape[0], target.shape[0])
        copies.copy(target.narrow(0, 0, first), loaded)
        padding = target.narrow(0, first, target.shape[0] - first)
        parameter.written(padding.offset, padding.shape)  # vLLM fills the padding with zeros


class Bare(Layer):
    """A parameter of a module that is no layer: an attribute with torch's default loader."""


@dataclass(eq=False)
class Attention(Layer):
    """vLLM's Attention or MLAAttention, whose parameters are scales of the KV cache.

    `per_head`: the scales are one for each head; the numbers of query heads and of KV heads.
    """

    per_head: tuple[int, int] | None = None

    def load(self, copies: Copies, last: str, loaded: Loaded, shard: Shard) -> None:
        """Copy a tensor as vLLM's layer does."""
        if self.per_head is None:
            super().load(copies, last, loaded, shard)
            return
        if last.endswith("zero_point"):
            return  # vLLM has no use for zero points
        loaded = loaded.reshape((loaded.numel,))
        heads, kv_heads = self.per_head
        if not 0 < kv_heads <= heads:
            raise LoadRefused(loaded.name, f"{kv_heads} KV heads do not share {heads} heads")
        if last == "q_scale":  # vLLM keeps the largest scale of the heads that share a KV head
            group = heads // kv_heads
            loaded = loaded.reshape((loaded.numel // group, group)).largest(1)
        target = self.parameters[last].whole()
        copies.copy(target, loaded.narrow(0, 0, min(kv_heads, loaded.numel)))
