"""ModelOpt's quantization methods of vLLM 0.32, without data (`quantization/modelopt.py`).

An algorithm is a table entry: the parameters of a linear layer, and those of a layer's experts.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, Final

from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.layers import Attention, Embedding, IndexedQkv, Linear
from mquant.loader_model.vllm.methods.fp8 import Fp8
from mquant.loader_model.vllm.methods.modelopt_args import (
    BLOCK_CODECS,
    BLOCK_FP8,
    LINEAR_ALGOS,
    Arguments,
    Names,
    read,
)
from mquant.loader_model.vllm.tensors import MODEL_DTYPE, Kind, LoadRefused, Parameter, Unknown
from mquant.loader_rows import Renames

_BLOCK: Final = 128
_MX_BLOCK: Final = 32
_FP8: Final = "F8_E4M3"
_Matrices = Linear | Embedding
_TOWERS: Final = ("vision_tower", "vision_model", "vit_large_projector")
"""Parts of names of layers that vLLM leaves plain unless the config lists every layer."""


class ModelOpt:
    """A `Method` under one ModelOpt config."""

    kind = "modelopt"
    fused: Mapping[str, tuple[str, ...]]
    renames: Renames | None
    asked: frozenset[str] = frozenset()
    suffixes: tuple[tuple[str, str], ...] = ()

    def __init__(self, arguments: Arguments) -> None:
        self.fused = {}
        self.renames = None
        self._parsed = arguments

    @cached_property
    def _arguments(self) -> Arguments:
        """The config, under the model's names: the model tells its names after parsing."""
        return self._parsed if self.renames is None else self._parsed.renamed(self.renames)

    @cached_property
    def _excluded(self) -> Names:
        return Names(self._arguments.exclude, self.fused)

    def _algo(self, prefix: str) -> str | None:
        """Return the algorithm of a layer; None if the layer is not quantized."""
        if self._excluded.exclude(prefix):
            return None
        if not self._arguments.mixed:
            tower = any(part in prefix for part in _TOWERS)
            return None if tower else self._arguments.algo
        algo = self._arguments.algo_of(prefix, self.fused)
        if algo in BLOCK_CODECS:
            raise Unknown(f"{algo} in MIXED_PRECISION ({prefix})")
        return algo

    def linear(self, layer: Linear) -> Iterable[Parameter] | None:
        """Return the parameters of a linear layer."""
        if isinstance(layer, IndexedQkv) and self._arguments.cache_fp4:
            raise Unknown("a KV cache in NVFP4 of sparse attention, which some GPUs have")
        return self._matrices(layer)

    def embedding(self, layer: Embedding, *, head: bool) -> Iterable[Parameter] | None:
        """Return the parameters of the head; vLLM leaves the embeddings plain."""
        if head:
            return self._matrices(layer)
        self._algo(layer.prefix)
        return None

    def _matrices(self, layer: _Matrices) -> Iterable[Parameter] | None:
        algo = self._algo(layer.prefix)
        if algo not in LINEAR_ALGOS:
            return None
        return _LINEAR[algo](layer, self._arguments.group_size)

    def experts(self, layer: Experts) -> Iterable[Parameter] | None:
        """Return the parameters of the experts of a layer."""
        algo = self._algo(layer.prefix)
        if self._arguments.mixed:
            if algo in BLOCK_FP8:
                block = [self._arguments.block] * 2
                return Fp8(static=False, ignored=(), block=block).experts(layer)
            if algo not in ("FP8", "NVFP4", "W4A16_NVFP4", "MXFP8"):
                return None
        if algo is None:
            return None
        layer.layout = "modelopt"
        return _EXPERTS[algo](layer, self._arguments.group_size)

    def attention(self, layer: Attention, kv_heads: int) -> Iterable[Parameter]:
        """Return the scales of the KV cache, which no checkpoint must have."""
        latent = layer.class_name == "MLAAttention"
        if latent and self._arguments.cache_fp4:
            raise LoadRefused(layer.name, "is latent attention, whose cache cannot be in NVFP4")
        if self._arguments.mixed:
            if latent:
                self._algo(layer.prefix)
                return ()
            if not self._arguments.cache:
                return ()
        names = ("q_scale", "k_scale", "v_scale", "prob_scale")
        return [Parameter(name, MODEL_DTYPE, (), optional=True) for name in names]


def parse(method_name: str, config: Mapping[str, Any]) -> ModelOpt:
    """Return the method under a config. Raises LoadRefused where vLLM stops, and Unknown."""
    return ModelOpt(read(method_name, config))


def _matrix(name: str, dtype: str, rows: int, columns: int) -> Parameter:
    return Parameter(name, dtype, (rows, columns), Kind.MATRIX, 0, 1)


def _scales(layer: _Matrices, name: str, *, optional: bool = False) -> Parameter:
    """Return one scale for each matrix of a layer."""
    return Parameter(name, "F32", (len(layer.outputs),), Kind.SCALES, optional=optional)


def _divisible(where: str, size: int, by: int) -> None:
    if size % by:
        raise LoadRefused(where, f"has {size} inputs, which {by} does not divide")


def _groups(where: str, size: int, group: Any) -> int:
    """Return the groups of a row; vLLM makes a shape of the number, whatever the size is."""
    if not isinstance(group, int) or group <= 0:
        raise LoadRefused(where, f"cannot have groups of {str(group)[:20]}")
    return size // group


def _nvfp4(layer: _Matrices, group: Any, *, activations: bool = True) -> list[Parameter]:
    _divisible(layer.name, layer.inputs, 16)
    return [
        _matrix("weight", "U8", layer.rows, layer.inputs // 2),
        _scales(layer, "weight_scale_2"),
        _matrix("weight_scale", _FP8, layer.rows, _groups(layer.name, layer.inputs, group)),
        _scales(layer, "input_scale", optional=not activations),
    ]


def _w4a16(layer: _Matrices, group: Any) -> list[Parameter]:
    return _nvfp4(layer, group, activations=False)


def _fp8(layer: _Matrices, _group: Any) -> list[Parameter]:
    return [
        _matrix("weight", _FP8, layer.rows, layer.inputs),
        _scales(layer, "weight_scale"),
        _scales(layer, "input_scale"),
    ]


def _fp8_channels(layer: _Matrices, _group: Any) -> list[Parameter]:
    return [
        _matrix("weight", _FP8, layer.rows, layer.inputs),
        Parameter("weight_scale", "F32", (layer.rows,), Kind.COLUMN, 0),
    ]


def _fp8_blocks(layer: _Matrices, _group: Any) -> list[Parameter]:
    _divisible(layer.name, layer.inputs, _BLOCK)
    shape = (-(-layer.rows // _BLOCK), 1, layer.inputs // _BLOCK, 1)
    return [
        _matrix("weight", _FP8, layer.rows, layer.inputs),
        Parameter("weight_scale", "F32", shape, Kind.MATRIX, 0, 2, block=_BLOCK),
    ]


def _mxfp8(layer: _Matrices, _group: Any) -> list[Parameter]:
    _divisible(layer.name, layer.inputs, _MX_BLOCK)
    return [
        _matrix("weight", _FP8, layer.rows, layer.inputs),
        _matrix("weight_scale", "U8", layer.rows, layer.inputs // _MX_BLOCK),
    ]


_LINEAR: Final[Mapping[str | None, Callable[[_Matrices, Any], list[Parameter]]]] = {
    "FP8": _fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8_channels,
    "FP8_PB_WO": _fp8_blocks,
    "NVFP4": _nvfp4,
    "W4A16_NVFP4": _w4a16,
    "MXFP8": _mxfp8,
}


def _weights(layer: Experts, suffix: str, dtype: str, divisors: tuple[int, int]) -> list[Parameter]:
    """Return a parameter of gate and up, and one of down; `divisors` divide the columns."""
    rows, hidden = layer.shards * layer.intermediate, layer.hidden
    first, second = hidden // divisors[0], layer.intermediate // divisors[1]
    return [
        Parameter(f"w13_{suffix}", dtype, (layer.count, rows, first)),
        Parameter(f"w2_{suffix}", dtype, (layer.count, hidden, second)),
    ]


def _tensor_scales(layer: Experts, suffix: str, *, parts: bool) -> list[Parameter]:
    """Return one scale for every expert; `parts`: gate and up have a scale each."""
    shape = (layer.count, layer.shards) if parts else (layer.count,)
    return [
        Parameter(f"w13_{suffix}", "F32", shape, quant_method="tensor"),
        Parameter(f"w2_{suffix}", "F32", (layer.count,), quant_method="tensor"),
    ]


def _nvfp4_experts(layer: Experts, group: Any, *, activations: bool = True) -> list[Parameter]:
    for size in (layer.hidden, layer.intermediate):
        _groups(layer.name, size, group)
    inputs = _tensor_scales(layer, "input_scale", parts=True)
    for parameter in inputs:
        parameter.optional = not activations
    return [
        *_weights(layer, "weight", "U8", (2, 2)),
        *_weights(layer, "weight_scale", _FP8, (group, group)),
        *_tensor_scales(layer, "weight_scale_2", parts=True),
        *inputs,
    ]


def _w4a16_experts(layer: Experts, group: Any) -> list[Parameter]:
    return _nvfp4_experts(layer, group, activations=False)


def _fp8_experts(layer: Experts, _group: Any) -> list[Parameter]:
    return [
        *_weights(layer, "weight", _FP8, (1, 1)),
        *_tensor_scales(layer, "weight_scale", parts=True),
        *_tensor_scales(layer, "input_scale", parts=False),
    ]


def _mxfp8_experts(layer: Experts, _group: Any) -> list[Parameter]:
    for size in (layer.hidden, layer.intermediate):
        _divisible(layer.name, size, _MX_BLOCK)
    return [
        *_weights(layer, "weight", _FP8, (1, 1)),
        *_weights(layer, "weight_scale", "U8", (_MX_BLOCK, _MX_BLOCK)),
    ]


_EXPERTS: Final[Mapping[str, Callable[[Experts, Any], list[Parameter]]]] = {
    # vLLM has one class for the experts of all FP8 algorithms: a scale for each matrix.
    "FP8": _fp8_experts,
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8_experts,
    "FP8_PB_WO": _fp8_experts,
    "NVFP4": _nvfp4_experts,
    "W4A16_NVFP4": _w4a16_experts,
    "MXFP8": _mxfp8_experts,
}
