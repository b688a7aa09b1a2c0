"""How a source stores one quantized weight: its tensors, and the findings if they do not fit."""

from dataclasses import dataclass, replace
from typing import Final

from mquant.checkpoint import TensorInfo
from mquant.dtypes import BITS
from mquant.findings import Finding, Rule, rule
from mquant.loader_model.integer_parts import SCALAR
from mquant.loader_model.storage import FP4S, MXFP4S, StorageFormat

PART_MISSING: Final = rule(
    "part-missing",
    "A quantized module has its codes and all its scales.",
    "vLLM turns its missing-weight check off for quantized models: missing weights stay "
    "uninitialised, and the model generates nonsense.",
    "Quantize again, with a tool that writes the whole module.",
    knowing=("layout",),
    if_loads="warning",
)
PART_SHAPE: Final = rule(
    "part-shape",
    "Codes and scales of a module fit each other.",
    "vLLM copies the part of an expert's scales that fits, without an error.",
    "Quantize again, with a tool that writes the whole module.",
    knowing=("layout",),
    if_loads="nothing",
)


@dataclass(frozen=True, slots=True)
class Stored:
    """How the source stores one quantized weight.

    `codes` and `scale` are [out, ...] also where one tensor on disk holds those of all experts.
    `block` are the rows and columns that share an element of `scale`. `second` is the scale of the
    whole weight, or None; `input` is the scale of the activations, or None. Integers have `bits`
    (those of a code on disk), and may have zero points, and an `order`: the group of each column.
    `size` says [out, in] of packed integers; a run refuses a size that is not `shape`.
    """

    format: StorageFormat
    codes: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]
    second: TensorInfo | None = None
    input: TensorInfo | None = None
    bits: int = 0
    zeros: TensorInfo | None = None
    order: TensorInfo | None = None
    size: TensorInfo | None = None

    @property
    def described(self) -> str:
        """The format in words: of FP8 without a tool's name, also what shares a scale."""
        if self.format is not StorageFormat.FP8_BLOCK:
            return self.format.value
        if self.scale.shape in SCALAR:
            return "FP8 per tensor"
        return "FP8 per channel" if self.block == (1, self.shape[1]) else self.format.value

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensors that are read besides the codes: scales, zero points, order, size."""
        return tuple(filter(None, (self.scale, self.second, self.zeros, self.order, self.size)))

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's [out, in]."""
        *_, rows, width = self.codes.shape
        if self.bits:
            return rows, width * BITS[self.codes.dtype] // self.bits
        return rows, width * (2 if self.format in FP4S else 1)

    @property
    def whole(self) -> "Stored":
        """How the tensors on disk that hold the weights of all experts store these weights.

        Codes and scales are [experts, rows, ...]; the experts' weights are in BF16 [experts, in,
        rows], as transformers' `convert_moe_packed_tensors` makes them. Weights in FP8 lie as their
        codes lie, and `block` is that of the tensor on disk.
        """
        codes, scale = self.codes.held, self.scale.held
        if codes is None or scale is None:
            raise TypeError(f"{self.codes.name} is a tensor of its own")
        block = self.block[::-1] if codes.transposed else self.block
        if self._one_each:
            block = codes.rows, codes.columns
        return Stored(self.format, codes.by, scale.by, block)

    @property
    def _one_each(self) -> bool:
        """Whether all weights of an expert share one scale, whatever their size."""
        return self.scale.held is not None and self.scale.shape in SCALAR

    @property
    def fits_whole(self) -> bool:
        """Whether the blocks of all experts' tensor are those of each weight in it."""
        codes, scale = self.codes.held, self.scale.held
        if codes is None or scale is None or self.format in MXFP4S:
            return True
        high, wide = self.whole.block
        across = codes.columns if codes.transposed else codes.rows
        shared = self.codes.shape[0] < across
        groups = -(-codes.rows // high) * -(-codes.columns // wide)
        cut = shared and across > self.block[0] and self.codes.shape[0] % self.block[0] > 0
        return self._one_each or (groups * codes.by.shape[0] == scale.by.elements and not cut)

    def under(self, prefix: str) -> "Stored":
        """Return the same weight, with `prefix` before the names of its files."""

        def moved(info: TensorInfo) -> TensorInfo:
            return replace(info, shard=prefix + info.shard)

        return replace(
            self,
            codes=moved(self.codes),
            scale=moved(self.scale),
            second=moved(self.second) if self.second else None,
            input=moved(self.input) if self.input else None,
            zeros=moved(self.zeros) if self.zeros else None,
            order=moved(self.order) if self.order else None,
            size=moved(self.size) if self.size else None,
        )


def misfit(info: TensorInfo, expected: str) -> Finding:
    """Return the finding that a tensor has another dtype or shape than the module's other parts."""
    module = info.name.rpartition(".")[0]
    sentence = f"{info.name} is {info.dtype} {list(info.shape)}, but must be {expected}"
    return broken(module, PART_SHAPE, sentence)


def broken(module: str, rule: Rule, sentence: str) -> Finding:
    """Return the finding that a module breaks a rule; `sentence` has no full stop."""
    return rule.finding(module, f"{sentence}.", "Get the checkpoint again.")
