"""vLLM 0.32's method `fp8`: FP8 weights with one scale for each matrix, or for each block.

The source is vLLM's `quantization/fp8.py` and `utils/fp8_utils.py`.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import Any, Final, Self

from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.layers import Attention, Embedding, Linear
from mquant.loader_model.vllm.names import rename
from mquant.loader_model.vllm.tensors import (
    MODEL_DTYPE,
    Kind,
    LoadRefused,
    Parameter,
    Unknown,
)
from mquant.loader_rows import Renames

_WHERE: Final = "quantization_config"
_FP8: Final = "F8_E4M3"
_LEAST_REFINED: Final = 32
"""vLLM refines the blocks of experts no further than to this size."""
_CACHE_SCALES: Final = ("q_scale", "k_scale", "v_scale", "prob_scale")


class Fp8:
    """A quantization config of the method `fp8`. `fused` and `renames` are set once, before use.

    `ignored` are the names of layers that stay plain: a list, or a text where vLLM takes a text.
    `block` is the rows and columns that share a scale; None if a matrix has one scale.
    """

    kind = "fp8"
    asked: frozenset[str] = frozenset()
    suffixes: tuple[tuple[str, str], ...] = (
        (".k_proj.output_scale", ".attn.k_scale"),
        (".v_proj.output_scale", ".attn.v_scale"),
        (".q_proj.output_scale", ".attn.q_scale"),
        (".self_attn.prob_output_scale", ".self_attn.attn.prob_scale"),
    )

    def __init__(
        self, *, static: bool, ignored: Collection[Any], block: list[Any] | None, store: Any = None
    ) -> None:
        self.fused: Mapping[str, tuple[str, ...]] = {}
        self.renames: Renames | None = None
        self._static, self._ignored, self._block, self._store = static, ignored, block, store

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Self:
        """Read a quantization config. Raises LoadRefused if vLLM stops."""
        if "activation_scheme" not in config:
            raise LoadRefused(_WHERE, "has no activation_scheme")
        scheme = config["activation_scheme"]
        if scheme not in ("static", "dynamic"):
            raise LoadRefused(_WHERE, f"says activation_scheme {scheme!r}")
        ignored = config.get("ignored_layers") or config.get("modules_to_not_convert") or []
        if not isinstance(ignored, list | dict | str):
            raise LoadRefused(_WHERE, "has a list of ignored layers that is no list")
        block = config.get("weight_block_size")
        if block is not None:
            if not isinstance(block, list | dict | str) or len(block) != 2:
                raise LoadRefused(_WHERE, "has a weight_block_size that is not two numbers")
            if scheme == "static":
                raise LoadRefused(_WHERE, "says static activations with blocks of weights")
            if isinstance(block, dict):
                raise LoadRefused(_WHERE, "has a weight_block_size that is a table")
            block = list(block) if isinstance(block, list) else [None, None]
        static = scheme == "static"
        return cls(static=static, ignored=ignored, block=block, store=config.get("store_dtype"))

    def linear(self, layer: Linear) -> Iterable[Parameter] | None:
        """Return the parameters of a linear layer: a weight, its scales, and input scales."""
        if self._skips(layer.prefix):
            return None
        weight = Parameter("weight", _FP8, (layer.rows, layer.inputs), Kind.MATRIX, 0, 1)
        if self._block is None:
            one_each = (len(layer.outputs),)
            scale = Parameter("weight_scale", "F32", one_each, Kind.SCALES)
            inputs = [Parameter("input_scale", "F32", one_each, Kind.SCALES)]
            return [weight, scale, *(inputs if self._static else ())]
        rows, columns = self._block_of(layer.name)
        if rows < 0 and len(layer.outputs) > 1 and any(size % rows for size in layer.outputs[:-1]):
            raise LoadRefused(layer.name, f"has parts that blocks of {rows} rows do not divide")
        layer.check_blocks(rows, columns)
        shape = (_blocks(layer.name, layer.rows, rows), _blocks(layer.name, layer.inputs, columns))
        scale = Parameter("weight_scale_inv", "F32", shape, Kind.MATRIX, 0, 1, block=rows)
        return [weight, scale]

    def embedding(self, layer: Embedding, *, head: bool) -> Iterable[Parameter] | None:
        """Return None: vLLM's method keeps embeddings and heads plain."""
        return None

    def experts(self, layer: Experts) -> Iterable[Parameter] | None:
        """Return the parameters of the experts of a layer."""
        if self._skips(layer.prefix):
            return None
        if self._store == "mxfp4":
            raise Unknown("store_dtype mxfp4 under the method fp8")
        count, hidden, middle = layer.count, layer.hidden, layer.intermediate
        weights = [
            Parameter("w13_weight", _FP8, (count, layer.shards * middle, hidden)),
            Parameter("w2_weight", _FP8, (count, hidden, middle)),
            *layer.biases(),
        ]
        if self._block is None:
            scales = [
                Parameter("w13_weight_scale", "F32", (count, layer.shards), quant_method="tensor"),
                Parameter("w2_weight_scale", "F32", (count,), quant_method="tensor"),
            ]
            inputs = [Parameter(f"{part}_input_scale", "F32", (count,)) for part in ("w13", "w2")]
            return weights + scales + (inputs if self._static else [])
        rows, columns = self._expert_block(layer)

        def blocks(size: int, block: int) -> int:
            return _blocks(layer.name, size, block)

        up = (count, layer.shards * blocks(middle, rows), blocks(hidden, columns))
        down = (count, blocks(hidden, rows), blocks(middle, columns))
        return [
            *weights,
            Parameter("w13_weight_scale_inv", "F32", up, quant_method="block"),
            Parameter("w2_weight_scale_inv", "F32", down, quant_method="block"),
        ]

    def attention(self, layer: Attention, kv_heads: int) -> Iterable[Parameter]:
        """Return the scales of the KV cache, which no checkpoint must have."""
        if layer.class_name != "Attention":
            return ()
        return [Parameter(name, MODEL_DTYPE, (), optional=True) for name in _CACHE_SCALES]

    def _block_of(self, name: str) -> tuple[int, int]:
        """Return the rows and columns of a block. Raises LoadRefused if they are no numbers."""
        rows, columns = self._block or (None, None)
        if not isinstance(rows, int) or not isinstance(columns, int) or not rows or not columns:
            raise LoadRefused(name, f"cannot have blocks of {self._block}")
        return int(rows), int(columns)

    def _expert_block(self, layer: Experts) -> tuple[int, int]:
        """Return the block of experts, which is smaller than the config's if that does not fit."""
        rows, columns = self._block_of(layer.name)
        if not layer.intermediate % rows and (layer.ranks == 1 or not layer.intermediate % columns):
            return rows, columns
        refined = math.gcd(rows, columns, layer.intermediate, layer.hidden)
        if refined < _LEAST_REFINED:
            raise LoadRefused(
                layer.name,
                f"has intermediate size {layer.intermediate}, which blocks of {rows} do not divide",
            )
        layer.repeats = rows // refined, columns // refined
        return refined, refined

    def _skips(self, prefix: str) -> bool:
        """Return whether a layer stays plain. Raises LoadRefused if only a part of a layer does."""
        last = prefix.rpartition(".")[2]
        ignored, entries = self._names
        if prefix in ignored and (last in self.fused or "experts" not in prefix):
            return True
        if last in self.fused:
            parts = [prefix.replace(last, part) in ignored for part in self.fused[last]]
            if any(parts) and not all(parts):
                raise LoadRefused(prefix, "is fused of layers of which only some are ignored")
            return all(parts)
        if "experts" not in prefix:
            return False
        for entry in entries:
            if not isinstance(entry, str | list | dict):
                raise LoadRefused(_WHERE, f"ignores {entry!r}, which is no name")
            if "experts" in entry and prefix in entry:
                return True
        return False

    @cached_property
    def _names(self) -> tuple[Collection[Any], tuple[Any, ...]]:
        """Return the ignored names as the model's mapper leaves them, also in their order.

        Raises LoadRefused if an entry is no text, which the mapper cannot rename.
        """
        if self.renames is None and isinstance(self._ignored, str):
            return self._ignored, tuple(self._ignored)  # vLLM looks for a layer inside the text
        names = []
        for entry in self._ignored:
            if self.renames is not None and not isinstance(entry, str):
                raise LoadRefused(_WHERE, f"ignores {entry!r}, which is no name")
            names.append(rename(entry, self.renames) if self.renames else entry)
        return frozenset(name for name in names if isinstance(name, str)), tuple(names)


def _blocks(name: str, size: int, block: int) -> int:
    """Return the number of blocks, as vLLM computes it. Raises LoadRefused if it is negative."""
    number = (size + block - 1) // block
    if number < 0:
        raise LoadRefused(name, f"cannot have blocks of {block}")
    return number
