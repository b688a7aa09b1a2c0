"""The Plan: a frozen value, made before any weight is read, that says what happens to tensors."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from mquant.checkpoint import build_header
from mquant.dtypes import BITS, nbytes
from mquant.family import Family
from mquant.family_rows import Role
from mquant.findings import Finding
from mquant.loader_model.declared import undeclared
from mquant.plan.action import Action, WorkUnit
from mquant.plan.survey import Survey
from mquant.recipe import Recipe
from mquant.schemes import FORMAT_VERSION, Scheme, Shape


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
        by_name = {scheme.name: scheme for a in self.actions if (scheme := a.stored_in)}
        return tuple(by_name[name] for name in sorted(by_name))

    def targets(self, scheme: Scheme, *names: Callable[[str], str]) -> list[str]:
        """Return the targets of a scheme's config group. `ignore` excludes the kept modules.

        A plan's only scheme has the target "Linear", and names a quantized head, which has another
        class in vLLM. If the plan has several schemes, the targets
        of each are patterns of module names, under every name that a function of `names` makes of
        a hub name. A role has one scheme, so the targets are whole rows of the family.
        """
        roles = {action.role for action in self.actions if action.stored_in == scheme}
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
            keys = {"rounding", "order", "sweeps", "smoothing", "calibration"}
            digest.update(self.recipe.model_dump_json(include=keys).encode())
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
                if action.cast:
                    digest.update(b"cast\n")
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
