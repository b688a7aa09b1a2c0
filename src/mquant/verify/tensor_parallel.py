"""Find over how many GPUs loaders can split a checkpoint, from its weights' shapes.

FP8 in blocks and packed integers: mquant's model of vLLM builds the layers of one rank, with the
checks that vLLM makes there. A rank must hold whole blocks and groups: `validate_fp8_block_shape`,
`validate_fp8_block_shape_moe` (for which vLLM makes the blocks of experts smaller),
`verify_group_size_divides_partition` and `CompressedTensorsWNA16MoEMethod.create_weights`. vLLM
0.32 pads layers to the tiles of its kernels for integers (marlin_utils.py, `marlin_padded_nk`).

NVFP4: vLLM and SGLang run the weights with FP4 Marlin kernels if activations stay in 16 bits, or if
the GPU has no FP4 units. Both loaders split a model over the ranks of a tensor-parallel group
alike: q, k, v, gate and up by their outputs, o and down by their inputs. The conditions for the
shapes were read in the code of vLLM 0.32.0 and SGLang 0.5.23:

- Attention heads are shared out evenly. vLLM: config/model.py, `verify_with_parallel_config`; both:
  `QKVParallelLinear`. Key and value heads are shared out evenly, or each goes to as many ranks.
- The inputs of o and down are shared out evenly, in whole groups of 16, because a rank takes the
  scales of its own groups: `RowParallelLinear`, and `create_weights` of the NVFP4 schemes of
  compressed-tensors. If a group is cut in two, `load_row_parallel_weight` takes scales of other
  weights.
- Linear layers are padded to the kernel's tiles, (64, 128) or (128, 64), whatever their shape.
  vLLM: marlin_utils.py, `marlin_padded_nk`; SGLang: marlin_utils_fp4.py,
  `prepare_nvfp4_layer_for_marlin`.
- vLLM pads experts along their inner dimension only: the hidden size must be a multiple of 64
  (marlin_utils_fp4.py, `prepare_nvfp4_moe_layer_for_marlin`). SGLang does not pad experts: the
  hidden size must be a multiple of 128, and a rank's share of the inner dimension a multiple of 64
  (compressed_tensors_w4a16_nvfp4_moe.py, `process_weights_after_loading`).
- The vocabulary is padded to a multiple of 64, so every number of ranks in `SIZES` can share the
  vocabulary (vocab_parallel_embedding.py, `pad_vocab_size`).
- Some models need at least as many experts as ranks: `tp_within_experts` of the family.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mquant.checkpoint import Checkpoint
from mquant.family import Family
from mquant.family_rows import Role, TensorRow
from mquant.findings import Finding, rule
from mquant.loader_model.modules import Module, ModuleView
from mquant.loader_model.storage import (
    FP8S,
    GROUP,
    NVFP4S,
    StorageFormat,
    format_of,
    weight_args,
    weight_shape,
)
from mquant.loader_model.vllm.predict import split

SIZES: Final = (1, 2, 4, 8, 16)
_BLOCKS: Final = FP8S | {StorageFormat.INT}

TENSOR_PARALLEL: Final = rule(
    "tensor-parallel",
    "A checkpoint in NVFP4, FP8 in blocks or packed integers can be split over 1, 2, 4, 8 and 16 "
    "GPUs.",
    "Heads, groups, blocks and the tiles of FP4 Marlin kernels cannot be cut in two: a server "
    "stops, often after loading everything, or computes with the scales of other weights.",
    "Nothing to do: serve the checkpoint with one of these tensor-parallel sizes.",
    severity="info",
    knowing=("family",),
)
KERNEL_SHAPE: Final = rule(
    "kernel-shape",
    "vLLM's FP4 Marlin kernels can run the quantized weights on some number of GPUs.",
    "vLLM loads the checkpoint, then stops while preparing the weights for the kernel.",
    "Leave the experts of this model unquantized.",
    severity="warning",
    knowing=("family",),
)


@dataclass(frozen=True, slots=True)
class KernelLimits:
    """The multiples that a loader's kernel for experts needs."""

    name: str
    hidden: int
    inner: int


VLLM: Final = KernelLimits("vLLM 0.32", hidden=64, inner=GROUP)
SGLANG: Final = KernelLimits("SGLang 0.5.23", hidden=128, inner=64)


@dataclass(frozen=True, slots=True)
class SplitWeight:
    """A linear layer's weight, [out, in]: the first weight of a row of the family."""

    module: str
    row: TensorRow
    shape: tuple[int, int]
    quantized: bool


def check_parallel(view: ModuleView) -> Iterator[Finding]:
    """Yield the finding on the tensor-parallel sizes that work; none for layouts without limits.

    The checkpoint must have no errors: otherwise the shapes may be wrong.
    """
    family = view.family
    kinds = {m.name: kind for m in view.modules.values() if (kind := format_of(view, m))}
    used = set(kinds.values())
    if family is None or not used:
        return
    if used <= NVFP4S:
        yield from _nvfp4(view, family, kinds)
    elif used <= _BLOCKS and view.outcome.loads and not (FP8S & used and not _has_blocks(view)):
        reasons = {n: _ranks_reason(n, family, view.checkpoint) for n in SIZES}
        sizes = _in_words([n for n, reason in reasons.items() if not reason], reasons)
        message = f"By tensor-parallel size: {VLLM.name} with {sizes}."
        yield TENSOR_PARALLEL.finding("config.json", message)


def _has_blocks(view: ModuleView) -> bool:
    strategy = weight_args(StorageFormat.FP8, view).get("strategy")
    return bool(view.config.get("weight_block_size")) or strategy == "block"


def _ranks_reason(ranks: int, family: Family, checkpoint: Checkpoint) -> str:
    heads = _heads_reason(ranks, family, checkpoint.config)
    return heads or (split(checkpoint, family, ranks) if ranks > 1 else "")


def _nvfp4(
    view: ModuleView, family: Family, kinds: Mapping[str, StorageFormat]
) -> Iterator[Finding]:
    config, used = view.checkpoint.config, set(kinds.values())
    weights = _weights(view, kinds)
    loaders = [VLLM]
    # SGLang has other code for ModelOpt's layout, and for latent attention, which splits kv_b.
    if used == {StorageFormat.NVFP4} and family.config.kv_heads:
        loaders.append(SGLANG)
    sentences = []
    for loader in loaders:
        reasons = {n: _reason(loader, n, family, config, weights) for n in SIZES}
        works = [n for n, reason in reasons.items() if not reason]
        if loader is VLLM and not works:
            message = f"{VLLM.name} cannot run the checkpoint on any number of GPUs: {reasons[1]}."
            yield KERNEL_SHAPE.finding("config.json", message)
            return
        sentences.append(f"{loader.name} with {_in_words(works, reasons)}")
    message = f"With FP4 Marlin kernels, by tensor-parallel size: {'; '.join(sentences)}."
    yield TENSOR_PARALLEL.finding("config.json", message)


def _weights(view: ModuleView, kinds: Mapping[str, StorageFormat]) -> list[SplitWeight]:
    first: dict[str, SplitWeight] = {}
    for module in view.modules.values():
        role = module.role
        if module.tensor_role is None or role is None or not role.linear or role.refused_by_loaders:
            continue
        row, kind = module.tensor_role.row, kinds.get(module.name)
        # One quantized layer suffices for the constraints of quantized layers.
        if row.name not in first or (kind is not None and not first[row.name].quantized):
            shape = _shape(module, kind, view)
            if shape is not None:
                first[row.name] = SplitWeight(module.name, row, shape, kind is not None)
    return list(first.values())


def _shape(module: Module, kind: StorageFormat | None, view: ModuleView) -> tuple[int, int] | None:
    if kind is not None:
        return weight_shape(kind, module, view)
    shape = module.tensors["weight"].shape if "weight" in module.tensors else ()
    return (shape[0], shape[1]) if len(shape) == 2 else None


def _reason(
    loader: KernelLimits,
    ranks: int,
    family: Family,
    config: Mapping[str, Any],
    weights: list[SplitWeight],
) -> str:
    """Return why a loader cannot run the model on `ranks` GPUs, as a sentence's end; else empty."""
    reasons = (_cut(loader, ranks, family, weight) for weight in weights)
    return _heads_reason(ranks, family, config) or next(filter(None, reasons), "")


def _heads_reason(ranks: int, family: Family, config: Mapping[str, Any]) -> str:
    """Return why ranks cannot share heads or experts, as a sentence's end; empty if they can."""
    keys = family.config
    heads = family.value(keys.heads, config) or 0
    if heads % ranks:
        return f"{heads} attention heads do not divide by {ranks}"
    kv_heads = family.value(keys.kv_heads, config) or ranks
    if kv_heads % ranks and ranks % kv_heads:
        return f"of {kv_heads} key and value heads and {ranks} ranks, neither divides the other"
    experts = family.value(keys.experts, config) or ranks
    if family.tp_within_experts and ranks > experts:
        return f"{ranks} ranks are more than {experts} experts"
    return ""


def _cut(loader: KernelLimits, ranks: int, family: Family, weight: SplitWeight) -> str:
    """Return why the inputs of one weight (o, down) cannot be split; empty if the inputs can."""
    if weight.row.shape[:1] != (family.config.hidden,):
        return ""  # the weight's outputs are heads, or the inputs of down
    rows, columns = weight.shape
    expert = weight.quantized and weight.row.role is Role.EXPERT
    if expert and rows % loader.hidden:
        return f"experts write {rows} channels ({weight.module}), no multiple of {loader.hidden}"
    share = f"{weight.module} reads {columns}"
    if columns % ranks:
        return f"{share}, which does not divide by {ranks}"
    unit = loader.inner if expert else GROUP
    if weight.quantized and columns // ranks % unit:
        return f"{share}, {columns // ranks} a rank, no multiple of {unit}"
    return ""


def _in_words(works: list[int], reasons: Mapping[int, str]) -> str:
    if len(works) == len(SIZES):
        return ", ".join(map(str, works))
    number, reason = next((n, reason) for n, reason in reasons.items() if reason)
    return f"{', '.join(map(str, works)) or 'none'} (not {number}: {reason})"
