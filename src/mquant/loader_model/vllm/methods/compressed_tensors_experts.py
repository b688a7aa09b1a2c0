"""The parameters of experts under compressed-tensors, by vLLM's choice of a method for experts.

The source is vLLM 0.32's folder `compressed_tensors_moe`. vLLM keeps all experts of a layer in one
parameter: `w13_` holds gate and up one above the other, `w2_` holds down.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.methods.compressed_tensors_args import QuantizationArgs
from mquant.loader_model.vllm.methods.compressed_tensors_schemes import (
    PACKED,
    WNA16_BITS,
    Scheme,
    block_sides,
    is_fp8,
    is_int4_with,
    is_int8,
    is_mx,
    is_mxfp4_with_fp8,
    is_nvfp4,
    is_weight_only,
)
from mquant.loader_model.vllm.tensors import MODEL_DTYPE, LoadRefused, Parameter, Unknown

_MARLIN_COLUMNS = 128
"""Marlin, the only kernel for packed experts with scales per channel, takes multiples of it."""


@dataclass(frozen=True)
class _Pair:
    """The two matrices of an expert: gate above up, and down."""

    layer: Experts

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        """Yield the prefix of the parameters' names, rows and columns."""
        hidden, intermediate = self.layer.hidden, self.layer.intermediate
        yield "w13_", self.layer.shards * intermediate, hidden
        yield "w2_", hidden, intermediate

    def matrices(
        self,
        name: str,
        dtype: str,
        high: int | Fraction = 1,
        wide: int | Fraction = 1,
        how: str = "",
    ) -> list[Parameter]:
        """Return a parameter for each matrix; one element stands for `high` x `wide` weights.

        `wide` 0: one element stands for a row. `how` is the strategy of scales.
        """
        return [
            Parameter(
                prefix + name,
                dtype,
                (self.layer.count, int(rows // high), int(columns // wide) if wide else 1),
                quant_method=how,
            )
            for prefix, rows, columns in self
        ]

    def blocks(self, high: int, wide: int) -> list[Parameter]:
        """Return the scales of blocks, which divide gate; the last blocks may be cut elsewhere."""
        hidden, intermediate, count = self.layer.hidden, self.layer.intermediate, self.layer.count
        first = (count, self.layer.shards * intermediate // high, -(-hidden // wide))
        second = (count, -(-hidden // high), -(-intermediate // wide))
        return [
            Parameter("w13_weight_scale", "F32", first, quant_method="block"),
            Parameter("w2_weight_scale", "F32", second, quant_method="block"),
        ]

    def scalars(self, name: str, *, optional: bool = False) -> list[Parameter]:
        """Return scales, one for gate, one for up and one for down."""
        count = self.layer.count
        shapes = {"w13_": (count, self.layer.shards), "w2_": (count,)}
        return [
            Parameter(prefix + name, "F32", shape, optional=optional, quant_method="tensor")
            for prefix, shape in shapes.items()
        ]

    def of_experts(self, name: str, dtype: str, *more: int) -> list[Parameter]:
        """Return a value, or a few, for each expert and each of the two matrices."""
        shape = (self.layer.count, *more)
        return [Parameter(prefix + name, dtype, shape) for prefix in ("w13_", "w2_")]


def expert_parameters(scheme: Scheme, layer: Experts) -> list[Parameter]:
    """Return the parameters of the experts. Raises LoadRefused if vLLM stops, and Unknown."""
    weights, inputs, pair = scheme.weights, scheme.inputs, _Pair(layer)
    if is_mxfp4_with_fp8(scheme):
        raise Unknown("MXFP4 experts with FP8 activations, whose sizes depend on the GPU")
    if is_mx(weights, 4):
        scales = pair.matrices("weight_scale", "U8", wide=32, how="group")
        return [*pair.matrices("weight_packed", "U8", wide=2), *scales]
    if is_mx(weights, 8):
        scales = pair.matrices("weight_scale", "U8", wide=32, how="group")
        return [*pair.matrices("weight", "F8_E4M3"), *scales]
    if is_weight_only(scheme):
        if weights.num_bits not in WNA16_BITS or scheme.format != PACKED:
            raise LoadRefused(
                layer.name, f"has plain activations, and vLLM takes format {PACKED}, 2 to 8 bits"
            )
        return _packed(weights, pair)
    if is_nvfp4(weights):
        if inputs is not None and not is_nvfp4(inputs):
            raise LoadRefused(layer.name, "has NVFP4 weights and other activations")
        return _nvfp4(pair, weight_only=inputs is None)
    if is_fp8(scheme):
        return _fp8(scheme, pair)
    if is_int8(scheme, dynamic=True):
        if weights.strategy != "channel":
            raise LoadRefused(layer.name, "has INT8 weights without a scale per channel")
        scales = pair.matrices("weight_scale", "F32", wide=0, how="channel")
        return [*pair.matrices("weight", "I8"), *scales, *layer.biases()]
    if is_int4_with(scheme, "float"):
        raise Unknown("experts with INT4 weights and FP8 activations")
    # vLLM has INT4 experts with INT8 activations, but on CPUs only.
    raise LoadRefused(layer.name, "has a scheme of compressed-tensors that vLLM lacks for experts")


def _nvfp4(pair: _Pair, *, weight_only: bool) -> list[Parameter]:
    return [
        *pair.matrices("weight_packed", "U8", wide=2),
        *pair.matrices("weight_scale", "F8_E4M3", wide=16, how="group"),
        *pair.scalars("weight_global_scale"),
        *pair.scalars("input_global_scale", optional=weight_only),
    ]


def _fp8(scheme: Scheme, pair: _Pair) -> list[Parameter]:
    weights, inputs = scheme.weights, scheme.inputs
    made = pair.matrices("weight", "F8_E4M3")
    strategies = (weights.strategy, inputs.strategy if inputs else None)
    if strategies == ("tensor", "tensor"):
        made += pair.scalars("weight_scale")
    elif strategies == ("channel", "token"):
        made += pair.matrices("weight_scale", "F32", wide=0, how="channel")
    elif weights.strategy == "block":
        high, wide = block_sides(weights, pair.layer.name)
        if pair.layer.intermediate % high:
            raise LoadRefused(pair.layer.name, f"has gate and up that {high} does not divide")
        if pair.layer.ranks > 1 and pair.layer.intermediate % wide:
            raise LoadRefused(pair.layer.name, f"has down that {wide} does not divide")
        made += pair.blocks(high, wide)
    else:
        raise LoadRefused(
            pair.layer.name, f"has weights per {strategies[0]}, inputs per {strategies[1]}"
        )
    if inputs and not inputs.dynamic:
        made += pair.of_experts("input_scale", "F32")
    return made


def _packed(args: QuantizationArgs, pair: _Pair) -> list[Parameter]:
    layer, size = pair.layer, args.group_size
    per_word = Fraction(32, args.num_bits)
    if args.strategy == "channel":
        if layer.hidden % _MARLIN_COLUMNS or size not in (None, -1):
            raise LoadRefused(layer.name, "has scales per channel that no kernel takes")
        size = 0
    elif not size or layer.hidden % size or layer.intermediate % size:
        raise LoadRefused(layer.name, f"has matrices that groups of {size} do not fill")
    made = pair.matrices("weight_packed", "I32", wide=per_word)
    rows = layer.shards * layer.intermediate
    if not args.symmetric and (rows % per_word or layer.hidden % per_word):
        raise LoadRefused(layer.name, f"has rows that {per_word} zero points in a word do not fill")
    made += pair.matrices("weight_scale", MODEL_DTYPE, wide=size, how=args.strategy or "")
    if not args.symmetric:
        made += pair.matrices("weight_zero_point", "I32", per_word, size, how=args.strategy or "")
    return [*made, *pair.of_experts("weight_shape", MODEL_DTYPE, 2), *layer.biases()]
