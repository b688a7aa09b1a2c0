"""Whether the tensors are all tensors of the model that config.json describes, and no others.

Headers and config.json alone decide about completeness, counts and shapes.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mquant.checkpoint import Checkpoint
from mquant.family import Family, TensorRole
from mquant.family_rows import DRAFTS, TensorRow
from mquant.findings import Finding, rule
from mquant.formulas import MOST_LAYERS, find
from mquant.loader_model.stacks import in_two_layouts, is_stack
from mquant.plan.members import Member
from mquant.text import names

CONFIG_KEY_UNUSABLE: Final = rule(
    "config-key-unusable",
    "config.json has the numbers that give the count and the shapes of tensors.",
    "No loader can build the model without these numbers.",
    "Take config.json from the model's repo.",
    knowing=("family",),
    if_loads="nothing",
)
EXPERT_GAP: Final = rule(
    "expert-gap",
    "The experts of a layer are numbered without gaps.",
    "vLLM turns its missing-weight check off for quantized models: missing weights stay "
    "uninitialised, and the model generates nonsense.",
    "Number the experts without gaps, or get the missing shards.",
    knowing=("family",),
    if_loads="nothing",
)
EXPERTS_DISAGREE: Final = rule(
    "experts-disagree",
    "Every layer has as many experts as config.json says.",
    "vLLM loads more or fewer experts without an error; the router then selects wrong experts.",
    "Set the number in config.json to what the shards hold, or get the right shards.",
    knowing=("family",),
    if_loads="nothing",
)
TENSOR_MISSING: Final = rule(
    "tensor-missing",
    "The shards hold every tensor of the model.",
    "vLLM turns its missing-weight check off for quantized models: missing weights stay "
    "uninitialised, and the model generates nonsense.",
    "Get the checkpoint again.",
    knowing=("family",),
    if_loads="nothing",
)
LAYERS_DISAGREE: Final = rule(
    "layers-disagree",
    "The shards hold as many layers as config.json says.",
    "Loaders refuse or drop layers beyond the number.",
    "Set the number in config.json to what the shards hold, or get the right shards.",
    knowing=("family",),
    if_loads="nothing",
)
BLOCK_DISAGREES: Final = rule(
    "block-disagrees",
    "A layer has a block (attention, dense MLP, experts) if and only if config.json implies it.",
    "Loaders build the layer that config.json describes, and refuse or drop the tensors of "
    "another layer.",
    "Take config.json and shards from the same checkpoint.",
    knowing=("family",),
    if_loads="nothing",
)
FUSED_SET_INCOMPLETE: Final = rule(
    "fused-set-incomplete",
    "A fused set has all its members.",
    "vLLM turns its missing-weight check off for quantized models: missing weights stay "
    "uninitialised, and the model generates nonsense.",
    "Get the missing shards.",
    knowing=("family",),
    if_loads="nothing",
)
SHAPE_DISAGREES: Final = rule(
    "shape-disagrees",
    "Tensors, and quantized weights when unpacked, have the shapes that config.json implies.",
    "Loaders refuse the tensor, or copy the part that fits: for experts without an error.",
    "Take config.json and shards from the same checkpoint.",
    knowing=("family",),
    if_loads="nothing",
)


EXPERTS_IN_TWO_LAYOUTS: Final = rule(
    "experts-in-two-layouts",
    "A layer has tensors of all its experts, or tensors of each expert, not both.",
    "If an expert is in both, the order of files decides which one is loaded.",
    "Remove the tensors that do not belong to this checkpoint.",
    knowing=("family",),
)


def layouts(family: Family, checkpoint: Checkpoint) -> list[Finding]:
    """Return findings if tensors that hold all experts have no such shape, or are not alone."""
    findings: list[Finding] = []
    both = list(in_two_layouts(checkpoint.tensors, family))
    if both:
        stack, tensor = both[0]
        findings.append(
            EXPERTS_IN_TWO_LAYOUTS.finding(
                stack,
                f"The shards hold {stack}, which has all experts of the layer, and {tensor}"
                f"{_elsewhere(len(both) - 1)}.",
                "Remove the tensors that do not belong to this checkpoint.",
            )
        )
    for info in checkpoint.tensors.values() if family.stacks else ():
        found = family.stack_of(info.name)
        if found and not is_stack(info, found[0]):
            held = " and ".join(name.partition("{expert}.")[2] for name in found[0].holds)
            findings.append(
                SHAPE_DISAGREES.finding(
                    info.name,
                    f"{info.name} is {list(info.shape)}, but must hold {held} of each expert.",
                    "Take config.json and shards from the same checkpoint.",
                )
            )
    return findings


def completeness(family: Family, members: list[Member], config: Mapping[str, Any]) -> list[Finding]:
    """Return findings if `members` are not exactly the tensors that config.json describes.

    `members` may stand for tensors in another storage format: `verify` passes the weight that a
    quantized module holds as the module's member.
    """
    counts = [family.config.layers]
    expert_rows = (row for row in family.tensors if "{expert}" in row.name)
    if any(family.has_block(row.block, None, config) is not False for row in expert_rows):
        counts.append(family.config.experts)
    if family.mtp_layers(config):
        counts.append(family.config.mtp)
    settings = family.settings(config)
    for key in (*counts, *family.needed_keys(config)):
        value = family.value(key, config)
        # No checkpoint has more layers or experts than tensors; a false number must not cost a long
        # loop.
        most = len(members) if key == family.config.experts else min(len(members), MOST_LAYERS)
        limit = max(most, 1) if key in counts else 2**53
        if value is None or not 0 <= value <= limit:
            stated = find(settings, key)
            fault = f"says {key} {json.dumps(stated)[:40]}, which cannot be"
            if value is not None and key in counts and limit < value <= MOST_LAYERS:
                fault = (
                    f"says {key} {value:,}, but {len(members):,} tensors have the family's names"
                )
            lacks = stated is None and key not in settings
            return [
                CONFIG_KEY_UNUSABLE.finding(
                    "config.json",
                    f"config.json {f'has no {key}' if lacks else fault}.",
                    "Take config.json from the model's repo.",
                )
            ]
    layers = family.value(family.config.layers, config) or 0
    experts = family.value(family.config.experts, config) or 0 if family.config.experts else 0
    return [
        *_expert_findings(family, members, experts),
        *_missing(family, members, layers, config),
        *_layers_findings(family, members, layers, layers + family.mtp_layers(config)),
        *_block_findings(family, members, config),
        *_fused_findings(family, members, config),
        *_shape_findings(family, members, config),
    ]


def _expert_findings(family: Family, members: list[Member], configured: int) -> list[Finding]:
    found: dict[tuple[bool, int], set[int]] = defaultdict(set)
    for member in members:
        if member.tensor_role.expert is not None and member.tensor_role.layer is not None:
            drafts = member.tensor_role.row.block == DRAFTS
            found[drafts, member.tensor_role.layer].add(member.tensor_role.expert)
    numbers = [(layer, experts) for (_, layer), experts in sorted(found.items())]
    gaps = [(layer, experts) for layer, experts in numbers if max(experts) + 1 != len(experts)]
    if gaps:
        layer, experts = gaps[0]
        last = max(experts)
        # A file can name an expert 999,999,999; a false number must not cost a long list.
        first = next(number for number in range(last) if number not in experts)
        missing = last + 1 - len(experts)
        more = f" and {missing - 1:,} more" if missing > 1 else ""
        return [
            EXPERT_GAP.finding(
                f"layer {layer}",
                f"Layer {layer} has no expert {first}{more} of 0 to {last}"
                f"{_elsewhere(len(gaps) - 1)}.",
                "Number the experts without gaps, as pruning tools do, or get the missing shards.",
            )
        ]
    wrong = [(layer, experts) for layer, experts in numbers if len(experts) != configured]
    if wrong:
        layer, experts = wrong[0]
        return [
            EXPERTS_DISAGREE.finding(
                f"layer {layer}",
                f"Layer {layer} has {len(experts)} experts, but config.json says "
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
    # Releases have layers of multi-token prediction, but most copies of releases do not.
    beyond = {layer for _, layer in experts if layer is not None and layer >= layers}
    mtp = sorted(layer for layer in beyond if layer < layers + family.mtp_layers(config))
    absent = [
        name
        for row in family.tensors
        if not family.may_lack(row, config)
        for layer in ((*range(layers), *mtp) if "{layer}" in row.name else (None,))
        for name in _expected(row, layer, _needs(family, row, layer, config), experts)
        if name not in present and not _in_started_set(family, name, present, config)
    ]
    if not absent:
        return []
    count = f"{len(absent):,} tensor{'s' if len(absent) > 1 else ''}"
    return [
        TENSOR_MISSING.finding(
            absent[0],
            f"The checkpoint lacks {names(absent)} ({count}).",
            "Download the missing shards.",
        )
    ]


def _needs(
    family: Family, row: TensorRow, layer: int | None, config: Mapping[str, Any]
) -> bool | None:
    """Return whether a whole checkpoint has a row's block in a layer; None if it may have it."""
    has_block = family.has_block(row.block, layer, config)
    return None if has_block and row.block == DRAFTS else has_block


def _expected(
    row: TensorRow,
    layer: int | None,
    has_block: bool | None,
    experts: Mapping[tuple[str, int | None], set[int | None]],
) -> Iterator[str]:
    """Yield the names that a row must have in one layer of a whole checkpoint.

    `has_block` None means that the layer has the row's block if the checkpoint has any tensor of
    the block. A row with {expert} is expected for every expert that the layer has; other rules find
    gaps between experts.
    """
    present = experts.get((row.block, layer), set())
    if has_block or (has_block is None and present):
        numbers = sorted(number for number in present if number is not None) or [0]
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
        BLOCK_DISAGREES.finding(
            member.info.name,
            f"The shards hold {member.info.name}, but config.json implies a layer without it: "
            f"{family.title} has it only if `{family.blocks[member.tensor_role.row.block]}`"
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
        LAYERS_DISAGREE.finding(
            f"layer {beyond[0]}",
            f"The shards hold layer {beyond[0]} (the first is 0), but config.json says "
            f"{family.config.layers} {layers}.",
            f"Set {family.config.layers} to what the shards hold, or get the right shards.",
        )
    ]


def _siblings(family: Family, tensor_role: TensorRole, config: Mapping[str, Any]) -> list[str]:
    """Return the names of a tensor's fused set, without members that the layer cannot have."""
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
                FUSED_SET_INCOMPLETE.finding(
                    absent[0],
                    f"The shards hold {member.info.name} without {names(absent)}; loaders make one "
                    "matrix of these tensors, with one scale.",
                    "Download the missing shards.",
                )
            ]
    return []


def _shape_findings(
    family: Family, members: list[Member], config: Mapping[str, Any]
) -> list[Finding]:
    rows = {row.key: row for row in family.tensors}
    varies = {key for key, row in rows.items() if row.varies}
    expected = {key: family.shape(row, config) for key, row in rows.items() if key not in varies}
    wrong: dict[tuple[str, tuple[int, ...]], list[Member]] = defaultdict(list)
    for member in members:
        row, layer = member.tensor_role.row, member.tensor_role.layer
        shape = family.shape(row, config, layer) if row.key in varies else expected.get(row.key)
        if shape is not None and member.info.shape != shape:
            wrong[row.key, shape].append(member)
    return [
        _shape_finding(group[0].tensor_role.row, group, shape)
        for (_, shape), group in wrong.items()
    ]


def _shape_finding(row: TensorRow, group: list[Member], expected: tuple[int, ...]) -> Finding:
    info = group[0].info
    more = f", and {len(group) - 1:,} more like it" if len(group) > 1 else ""
    return SHAPE_DISAGREES.finding(
        info.name,
        f"{info.name} is {list(info.shape)}, but config.json implies {list(expected)} "
        f"({', '.join(row.shape)}){more}.",
        "Take config.json and shards from the same checkpoint.",
    )
