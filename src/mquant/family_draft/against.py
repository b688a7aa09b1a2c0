"""What of a family file does not fit a checkpoint: a list for each kind of difference."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from mquant.checkpoint import Checkpoint, TensorInfo
from mquant.family import Family, TensorRole
from mquant.family_rows import NUMBER, TensorRow
from mquant.formulas import MOST_LAYERS
from mquant.loader_model.stacks import unstacked
from mquant.plan.stored import READABLE, find_stored

Kind = Literal["model type", "no row", "not in the checkpoint", "not in such layers", "shape"]
_MOST_EXPERTS: Final = 100_000


@dataclass(frozen=True)
class Difference:
    """One difference: the row or the name, in how many tensors, and the facts in words."""

    kind: Kind
    name: str
    count: int
    says: str


def differences(family: Family, checkpoint: Checkpoint) -> list[Difference]:
    """Return all differences between a family's rows and a checkpoint's tensors."""
    family = family.named_as(checkpoint.tensors)
    found: list[Difference] = []
    kind = checkpoint.config.get("model_type")
    if kind not in family.model_types:
        text = f"config.json says {str(kind)[:60]!r}, the file {', '.join(family.model_types)}"
        found.append(Difference("model type", "config.json", 1, text))
    tensors = _tensors(family, checkpoint)
    known = {info.name: role for info in tensors if (role := family.classify(info.name))}
    found += _unnamed(family, [info.name for info in tensors if info.name not in known])
    found += _lacking(family, checkpoint, known)
    found += _beyond(family, checkpoint, known)
    found += _shapes(family, checkpoint, [(i, known[i.name]) for i in tensors if i.name in known])
    return found


def _tensors(family: Family, checkpoint: Checkpoint) -> list[TensorInfo]:
    tensors = unstacked(checkpoint, family)
    stored = find_stored(checkpoint, tensors, READABLE)
    others = stored.others if stored else frozenset()
    weights = stored.weights if stored else {}
    return [
        weights[info.name][0] if info.name in weights else info
        for info in tensors.values()
        if info.name not in others
    ]


def _unnamed(family: Family, names: list[str]) -> Iterator[Difference]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[NUMBER.sub("#", name)].append(name)
    for group in groups.values():
        stack = family.stack_of(group[0])
        text = "the tensor has another shape than its stack" if stack else "no row has this name"
        yield Difference("shape" if stack else "no row", group[0], len(group), text)


def _lacking(
    family: Family, checkpoint: Checkpoint, known: dict[str, TensorRole]
) -> Iterator[Difference]:
    config = checkpoint.config
    layers = min(family.value(family.config.layers, config) or 0, MOST_LAYERS)
    experts = family.value(family.config.experts, config) or 0 if family.config.experts else 0
    blocks = {(role.row.block, role.layer) for role in known.values()}
    for row in family.tensors:
        if family.may_lack(row, config):
            continue
        absent = []
        for layer in range(layers) if "{layer}" in row.name else (None,):
            has = family.has_block(row.block, layer, config)
            if has or (has is None and (row.block, layer) in blocks):
                numbers = range(min(experts, _MOST_EXPERTS)) if "{expert}" in row.name else (None,)
                names = (row.format(layer, expert) for expert in numbers)
                absent += [name for name in names if name not in known]
        if absent:
            text = f"the checkpoint lacks the row's tensors (first: {absent[0]})"
            yield Difference("not in the checkpoint", row.name, len(absent), text)


def _beyond(
    family: Family, checkpoint: Checkpoint, known: dict[str, TensorRole]
) -> Iterator[Difference]:
    config = checkpoint.config
    end = (family.value(family.config.layers, config) or 0) + family.mtp_layers(config)
    wrong: dict[TensorRow, list[int]] = defaultdict(list)
    for role in known.values():
        block = family.has_block(role.row.block, role.layer, config)
        if role.layer is not None and (block is False or role.layer >= end):
            wrong[role.row].append(role.layer)
    for row, layers in wrong.items():
        condition = family.blocks.get(row.block, "layer < " + family.config.layers)
        text = f"layer {min(layers)} has it, but the file says `{condition}`"
        yield Difference("not in such layers", row.name, len(layers), text)


def _shapes(
    family: Family, checkpoint: Checkpoint, tensors: list[tuple[TensorInfo, TensorRole]]
) -> Iterator[Difference]:
    expected: dict[tuple[TensorRow, int | None], tuple[int, ...] | None] = {}
    wrong: dict[TensorRow, list[str]] = defaultdict(list)
    for info, role in tensors:
        key = (role.row, role.layer if role.row.varies else None)
        if key not in expected:
            expected[key] = family.shape(role.row, checkpoint.config, key[1])
        shape = expected[key]
        if (role.row.shape or role.row.shapes) and info.shape != shape:
            sizes = "no size" if shape is None else list(shape)
            text = f"{info.name} is {list(info.shape)}, config.json gives {sizes}"
            wrong[role.row].append(f"{text} ({', '.join(role.row.shape)})")
    for row, texts in wrong.items():
        yield Difference("shape", row.name, len(texts), texts[0])
