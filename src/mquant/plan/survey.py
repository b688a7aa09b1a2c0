"""Checkpoint x Family: what every tensor is, and where the checkpoint is not whole.

Completeness, counts and shapes are judged here, from headers and config.json alone. All findings
are errors of the *source*: quantizing a checkpoint that is not what it claims to be only hides it.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mquant.checkpoint import Checkpoint, TensorInfo
from mquant.family import Family, Role, TensorRole, TensorRow, family_of
from mquant.findings import Finding
from mquant.formulas import MOST_LAYERS
from mquant.loader_model.formats import StorageFormat
from mquant.plan.stored import READABLE, Stored, find_stored
from mquant.schemes import QUANTIZED_SUFFIXES
from mquant.text import names


@dataclass(frozen=True, slots=True)
class Member:
    """A source tensor and what its name means.

    A weight that is stored quantized is one member: `info` is the weight in BF16, at the place of
    its codes, and `stored` says how it lies there.
    """

    info: TensorInfo
    tensor_role: TensorRole
    stored: Stored | None = None

    @property
    def role(self) -> Role:
        """What the tensor is for."""
        return self.tensor_role.row.role

    @property
    def module(self) -> str:
        """The hub name of the module that owns the tensor."""
        return self.info.name.rpartition(".")[0]


@dataclass(frozen=True)
class Survey:
    """Every tensor of a checkpoint, classified; and the ways in which it is not whole.

    Where weights lie quantized in a way that cannot be read, `findings` say so, and nothing else
    was judged.
    """

    checkpoint: Checkpoint
    family: Family | None
    members: tuple[Member, ...]
    layers: int
    experts: int
    findings: tuple[Finding, ...]
    readable: bool = True

    def of(self, *roles: Role) -> list[Member]:
        """The members of some roles."""
        return [member for member in self.members if member.role in roles]


def survey(
    checkpoint: Checkpoint, families: Mapping[str, Family], formats: Collection[StorageFormat] = ()
) -> Survey:
    """Classify every tensor of a checkpoint and check that it is whole.

    One that is quantized is a finding, unless all of it lies in one of `formats`: then it is taken
    for the weights it holds.
    """
    shelf = find_stored(checkpoint, formats) if formats else None
    weights = shelf.weights if shelf else {}
    unreadable = shelf.findings if shelf else _already_quantized(checkpoint, formats)
    findings = [*checkpoint.findings, *unreadable]
    family = family_of(checkpoint.config, families)
    if family is None:
        kind = checkpoint.config.get("model_type")
        findings.append(
            Finding(
                "family-unknown",
                "error",
                "config.json",
                f"config.json says model_type {json.dumps(kind)[:60]}, a family mquant does not "
                "know.",
                f"Known are {', '.join(families)}; a family is one YAML file, given with "
                "--family FILE: see docs/adding-a-family.md.",
            )
        )
        return Survey(checkpoint, None, (), 0, 0, tuple(findings))
    members: list[Member] = []
    unknown: list[str] = []
    for tensor in checkpoint.tensors.values():
        info, stored = weights.get(tensor.name, (tensor, None))
        tensor_role = family.classify(info.name)
        if tensor_role is not None:
            members.append(Member(info, tensor_role, stored))
        elif not shelf or tensor.name not in shelf.others:
            unknown.append(info.name)
    if unknown and not unreadable:
        findings.append(_unknown(unknown, family))
    layers = _count(member.tensor_role.layer for member in members)
    experts = _count(member.tensor_role.expert for member in members)
    if not unreadable:
        findings += wholeness(family, members, checkpoint.config)
    members = _mtp_kept(family, members, checkpoint.config)
    return Survey(
        checkpoint, family, tuple(members), layers, experts, tuple(findings), not unreadable
    )


def _mtp_kept(family: Family, members: list[Member], config: Mapping[str, Any]) -> list[Member]:
    """The members, those of multi-token prediction's layers in role `other`, which is copied.

    transformers builds no such layers, so there is nothing upstream's arithmetic could run on.
    """
    layers = family.value(family.config.layers, config)
    if layers is None or not family.mtp_layers(config):
        return members
    kept: dict[TensorRow, TensorRow] = {}

    def keep(member: Member) -> Member:
        row, layer = member.tensor_role.row, member.tensor_role.layer
        if layer is None or layer < layers:
            return member
        if row not in kept:
            kept[row] = row.model_copy(update={"role": Role.OTHER, "fused": ""})
        return replace(member, tensor_role=replace(member.tensor_role, row=kept[row]))

    return [keep(member) for member in members]


def _count(numbers: Iterable[int | None]) -> int:
    return len({number for number in numbers if number is not None})


def _already_quantized(
    checkpoint: Checkpoint, formats: Collection[StorageFormat]
) -> Sequence[Finding]:
    config = checkpoint.config.get("quantization_config")
    traces = [name for name in checkpoint.tensors if name.endswith(QUANTIZED_SUFFIXES)]
    if not traces and not config:
        return []
    method = config.get("quant_method") if isinstance(config, dict) else None
    how = (
        f"config.json says {json.dumps(method)[:60]}" if method else f"it holds {names(traces, 1)}"
    )
    if not method and not traces:
        how = "config.json has a quantization_config"
    return [
        Finding(
            "source-quantized",
            "error",
            traces[0] if traces else "config.json",
            f"{checkpoint.source.name} is already quantized ({how}).",
            "Start from the BF16 checkpoint it was made from"
            + ("." if set(READABLE) <= set(formats) else ", or make one: mquant dequantize."),
        )
    ]


def _unknown(unknown: list[str], family: Family) -> Finding:
    count = f"{len(unknown):,} tensor{'s' if len(unknown) > 1 else ''}"
    return Finding(
        "tensor-unknown",
        "error",
        unknown[0],
        f"{family.title} has no such tensor as {names(unknown)} ({count}).",
        f"If it belongs to the model, add its name to configs/{family.name}.yaml "
        "(role `other` copies it); if not, remove it from the checkpoint.",
    )


def wholeness(family: Family, members: list[Member], config: Mapping[str, Any]) -> list[Finding]:
    """The ways in which tensors are not all of a model, or not the model config.json describes.

    `members` may stand for what is stored in another way: a verifier gives each quantized module
    as the weight it holds.
    """
    counts = [key for key in (family.config.layers, family.config.experts) if key]
    if family.mtp_layers(config):
        counts.append(family.config.mtp)
    for key in (*counts, *family.needed_keys(config)):
        value = config.get(key)
        # No checkpoint has more layers or experts than tensors; a lie must not cost a long loop.
        most = len(members) if key == family.config.experts else min(len(members), MOST_LAYERS)
        limit = max(most, 1) if key in counts else 2**53
        if type(value) is not int or not 0 <= value <= limit:
            said = f"says {key} {json.dumps(value)[:40]}, which cannot be"
            return [
                Finding(
                    "config-key-unusable",
                    "error",
                    "config.json",
                    f"config.json {said if key in config else f'has no {key}'}.",
                    "Take config.json from the model's repo.",
                )
            ]
    layers = config[family.config.layers]
    return [
        *_expert_findings(family, members, config.get(family.config.experts, 0)),
        *_missing(family, members, layers, config),
        *_layers_findings(family, members, layers, layers + family.mtp_layers(config)),
        *_block_findings(family, members, config),
        *_fused_findings(family, members, config),
        *_shape_findings(family, members, config),
    ]


def _expert_findings(family: Family, members: list[Member], configured: int) -> list[Finding]:
    found: dict[int, set[int]] = defaultdict(set)
    for member in members:
        if member.tensor_role.expert is not None and member.tensor_role.layer is not None:
            found[member.tensor_role.layer].add(member.tensor_role.expert)
    gaps = [layer for layer, experts in sorted(found.items()) if max(experts) + 1 != len(experts)]
    if gaps:
        layer = gaps[0]
        last = max(found[layer])
        # A file can claim an expert 999,999,999; a lie must not cost a long list.
        first = next(number for number in range(last) if number not in found[layer])
        missing = last + 1 - len(found[layer])
        more = f" and {missing - 1:,} more" if missing > 1 else ""
        return [
            Finding(
                "expert-gap",
                "error",
                f"layer {layer}",
                f"Layer {layer} has no expert {first}{more} of 0 to {last}"
                f"{_elsewhere(len(gaps) - 1)}.",
                "Number the experts without gaps, as pruning tools do, or get the missing shards.",
            )
        ]
    wrong = [layer for layer, experts in sorted(found.items()) if len(experts) != configured]
    if wrong:
        layer = wrong[0]
        return [
            Finding(
                "experts-disagree",
                "error",
                f"layer {layer}",
                f"Layer {layer} has {len(found[layer])} experts, but config.json says "
                f"{family.config.experts} {configured}{_elsewhere(len(wrong) - 1)}.",
                f"Set {family.config.experts} to what the shards hold, or get the right shards.",
            )
        ]
    return []


def _elsewhere(more: int) -> str:
    return f" (and {more} more layer{'s' if more > 1 else ''} like it)" if more > 0 else ""


def _missing(
    family: Family, members: list[Member], layers: int, config: Mapping[str, Any]
) -> list[Finding]:
    present = {member.info.name for member in members}
    experts: dict[tuple[str, int | None], set[int | None]] = defaultdict(set)
    for member in members:
        experts[member.tensor_role.row.block, member.tensor_role.layer].add(
            member.tensor_role.expert
        )
    # Releases have layers of multi-token prediction, but most copies of them do not.
    started = {layer for _, layer in experts if layer is not None and layer >= layers}
    mtp = sorted(layer for layer in started if layer < layers + family.mtp_layers(config))
    absent = [
        name
        for row in family.tensors
        if not family.may_lack(row, config)
        for layer in ((*range(layers), *mtp) if "{layer}" in row.name else (None,))
        for name in _expected(row, layer, family.has_block(row.block, layer, config), experts)
        if name not in present and not _in_started_set(family, name, present, config)
    ]
    if not absent:
        return []
    count = f"{len(absent):,} tensor{'s' if len(absent) > 1 else ''}"
    return [
        Finding(
            "tensor-missing",
            "error",
            absent[0],
            f"The checkpoint lacks {names(absent)} ({count}).",
            "Download the shards that hold them.",
        )
    ]


def _expected(
    row: TensorRow,
    layer: int | None,
    has_block: bool | None,
    experts: Mapping[tuple[str, int | None], set[int | None]],
) -> Iterator[str]:
    """Names a row must have in one layer of a whole checkpoint.

    Where nothing says whether the layer has the row's block, it has once it has some of it. A row
    with {expert} is expected for every expert that its block has in that layer (gaps are found
    elsewhere).
    """
    found = experts.get((row.block, layer), set())
    if has_block or (has_block is None and found):
        numbers = sorted(number for number in found if number is not None) or [0]
        for expert in numbers if "{expert}" in row.name else (None,):
            yield row.format(layer, expert)


def _block_findings(
    family: Family, members: list[Member], config: Mapping[str, Any]
) -> list[Finding]:
    first: dict[tuple[str, int | None], Member] = {}
    for member in members:
        first.setdefault((member.tensor_role.row.block, member.tensor_role.layer), member)
    wrong = [
        member
        for (block, layer), member in first.items()
        if family.has_block(block, layer, config) is False
    ]
    if not wrong:
        return []
    member = min(wrong, key=lambda member: member.tensor_role.layer or 0)
    return [
        Finding(
            "block-disagrees",
            "error",
            member.info.name,
            f"{member.info.name} is there, but config.json implies that it is not: "
            f"{family.title} has it where `{family.blocks[member.tensor_role.row.block]}`"
            f"{_elsewhere(len(wrong) - 1)}.",
            "Take config.json and shards from the same checkpoint.",
        )
    ]


def _layers_findings(family: Family, members: list[Member], layers: int, end: int) -> list[Finding]:
    beyond = sorted(
        {layer for m in members if (layer := m.tensor_role.layer) is not None and layer >= end}
    )
    if not beyond:
        return []
    return [
        Finding(
            "layers-disagree",
            "error",
            f"layer {beyond[0]}",
            f"The shards hold layer {beyond[0]} (the first is 0), but config.json says "
            f"{family.config.layers} {layers}.",
            f"Set {family.config.layers} to what the shards hold, or get the right shards.",
        )
    ]


def _siblings(family: Family, tensor_role: TensorRole, config: Mapping[str, Any]) -> list[str]:
    """The names of the fused set a tensor is in; members its layer cannot have are left out."""
    own, layer = tensor_role.row.block, tensor_role.layer
    return [
        row.format(layer, tensor_role.expert)
        for row in (family.fused_sets[tensor_role.row.fused] if tensor_role.row.fused else ())
        if row.block == own or family.has_block(row.block, layer, config) is not False
    ]


def _in_started_set(
    family: Family, name: str, present: set[str], config: Mapping[str, Any]
) -> bool:
    tensor_role = family.classify(name)
    return tensor_role is not None and any(
        n in present for n in _siblings(family, tensor_role, config)
    )


def _fused_findings(
    family: Family, members: list[Member], config: Mapping[str, Any]
) -> list[Finding]:
    present = {member.info.name for member in members}
    for member in members:
        if member.tensor_role.fused_set is None:
            continue
        absent = [
            name for name in _siblings(family, member.tensor_role, config) if name not in present
        ]
        if absent:
            return [
                Finding(
                    "fused-set-incomplete",
                    "error",
                    absent[0],
                    f"{member.info.name} is there without {names(absent)}; loaders make one "
                    "matrix of them, with one scale.",
                    "Download the shards that hold them.",
                )
            ]
    return []


def _shape_findings(
    family: Family, members: list[Member], config: Mapping[str, Any]
) -> list[Finding]:
    expected: dict[str, tuple[int, ...] | None] = {
        row.key: family.shape(row, config) for row in family.tensors
    }
    wrong: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        shape = expected[member.tensor_role.row.key]
        if shape is not None and member.info.shape != shape:
            wrong[member.tensor_role.row.key].append(member)
    return [
        _shape_finding(group[0].tensor_role.row, group, expected[key])
        for key, group in wrong.items()
    ]


def _shape_finding(
    row: TensorRow, group: list[Member], expected: tuple[int, ...] | None
) -> Finding:
    info = group[0].info
    more = f", and {len(group) - 1:,} more like it" if len(group) > 1 else ""
    return Finding(
        "shape-disagrees",
        "error",
        info.name,
        f"{info.name} is {list(info.shape)}, but config.json implies {list(expected or ())} "
        f"({', '.join(row.shape)}){more}.",
        "Take config.json and shards from the same checkpoint.",
    )


__all__ = ["Member", "Survey", "survey", "wholeness"]
