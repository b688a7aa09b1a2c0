"""The schemes of compressed-tensors in vLLM, and the parameters that each gives a layer.

The source is vLLM 0.32's `compressed_tensors.py` and its folder `schemes`. The GPU is assumed to
have what a scheme needs.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from mquant.loader_model.vllm.layers import Embedding, Linear
from mquant.loader_model.vllm.methods.compressed_tensors_args import QuantizationArgs
from mquant.loader_model.vllm.tensors import (
    MODEL_DTYPE,
    Kind,
    LoadRefused,
    Parameter,
    Unknown,
)

PACKED: Final = "pack-quantized"
WNA16_BITS: Final = range(2, 9)
_WITH_ACTIVATIONS: Final = (
    "naive-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
)
_FP8_STRATEGIES: Final = ("tensor", "channel", "block")


class Mismatch(LoadRefused):
    """vLLM raises ValueError while it chooses a scheme, which the head takes for no scheme."""


@dataclass(frozen=True)
class Scheme:
    """What a config group says: the arguments of weights, inputs and outputs, and the format."""

    weights: QuantizationArgs
    inputs: QuantizationArgs | None
    outputs: QuantizationArgs | None
    format: object


def quantizes_activations(name: object) -> bool:
    """Return whether vLLM takes a format for one of quantized activations."""
    return name in _WITH_ACTIVATIONS


def is_nvfp4(args: QuantizationArgs | None) -> bool:
    """Return whether weights or activations are NVFP4."""
    return (
        args is not None
        and (args.type, args.num_bits, args.group_size) == ("float", 4, 16)
        and args.strategy == "tensor_group"
        and args.symmetric
    )


def is_mx(args: QuantizationArgs, bits: int) -> bool:
    """Return whether weights are MXFP4 or MXFP8."""
    return (
        (args.type, args.num_bits, args.group_size) == ("float", bits, 32)
        and args.strategy == "group"
        and args.symmetric
        and (bits == 4 or args.scale_dtype == "uint8")
    )


def is_mxfp4_with_fp8(scheme: Scheme) -> bool:
    """Return whether weights are MXFP4 and activations dynamic FP8."""
    inputs = scheme.inputs
    return (
        inputs is not None
        and is_mx(scheme.weights, 4)
        and not scheme.weights.dynamic
        and (inputs.type, inputs.num_bits) == ("float", 8)
        and bool(inputs.dynamic)
        and inputs.strategy in ("token", "group")
        and inputs.symmetric
    )


def is_weight_only(scheme: Scheme) -> bool:
    """Return whether weights have scales per channel or group, and activations are plain."""
    weights = scheme.weights
    return weights.strategy in ("channel", "group") and not scheme.inputs and not weights.dynamic


def is_fp8(scheme: Scheme) -> bool:
    """Return whether weights and activations are FP8. vLLM does not look at the bits."""
    weights, inputs = scheme.weights, scheme.inputs
    if inputs is None or not _is_fp8_weight(weights) or inputs.type != "float":
        return False
    return bool(inputs.dynamic) or (inputs.symmetric and inputs.strategy == "tensor")


def _is_fp8_weight(args: QuantizationArgs) -> bool:
    static = args.symmetric and not args.dynamic
    return args.type == "float" and static and args.strategy in _FP8_STRATEGIES


def is_int8(scheme: Scheme, *, dynamic: bool) -> bool:
    """Return whether weights and activations have 8 bits, with scales per tensor or token.

    vLLM asks it of weights without quantized activations too, and fails.
    """
    weights, inputs = scheme.weights, scheme.inputs
    if inputs is None:
        raise LoadRefused("config.json", "has no input_activations for a format that needs them")
    return (
        weights.num_bits == inputs.num_bits == 8
        and weights.strategy in ("tensor", "channel")
        and inputs.strategy == ("token" if dynamic else "tensor")
        and weights.symmetric
        and not weights.dynamic
        and bool(inputs.dynamic) is dynamic
    )


def is_int4_with(scheme: Scheme, inputs_type: str) -> bool:
    """Return whether weights are INT4 and activations have 8 bits, with scales per token."""
    weights, inputs = scheme.weights, scheme.inputs
    return (
        inputs is not None
        and (weights.type, weights.num_bits) == ("int", 4)
        and (inputs.type, inputs.num_bits) == (inputs_type, 8)
        and (
            weights.strategy == "group" or (inputs_type == "int" and weights.strategy == "channel")
        )
        and inputs.strategy == "token"
        and weights.symmetric
        and (inputs_type == "int" or inputs.symmetric)
        and not weights.dynamic
    )


def linear_parameters(scheme: Scheme, layer: Linear | Embedding) -> list[Parameter]:
    """Return the parameters of a linear layer, or of a head that is one.

    Raises LoadRefused if vLLM has no such scheme, and Unknown.
    """
    weights, inputs = scheme.weights, scheme.inputs
    if is_nvfp4(weights):
        if inputs is not None and not is_nvfp4(inputs):
            raise Mismatch(layer.name, "has NVFP4 weights and other activations")
        return _nvfp4(layer, weight_only=inputs is None)
    if is_mx(weights, 4):
        return _mx(layer, "weight_packed", "U8", 2)
    if is_mx(weights, 8):
        return _mx(layer, "weight", "F8_E4M3", 1)
    if is_int4_with(scheme, "float"):
        raise Unknown("INT4 weights with FP8 activations, which only some GPUs take")
    if _is_int_with_outputs(scheme):
        return _int_with_outputs(scheme, layer)
    if _is_int_with_dynamic_inputs(scheme) or (is_weight_only(scheme) and scheme.format == PACKED):
        return _packed(weights, layer)
    if quantizes_activations(scheme.format):
        return _by_activations(scheme, layer)
    raise LoadRefused(layer.name, "has a scheme of compressed-tensors that vLLM does not know")


def _by_activations(scheme: Scheme, layer: Linear | Embedding) -> list[Parameter]:
    weights, inputs = scheme.weights, scheme.inputs
    static = inputs is not None and not inputs.dynamic
    if is_fp8(scheme) or _is_fp8_weight(weights):
        return _fp8(weights, layer, static=static, weight_only=not is_fp8(scheme))
    if is_int8(scheme, dynamic=False) or is_int8(scheme, dynamic=True):
        return _int8(scheme, layer, static=static)
    if is_int4_with(scheme, "int") and not static:
        raise Unknown("INT4 weights, one in a byte, with INT8 activations")
    raise LoadRefused(layer.name, "has a scheme of compressed-tensors that vLLM does not know")


def _is_int_with_outputs(scheme: Scheme) -> bool:
    weights = scheme.weights
    return (
        scheme.format in (PACKED, "int-quantized")
        and weights.strategy in ("channel", "group")
        and weights.type == "int"
        and not weights.dynamic
        and all(
            args is not None
            and (args.type, args.strategy, args.num_bits) == ("int", "tensor", 8)
            and not args.dynamic
            for args in (scheme.inputs, scheme.outputs)
        )
    )


def _is_int_with_dynamic_inputs(scheme: Scheme) -> bool:
    weights, inputs = scheme.weights, scheme.inputs
    return (
        inputs is not None
        and scheme.format == PACKED
        and weights.strategy in ("channel", "group")
        and (weights.type, inputs.type) == ("int", "int")
        and not weights.dynamic
        and inputs.symmetric
        and bool(inputs.dynamic)
        and inputs.strategy in ("token", "group")
        and inputs.num_bits in (4, 8)
    )


def _nvfp4(layer: Linear | Embedding, *, weight_only: bool) -> list[Parameter]:
    rows, columns = layer.rows, layer.inputs
    made = [
        _matrix("weight_packed", "U8", rows, columns // 2),
        _per_matrix("weight_global_scale", layer),
        _matrix("weight_scale", "F8_E4M3", rows, columns // 16),
    ]
    return made if weight_only else [*made, _per_matrix("input_global_scale", layer)]


def _mx(layer: Linear | Embedding, name: str, dtype: str, packed: int) -> list[Parameter]:
    return [
        _matrix(name, dtype, layer.rows, layer.inputs // packed),
        _matrix("weight_scale", "U8", layer.rows, layer.inputs // 32),
    ]


def _fp8(
    args: QuantizationArgs, layer: Linear | Embedding, *, static: bool, weight_only: bool
) -> list[Parameter]:
    rows, columns = layer.rows, layer.inputs
    made = [_matrix("weight", "F8_E4M3", rows, columns)]
    if args.strategy == "block":
        high, wide = block_sides(args, layer.name)
        if not weight_only and (static or len(args.block_structure or ()) > 2):
            raise LoadRefused(layer.name, "has FP8 blocks and activations that vLLM does not take")
        if isinstance(layer, Linear):
            layer.check_blocks(high, wide)
        if any(size % high for size in layer.outputs[:-1]):
            raise LoadRefused(layer.name, f"is fused of matrices that {high} does not divide")
        scale = _matrix("weight_scale", "F32", -(-rows // high), -(-columns // wide))
        scale.block = high
        made.append(scale)
    elif args.strategy == "channel":
        made.append(Parameter("weight_scale", "F32", (rows, 1), Kind.COLUMN, 0))
    else:
        made.append(_per_matrix("weight_scale", layer))
    if static:
        made.append(_per_matrix("input_scale", layer))
    return made


def block_sides(args: QuantizationArgs, where: str) -> tuple[int, int]:
    """Return the rows and columns of a block of FP8 weights."""
    sides = args.block_structure or []
    if len(sides) < 2 or sides[0] <= 0 or sides[1] <= 0:
        raise LoadRefused(where, f"has blocks of {sides}")
    return sides[0], sides[1]


def _int8(scheme: Scheme, layer: Linear | Embedding, *, static: bool) -> list[Parameter]:
    made = [_matrix("weight", "I8", layer.rows, layer.inputs)]
    if scheme.weights.strategy == "channel":
        made.append(Parameter("weight_scale", "F32", (layer.rows, 1), Kind.COLUMN, 0))
    else:
        made.append(_per_matrix("weight_scale", layer))
    if static:
        made.append(Parameter("input_scale", "F32", (1,), Kind.WHOLE))
        if scheme.inputs is not None and not scheme.inputs.symmetric:
            made.append(Parameter("input_zero_point", "I8", (1,), Kind.WHOLE))
    return made


def _packed(args: QuantizationArgs, layer: Linear | Embedding) -> list[Parameter]:
    """Return the parameters of integers packed in 32 bits, with or without dynamic activations."""
    if args.num_bits not in WNA16_BITS:
        raise Mismatch(layer.name, f"has {args.num_bits} bits, and vLLM packs 2 to 8")
    groups = _groups(args, layer)
    bits, rows = args.num_bits, layer.rows
    weight = _matrix("weight_packed", "I32", rows, -(-layer.inputs * bits // 32))
    weight.packed_dim, weight.packed_factor = 1, Fraction(32, bits)
    made = [weight, _matrix("weight_scale", MODEL_DTYPE, rows, groups), _shape()]
    if not args.symmetric:
        zeros = _matrix("weight_zero_point", "I32", -(-rows * bits // 32), groups)
        zeros.packed_dim, zeros.packed_factor = 0, Fraction(32, bits)
        made.append(zeros)
    return made


def _int_with_outputs(scheme: Scheme, layer: Linear | Embedding) -> list[Parameter]:
    args = scheme.weights
    if args.num_bits not in (2, 4, 8):
        raise Mismatch(layer.name, f"has {args.num_bits} bits, and vLLM takes 2, 4 or 8")
    groups = _groups(args, layer)
    if scheme.format == PACKED:
        per_word = 32 // args.num_bits
        weight = _matrix("weight_packed", "I32", layer.rows, layer.inputs // per_word)
        weight.packed_dim, weight.packed_factor = 1, per_word
        made = [weight, _shape()]
    else:
        made = [_matrix("weight", "I8", layer.rows, layer.inputs)]
    made.append(_matrix("weight_scale", MODEL_DTYPE, layer.rows, groups))
    return [
        *made,
        *(Parameter(f"{end}_scale", "F32", (1,), Kind.WHOLE) for end in ("input", "output")),
    ]


def _groups(args: QuantizationArgs, layer: Linear | Embedding) -> int:
    """Return the number of scales in a row."""
    size = -1 if args.group_size is None else args.group_size
    size = layer.inputs if size == -1 else size
    if not size:
        raise LoadRefused(layer.name, "has groups of 0 weights")
    if layer.inputs % size:
        raise LoadRefused(
            layer.name, f"has {layer.inputs} columns, which groups of {size} do not fill"
        )
    return layer.inputs // size


def embedding_parameters(args: QuantizationArgs, layer: Embedding) -> list[Parameter]:
    """Return the parameters of quantized embeddings: packed integers."""
    per_word = 32 // args.num_bits if args.num_bits > 0 else 0
    if not per_word:
        raise LoadRefused(layer.name, f"has {args.num_bits} bits, which 32 bits do not hold")
    groups = 1
    if args.strategy == "group" and args.group_size is not None:
        if layer.inputs % args.group_size:
            raise LoadRefused(
                layer.name, f"has groups of {args.group_size}, which do not fill a row"
            )
        groups = layer.inputs // args.group_size
    kind = Kind.COLUMN if args.strategy == "channel" else Kind.MATRIX
    weight = _matrix("weight_packed", "I32", layer.rows, layer.inputs // per_word)
    weight.packed_dim, weight.packed_factor = 1, per_word
    scale = Parameter("weight_scale", MODEL_DTYPE, (layer.rows, groups), kind, 0)
    return [weight, scale, _shape()]


def _matrix(name: str, dtype: str, rows: int, columns: int) -> Parameter:
    return Parameter(name, dtype, (rows, columns), Kind.MATRIX, 0, 1)


def _per_matrix(name: str, layer: Linear | Embedding) -> Parameter:
    """Return scales, one for each matrix that was fused."""
    return Parameter(name, "F32", (len(layer.outputs),), Kind.SCALES)


def _shape() -> Parameter:
    return Parameter("weight_shape", "I64", (2,), Kind.WHOLE)
