"""The tensors of a checkpoint as rows of a family: names without numbers, roles, fused sets."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from mquant.family_rows import NUMBER, Role
from mquant.usual_roles import tower, usual_role

Shape = tuple[int, ...]
_FUSED: Final = (
    ("qkv", ("q_proj", "k_proj", "v_proj")),
    ("qkv", ("wq", "wk", "wv")),
    ("gate_up", ("gate_proj", "up_proj")),
    ("w13", ("w1", "w3")),
    ("qkv_a", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("qkvz", ("in_proj_qkv", "in_proj_z")),
    ("ba", ("in_proj_b", "in_proj_a")),
)
"""The modules beside each other that loaders make one matrix of."""
_STACKED: Final[Mapping[str, tuple[str, ...]]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "w13_weight": ("w1", "w3"),
    "w2_weight": ("w2",),
    "input_linear": ("gate_proj", "up_proj"),
    "output_linear": ("down_proj",),
}
"""Last part of a tensor of all experts -> the tensors of an expert in it. Others hold their own."""
_STACK: Final = re.compile(r"(?P<before>.+?)\.(?P<part>\w+?)(?P<bias>_bias|\.bias)?(\.weight)?")


@dataclass
class Row:
    """A row to be: its name, its role, and the shape in each layer (None: outside the layers)."""

    name: str
    role: Role
    shapes: dict[int | None, Shape] = field(default_factory=dict)
    dtype: str = "BF16"
    fused: str = ""
    unsure: list[str] = field(default_factory=list)

    @property
    def layers(self) -> frozenset[int]:
        """The layers that have the row."""
        return frozenset(layer for layer in self.shapes if layer is not None)

    @property
    def usual_shape(self) -> Shape:
        """The shape in most layers."""
        return Counter(self.shapes.values()).most_common(1)[0][0] if self.shapes else ()


@dataclass
class Stacked:
    """A tensor of all experts: its name, and the names of the rows that it holds."""

    name: str
    holds: list[str]
    transposed: bool
    unsure: list[str]


@dataclass
class Rows:
    """All rows of a checkpoint, by name, and its tensors of all experts."""

    rows: dict[str, Row] = field(default_factory=dict)
    stacks: dict[str, Stacked] = field(default_factory=dict)


Tensor = tuple[str, str, Shape]
"""The name, the dtype and the shape of a tensor."""


def rows_of(tensors: Iterable[Tensor], experts: int, hidden: int) -> Rows:
    """Return the rows that name all tensors. `experts` and `hidden` are sizes in config.json."""
    tensors = sorted(tensors, key=lambda tensor: _natural(tensor[0]))
    stem = _stem(name for name, _, _ in tensors)
    found = Rows()
    for name, dtype, shape in tensors:
        role = usual_role(name, shape, experts)
        prefix = _prefix(name) if role in (Role.VISION, Role.MTP) else ""
        if prefix:
            found.rows.setdefault(prefix, Row(prefix, role or Role.OTHER))
            continue
        general, layer = _general(name, stem)
        if role is Role.EXPERT and "{expert}" not in general and "{layer}" in general:
            _add_stack(found, general, layer, dtype, shape, hidden)
            continue
        _add(found, general, layer, dtype, shape, role)
    _fuse(found.rows)
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _stem(names: Iterable[str]) -> str:
    """Return what precedes the layers' numbers: the prefix of most tensors outside of towers."""
    counts: Counter[str] = Counter()
    for name in names:
        match = NUMBER.search(name)
        if match and not tower(name.split(".")):
            counts[name[: match.start()]] += 1
    return counts.most_common(1)[0][0] if counts else "model.layers."


def _prefix(name: str) -> str:
    """Return a row for all tensors of a tower: the name up to the part that says so, and `.*`."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        if usual_role(".".join((*parts[:count], "0")), (1, 1)) in (Role.VISION, Role.MTP):
            return ".".join(parts[:count]) + ".*"
    return ""


def _general(name: str, stem: str) -> tuple[str, int | None]:
    """Return a name with {layer} and {expert} for numbers, and the layer."""
    if not name.startswith(stem):
        return name, None
    number, _, rest = name.removeprefix(stem).partition(".")
    if not number.isdecimal():
        return name, None
    rest = re.sub(r"((?:^|\.)experts\.)\d+(?=\.)", r"\g<1>{expert}", rest, count=1)
    return f"{stem}{{layer}}.{rest}", int(number)


def _add(
    found: Rows, name: str, layer: int | None, dtype: str, shape: Shape, role: Role | None
) -> None:
    row = found.rows.get(name)
    if row is None:
        row = found.rows[name] = Row(name, role or Role.OTHER, dtype=dtype)
        if role is None:
            row.unsure.append("the role: nothing in the name or the shape tells it")
    row.shapes.setdefault(layer, shape)


def _add_stack(
    found: Rows, name: str, layer: int | None, dtype: str, shape: Shape, hidden: int
) -> None:
    """Add a tensor of all experts, and the rows of an expert that it holds."""
    match = _STACK.fullmatch(name)
    if match is None or len(shape) not in (2, 3):
        _add(found, name, layer, dtype, shape, None)
        return
    held = _STACKED.get(match["part"], (match["part"],))
    before = f"{match['before'].removesuffix('.experts')}.experts.{{expert}}."
    holds = [before + part + (".bias" if match["bias"] else ".weight") for part in held]
    transposed, unsure = False, []
    if len(shape) == 3:
        # The rows of gate and up are not the model's hidden size, but those of down are.
        down = re.search(r"down|w2|output", match["part"]) is not None
        along, across = (shape[1], shape[2]) if down else (shape[2], shape[1])
        transposed = along != hidden and across == hidden
        if shape[1] == shape[2]:
            unsure.append("transposed: both sides are equal")
    if len(held) > 1:
        unsure.append("interleaved: shapes do not say whether rows of gate and up alternate")
    found.stacks.setdefault(name, Stacked(name, holds, transposed, unsure))
    size = shape[-1] if transposed or len(shape) == 2 else shape[1]
    other = shape[1] if transposed else shape[-1]
    part: Shape = (size // len(held),) if len(shape) == 2 else (size // len(held), other)
    for each in holds:
        _add(found, each, layer, dtype, part, Role.OTHER if match["bias"] else Role.EXPERT)


def _fuse(rows: Mapping[str, Row]) -> None:
    """Name the fused sets: modules beside each other that read the same columns."""
    beside: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows.values():
        module = row.name.removesuffix(".weight")
        if module != row.name and len(row.usual_shape) == 2:
            parent, _, short = module.rpartition(".")
            beside[parent][short] = row
    used: dict[str, str] = {}
    for parent, members in beside.items():
        for title, shorts in _FUSED:
            group = [members[short] for short in shorts if short in members]
            if len(group) < len(shorts) or len({row.usual_shape[1] for row in group}) > 1:
                continue
            role = group[0].role
            name = title if role in (Role.ATTENTION, Role.MLP) else f"{role.value}_{title}"
            if used.setdefault(name, parent) != parent:
                name = f"{name}_{parent.rpartition('.')[2]}"
                used[name] = parent
            for row in group:
                row.fused = name
