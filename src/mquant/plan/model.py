"""The Plan: a frozen value, made before any weight is read, that says what happens to tensors."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Literal, Self

from mquant.checkpoint import TensorInfo, build_header
from mquant.dtypes import BITS, nbytes
from mquant.family import Family
from mquant.family_rows import Role
from mquant.findings import Finding
from mquant.loader_model.modules import undeclared
from mquant.plan.members import Member
from mquant.plan.stored import Stored
from mquant.plan.survey import Survey
from mquant.recipe import Recipe
from mquant.schemes import FORMAT_VERSION, Scheme, Shape

ActionKind = Literal["copy", "quantize", "dequantize", "scale"]


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
    | dequantize | a weight in BF16 that is stored quantized, see `stored` | the weight in BF16 |
    | scale | a norm or router that AWQ scales | the same name, dtype and shape; new bytes |

    `source` of a `stored` weight is the weight in BF16 at the place of its codes; such a weight may
    also be quantized. `scheme` is None if the tensor is kept; `reason` says why. `made` are the
    outputs if they are others than those in the table.
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
            return "quantize"
        if self.scaled:
            return "scale"
        return "dequantize" if self.stored else "copy"

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


@dataclass(frozen=True)
class ShardPlan:
    """One output shard: its final name, and the work units that fill the shard."""

    name: str
    units: tuple[WorkUnit, ...]

    @cached_property
    def layout(self) -> tuple[bytes, dict[str, int]]:
        """The file's first bytes (its header), and the offset of each tensor's data.

        Tensors are stored in the order of the work units, so that a shard is written and hashed
        from front to back. If this order misaligns a tensor (its offset is no multiple of its
        element size), all tensors are stored in safetensors' own order, which is by dtype.
        """
        return self._layout()

    @property
    def header(self) -> bytes:
        """The file's first bytes. The layout is not kept: `plan` asks every shard of a model."""
        return (self.layout if "layout" in vars(self) else self._layout())[0]

    @cached_property
    def file_bytes(self) -> int:
        """The file's size, header included."""
        return len(self.header) + sum(unit.output_bytes for unit in self.units)

    def _layout(self) -> tuple[bytes, dict[str, int]]:
        outputs = [(o.name, o.dtype, o.shape) for unit in self.units for o in unit.outputs]
        return build_header(outputs, keep_order=_aligned(outputs))

    @property
    def tensors(self) -> int:
        """The number of tensors that the shard holds."""
        return sum(len(action.outputs) for unit in self.units for action in unit.actions)


def _aligned(outputs: Sequence[tuple[str, str, Shape]]) -> bool:
    """Return whether each tensor is at a multiple of its element's size, in this order.

    The data begin at a multiple of 8, to which a header is padded.
    """
    position = 0
    for _, dtype, shape in outputs:
        if position * 8 % BITS[dtype]:
            return False
        position += nbytes(dtype, shape)
    return True


@dataclass(frozen=True)
class Plan:
    """Checkpoint x Family x Recipe. Engines obey the plan, `verify` checks against the plan.

    `ignore` is the ignore list that config.json will have. `declared` is the quantization config if
    the schemes in use do not decide the config. A plan with a finding of severity `error` must not
    be carried out.
    """

    survey: Survey
    family: Family
    recipe: Recipe
    shards: tuple[ShardPlan, ...]
    ignore: tuple[str, ...]
    findings: tuple[Finding, ...]
    declared: Mapping[str, Any] | None = None

    @property
    def units(self) -> Iterator[WorkUnit]:
        """All work units in the order of the output, in which a ledger numbers them from 0."""
        return (unit for shard in self.shards for unit in shard.units)

    @cached_property
    def numbers(self) -> tuple[range, ...]:
        """The numbers of each shard's work units."""
        stops = accumulate(len(shard.units) for shard in self.shards)
        return tuple(
            range(stop - len(shard.units), stop)
            for shard, stop in zip(self.shards, stops, strict=True)
        )

    @property
    def actions(self) -> Iterator[Action]:
        """Every source tensor's action, exactly once, in the order of the output."""
        return (action for unit in self.units for action in unit.actions)

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """The findings that forbid the plan; empty for a good plan."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes in use, by name."""
        by_name = {a.scheme.name: a.scheme for a in self.actions if a.scheme}
        return tuple(by_name[name] for name in sorted(by_name))

    def targets(self, scheme: Scheme, *names: Callable[[str], str]) -> list[str]:
        """Return the targets of a scheme's config group. `ignore` excludes the kept modules.

        A plan's only scheme has the target "Linear", and names a quantized head, which has another
        class in vLLM. If the plan has several schemes, the targets
        of each are patterns of module names, under every name that a function of `names` makes of
        a hub name. A role has one scheme, so the targets are whole rows of the family.
        """
        roles = {action.role for action in self.actions if action.scheme == scheme}
        classes = []
        if len(self.schemes) == 1:
            classes, roles = ["Linear"], roles & {Role.HEAD}
        rows = [row for row in self.family.tensors if row.role in roles]
        named = (entry for row in rows for entry in row.patterns(*names))
        return list(dict.fromkeys([*classes, *named]))

    @cached_property
    def source_bytes(self) -> int:
        """Bytes of all source tensors that are read."""
        return sum(action.source_bytes for action in self.actions)

    @property
    def output_tensors(self) -> int:
        """The number of tensors in the output."""
        return sum(shard.tensors for shard in self.shards)

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of all output tensors: the index's `total_size`."""
        return sum(action.output_bytes for action in self.actions)

    @cached_property
    def file_bytes(self) -> int:
        """Bytes of all output shards, headers included: the disk space that the shards need."""
        return sum(shard.file_bytes for shard in self.shards)

    @property
    def output_totals(self) -> dict[str, int]:
        """Tensors, bytes, bytes of all files, and shards of the output: for JSON documents."""
        return {
            "tensors": self.output_tensors,
            "bytes": self.output_bytes,
            "file_bytes": self.file_bytes,
            "shards": len(self.shards),
        }

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of every decision.

        Two plans have equal fingerprints exactly if the plans make the same bytes from a source.
        """
        digest = hashlib.sha256(f"{self.recipe.scales}\n".encode())
        if self.recipe.needs_data:
            measured = self.recipe.model_dump_json(include={"rounding", "smoothing", "calibration"})
            digest.update(measured.encode())
        if self.family.own:
            digest.update(self.family.model_dump_json().encode())
        for shard in self.shards:
            digest.update(f"{shard.name}\n".encode() + shard.header)
            for action in (action for unit in shard.units for action in unit.actions):
                source = action.source
                scheme = action.scheme.name if action.scheme else action.kind
                digest.update(f"{source.name} {source.dtype} {source.shape} {scheme}\n".encode())
                if (held := source.held) is not None:
                    layout = (held.first, held.step, held.transposed)
                    digest.update(f"{held.by.name} {held.by.shape} {layout}\n".encode())
                if action.stored:
                    digest.update(f"{action.stored.format} {action.stored.block}\n".encode())
                if action.value is not None:
                    digest.update(action.value)
        digest.update(json.dumps(self.ignore).encode())
        digest.update(json.dumps([s.config_group for s in self.schemes]).encode())
        if self.declared is not None:
            digest.update(json.dumps(self.declared).encode())
        return digest.hexdigest()

    @property
    def quantization_config(self) -> dict[str, Any]:
        """config.json's `quantization_config`: `declared`, or what compressed-tensors would write.

        Empty if the plan quantizes no tensor and declares no config.
        """
        if self.declared is not None:
            return dict(self.declared)
        if not self.schemes:
            return {}
        formats = {scheme.format for scheme in self.schemes}
        names = self.family.looked_up_by
        groups = [{**s.config_group, "targets": self.targets(s, *names)} for s in self.schemes]
        used = formats.pop() if len(formats) == 1 else "mixed-precision"
        return declaration(groups, used, self.ignore)


def config_json(plan: Plan) -> dict[str, Any]:
    """Return all keys of the parent's config.json, with the plan's quantization config, if any."""
    kept, declared = undeclared(plan.survey.checkpoint.config), plan.quantization_config
    return {**kept, "quantization_config": declared} if declared else kept


def declaration(
    groups: Sequence[Mapping[str, Any]], storage_format: str, ignore: Sequence[str]
) -> dict[str, Any]:
    """Return a quantization config of compressed-tensors."""
    return {
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "format": storage_format,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": FORMAT_VERSION,
    }
