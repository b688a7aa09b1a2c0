"""Checkpoint x Family: the role of every tensor, and findings if the checkpoint is not whole.

The survey reads headers and config.json alone. All findings are about the *source*: quantization
would only hide that a checkpoint is not what config.json describes.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from mquant.checkpoint import Checkpoint
from mquant.family import Family
from mquant.family_files import family_of
from mquant.family_rows import Role, TensorRow
from mquant.findings import Finding, rule
from mquant.loader_model.declared import declared_config
from mquant.loader_model.stacks import unstacked
from mquant.loader_model.storage import StorageFormat, groups
from mquant.plan.completeness import completeness, layouts
from mquant.plan.members import Member
from mquant.plan.stored import READABLE, find_stored
from mquant.plan.stored_integers import BITS as BITS_OF_INTEGERS
from mquant.schemes import QUANTIZED_SUFFIXES
from mquant.text import names

FAMILY_UNKNOWN: Final = rule(
    "family-unknown",
    "mquant knows the family of config.json's model_type.",
    "Without the family, mquant does not know which tensors must be there, and their shapes.",
    "Add the family: one YAML file, see docs/adding-a-family.md.",
    severity="warning",
    as_source="error",
    as_fact="info",
)
SOURCE_QUANTIZED: Final = rule(
    "source-quantized",
    "The source is not quantized, or only in a layout that can be dequantized.",
    "A quantized weight that is quantized again has the errors of both quantizations.",
    "Start from the BF16 checkpoint that the source was made from.",
    needs="plan",
    as_fact="info",
)
TENSOR_UNKNOWN: Final = rule(
    "tensor-unknown",
    "Every tensor is in the family's file, or is a part of a quantized weight in that file.",
    "Loaders refuse the tensor, or drop it without a message.",
    "Remove the tensor, or, if it belongs to the model, add its name to the family's file.",
    knowing=("family",),
    if_loads="nothing",
)


@dataclass(frozen=True)
class Survey:
    """Every tensor of a checkpoint, classified, with findings if the checkpoint is not whole.

    If the weights are quantized in a format that cannot be read, `readable` is False, and
    `findings` say nothing of unknown tensors and of completeness.
    """

    checkpoint: Checkpoint
    family: Family | None
    members: tuple[Member, ...]
    layers: int
    experts: int
    findings: tuple[Finding, ...]
    readable: bool = True

    def of(self, *roles: Role) -> list[Member]:
        """Return the members of some roles."""
        return [member for member in self.members if member.role in roles]


def survey(
    checkpoint: Checkpoint, families: Mapping[str, Family], formats: Collection[StorageFormat] = ()
) -> Survey:
    """Classify every tensor of a checkpoint and check that the checkpoint is whole.

    If every quantized weight is stored in one of `formats`, the members are the weights that the
    codes hold. Any other quantized checkpoint is a finding.
    """
    family = family_of(checkpoint.config, families, checkpoint.tensors)
    tensors = unstacked(checkpoint, family)
    quantized = find_stored(checkpoint, tensors, formats) if formats else None
    weights = quantized.weights if quantized else {}
    unreadable = quantized.findings if quantized else _already_quantized(checkpoint, formats)
    findings = [*checkpoint.findings, *unreadable]
    if family is None:
        kind = checkpoint.config.get("model_type")
        findings.append(
            FAMILY_UNKNOWN.finding(
                "config.json",
                f"config.json says model_type {json.dumps(kind)[:60]}, a family mquant does not "
                "know.",
                f"Known are {', '.join(families)}; a family is one YAML file, given with "
                "--family FILE: see docs/adding-a-family.md.",
                "source",
            )
        )
        return Survey(checkpoint, None, (), 0, 0, tuple(findings))
    members: list[Member] = []
    unknown: list[str] = []
    others = quantized.others if quantized else frozenset()
    for tensor in tensors.values():
        if tensor.name in others:
            continue  # also where the family knows every name below a prefix
        info, stored = weights.get(tensor.name, (tensor, None))
        tensor_role = family.classify(info.name)
        if tensor_role is not None:
            members.append(Member(info, tensor_role, stored))
        elif not family.stack_of(tensor.name):
            unknown.append(info.name)
    if unknown and not unreadable:
        findings.append(_unknown(unknown, family))
    layers = _count(member.tensor_role.layer for member in members)
    experts = _count(member.tensor_role.expert for member in members)
    if not unreadable:
        findings += completeness(family, members, checkpoint.config)
    findings += layouts(family, checkpoint)
    members = _mtp_kept(family, members, checkpoint.config)
    return Survey(
        checkpoint, family, tuple(members), layers, experts, tuple(findings), not unreadable
    )


def _mtp_kept(family: Family, members: list[Member], config: Mapping[str, Any]) -> list[Member]:
    """Return the members; give members in multi-token prediction layers the role `other`, a copy.

    transformers builds no such layers, so upstream's arithmetic cannot run on these layers.
    """
    layers = family.value(family.config.layers, config)
    if layers is None or not family.mtp_layers(config):
        return members
    kept: dict[str, TensorRow] = {}

    def keep(member: Member) -> Member:
        row, layer = member.tensor_role.row, member.tensor_role.layer
        if layer is None or layer < layers:
            return member
        if row.name not in kept:
            kept[row.name] = row.model_copy(update={"role": Role.OTHER, "fused": ""})
        return replace(member, tensor_role=replace(member.tensor_role, row=kept[row.name]))

    return [keep(member) for member in members]


def _count(numbers: Iterable[int | None]) -> int:
    return len({number for number in numbers if number is not None})


def _already_quantized(
    checkpoint: Checkpoint, formats: Collection[StorageFormat]
) -> Sequence[Finding]:
    # A quantization config that is no table also says that the source is quantized.
    config = declared_config(checkpoint) or checkpoint.config.get("quantization_config")
    traces = [name for name in checkpoint.tensors if name.endswith(QUANTIZED_SUFFIXES)]
    if not traces and not config:
        return []
    method = config.get("quant_method") if isinstance(config, dict) else None
    how = (
        f"config.json says {json.dumps(method)[:60]}{_unreadable(config)}"
        if method
        else f"it holds {names(traces, 1)}"
    )
    if not method and not traces:
        how = "config.json has a quantization_config"
    return [
        SOURCE_QUANTIZED.finding(
            traces[0] if traces else "config.json",
            f"{checkpoint.source.name} is already quantized ({how}).",
            "Start from the BF16 checkpoint that the source was made from"
            + ("." if set(READABLE) <= set(formats) else ", or write one: mquant dequantize."),
        )
    ]


def _unreadable(config: object) -> str:
    """Return the format and the bits of a config group of integers that mquant cannot read."""
    if not isinstance(config, dict):
        return ""
    for group in groups(config):
        weights = group.get("weights")
        if not isinstance(weights, dict) or weights.get("type") != "int":
            continue
        bits, named = weights.get("num_bits"), group.get("format") or config.get("format")
        if named != "pack-quantized" or bits not in BITS_OF_INTEGERS:
            return f", format {json.dumps(named)[:60]}, integers, num_bits {json.dumps(bits)[:20]}"
    return ""


def _unknown(unknown: list[str], family: Family) -> Finding:
    count = f"{len(unknown):,} tensor{'s' if len(unknown) > 1 else ''}"
    return TENSOR_UNKNOWN.finding(
        unknown[0],
        f"{family.title} has no such tensor as {names(unknown)} ({count}).",
        f"If the tensor belongs to the model, add its name to configs/{family.name}.yaml "
        "(role `other` copies it); if not, remove the tensor from the checkpoint.",
    )
