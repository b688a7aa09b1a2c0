"""What happens to the tensors of a source: actions, and the work units that they form."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

from mquant.checkpoint import TensorInfo
from mquant.dtypes import nbytes
from mquant.family_rows import Role
from mquant.plan.members import Member
from mquant.plan.stored_parts import Stored
from mquant.schemes import Scheme, Shape

ActionKind = Literal["copy", "quantize", "cast", "dequantize", "scale"]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the result."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return nbytes(self.dtype, self.shape)


@lru_cache(maxsize=1_000)
def _parts(scheme: Scheme, shape: Shape, dtype: str) -> tuple[tuple[str, str, Shape], ...]:
    """Return the outputs of a quantized weight, with the end of the name alone."""
    return scheme.outputs("", shape, dtype)


@lru_cache(maxsize=1_000)
def _parts_bytes(scheme: Scheme, shape: Shape, dtype: str) -> int:
    return sum(nbytes(kind, size) for _, kind, size in _parts(scheme, shape, dtype))


@dataclass(frozen=True, slots=True)
class Action:
    """What happens to one source tensor, and which output tensors the source tensor becomes.

    | kind | `source` | `outputs` |
    | --- | --- | --- |
    | copy | any tensor | the same name, dtype, shape and bytes; or, with `value`, these bytes |
    | quantize | a weight in BF16, F16 or F32 | the tensors of `scheme` |
    | cast | a weight in BF16 that is stored in MXFP4 | the tensors of `scheme`, which is NVFP4 |
    | dequantize | a weight in BF16 that is stored quantized, see `stored` | the weight in BF16 |
    | scale | a norm or router that AWQ scales | the same name, dtype and shape; new bytes |

    `source` of a `stored` weight is the weight in BF16 at the place of its codes; such a weight may
    also be quantized, or, if `cast`, its codes become NVFP4 without decoding. `scheme` is None if
    the tensor is kept; `reason` says why. `as_stored`: the weight stays as the source stores it,
    and `already` is the scheme of the source, if config.json can declare it; a plan then copies the
    weight's tensors one by one. `made` are the outputs if they are others than those in the table.
    """

    source: TensorInfo
    role: Role
    module: str
    layer: int | None
    expert: int | None
    scheme: Scheme | None
    reason: str
    made: tuple[OutputTensor, ...] | None = None
    stored: Stored | None = None
    value: bytes | None = None
    scaled: bool = False
    cast: bool = False
    as_stored: bool = False
    already: Scheme | None = None

    @classmethod
    def kept(cls, member: Member, reason: str) -> Self:
        """Return the action of a tensor that keeps its name, dtype and shape."""
        info, tensor_role = member.info, member.tensor_role
        return cls(
            source=info,
            role=member.role,
            module=member.module,
            layer=tensor_role.layer,
            expert=tensor_role.expert,
            scheme=None,
            reason=reason,
            stored=member.stored,
        )

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """The output tensors, as in the table of `Action`.

        They are made when they are asked for: a plan has half a million actions, and three outputs
        with names of their own take more memory than the rest of an action.
        """
        if self.made is not None:
            return self.made
        source = self.source
        if self.scheme is None:
            return (OutputTensor(source.name, source.dtype, source.shape),)
        parts = _parts(self.scheme, source.shape, source.dtype)
        return tuple(OutputTensor(self.module + end, dtype, size) for end, dtype, size in parts)

    @property
    def kind(self) -> ActionKind:
        """The kind of the action, as in the table of `Action`."""
        if self.scheme:
            return "cast" if self.cast else "quantize"
        if self.scaled:
            return "scale"
        return "dequantize" if self.stored else "copy"

    @property
    def stored_in(self) -> Scheme | None:
        """The scheme in which the output stores the tensor; None for a plain tensor."""
        return self.scheme or self.already

    @property
    def read(self) -> tuple[TensorInfo, ...]:
        """All tensors that are read for the action."""
        return (self.stored.codes, *self.stored.parts) if self.stored else (self.source,)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors that are read for the action."""
        return sum(info.nbytes for info in self.read)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the source tensor in memory: more than the bytes of its codes."""
        return nbytes(self.source.dtype, self.source.shape)

    @property
    def output_bytes(self) -> int:
        """Bytes of all outputs."""
        if self.made is None and self.scheme:
            return _parts_bytes(self.scheme, self.source.shape, self.source.dtype)
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """The smallest piece of work: a tensor, or a fused set, whose members share a global scale."""

    actions: tuple[Action, ...]

    @property
    def outputs(self) -> Iterator[OutputTensor]:
        """All tensors that the work unit makes."""
        return (output for action in self.actions for output in action.outputs)

    @property
    def scheme(self) -> Scheme | None:
        """The scheme that quantizes the unit's tensors; None if no tensor is quantized.

        A plan is refused if the members of a fused set have different schemes.
        """
        return self.actions[0].scheme

    @property
    def cast(self) -> bool:
        """Whether the set is cast from MXFP4 to NVFP4: all members are, or none."""
        return self.actions[0].cast

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory that the set takes: codes and scales if it is cast, else the weights."""
        if not self.cast:
            return self.weight_bytes
        elements = sum(action.source.elements for action in self.actions)
        return elements // 2 + elements // 32 + elements // 16

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors that are read for the work unit."""
        return sum(action.source_bytes for action in self.actions)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the source tensors in memory."""
        return sum(action.weight_bytes for action in self.actions)

    @property
    def files(self) -> frozenset[str]:
        """The files that hold the tensors that are read."""
        return frozenset(info.shard for action in self.actions for info in action.read)

    @property
    def output_bytes(self) -> int:
        """Bytes of all outputs."""
        return sum(action.output_bytes for action in self.actions)
