"""Drafts: small checkpoints of headers and JSON, which mutations change before they are written.

Loaders and `mquant verify --depth structure` read no data, so a written draft's shards have holes.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final, TypeVar

from mquant.checkpoint import CONFIG_NAME, INDEX_NAME, build_header
from mquant.dtypes import nbytes
from mquant.family import Family
from mquant.family_rows import Role

Header = tuple[str, tuple[int, ...]]
"""A tensor's safetensors dtype and shape."""
Layout = Callable[[str, tuple[int, ...]], dict[str, Header]]
"""(module, [out, in] of its weight) -> the tensors that store the module."""
T = TypeVar("T")


class Unfit(Exception):
    """A mutation does not apply to a draft."""


@dataclass
class Files:
    """The shards of a draft, and its index: None if there is no index file.

    `shards` maps a file to the names of its tensors; `lost` are shards that are not written.
    """

    shards: dict[str, list[str]]
    index: dict[str, str] | None
    lost: set[str] = field(default_factory=set)


@dataclass
class Draft:
    """A checkpoint before it is written.

    `plain` has the tensors of the unquantized parent. `layouts` maps every quantized module to its
    layout. `files` are JSON files besides config.json and the index. `edits` change the shards and
    the index when the draft is written, because they must know all tensors.
    """

    family: Family
    form: str
    config: dict[str, Any]
    tensors: dict[str, Header]
    plain: dict[str, Header]
    layouts: dict[str, Layout] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    cuts: int = 1
    edits: list[Callable[[Files], None]] = field(default_factory=list)

    @property
    def experts(self) -> int:
        """The number of experts on disk, by their largest number. Raises Unfit without experts."""
        parts = (name.partition(".experts.")[2].partition(".")[0] for name in self.tensors)
        numbers = [int(part) for part in parts if part.isdecimal()]
        if not numbers:
            raise Unfit
        return max(numbers) + 1

    def copy(self) -> "Draft":
        """Return a copy whose change leaves this draft as it is."""
        return Draft(
            self.family,
            self.form,
            deepcopy(self.config),
            dict(self.tensors),
            self.plain,
            dict(self.layouts),
            deepcopy(self.files),
            self.cuts,
            list(self.edits),
        )

    @property
    def text(self) -> dict[str, Any]:
        """The table of config.json with the text model's keys: config.json itself, mostly."""
        table = self.config.get(self.family.nested) if self.family.nested else None
        return table if isinstance(table, dict) else self.config

    @property
    def quant(self) -> dict[str, Any]:
        """config.json's quantization_config. Raises Unfit if there is none."""
        table = self.config.get("quantization_config")
        if not isinstance(table, dict):
            raise Unfit
        return table

    @property
    def method(self) -> str:
        """The quant_method that config.json declares, or an empty string."""
        table = self.config.get("quantization_config")
        return str(table.get("quant_method", "")) if isinstance(table, dict) else ""

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """The config groups of compressed-tensors. Raises Unfit if there are none."""
        table = self.quant.get("config_groups")
        if self.method != "compressed-tensors" or not isinstance(table, dict) or not table:
            raise Unfit
        return table

    def role(self, name: str) -> Role | None:
        """Return the role of a tensor's, or of a module's, name in the family."""
        meaning = self.family.classify(name) or self.family.classify(f"{name}.weight")
        return meaning.row.role if meaning else None

    def modules(self, *roles: Role) -> list[str]:
        """Return the modules of the parent that have one of `roles` and a weight, in order."""
        names = (name.removesuffix(".weight") for name in self.plain if name.endswith(".weight"))
        return [name for name in names if self.role(name) in roles]

    def quantized(self, *roles: Role) -> list[str]:
        """Return the quantized modules of `roles` (none given: of all roles), in order."""
        return [name for name in self.layouts if not roles or self.role(name) in roles]

    def of(self, module: str) -> list[str]:
        """Return the names of a module's tensors."""
        return [name for name in self.tensors if name.rpartition(".")[0] == module]

    def strip(self, module: str) -> None:
        """Remove what stores a module's weight; a bias stays."""
        for name in self.of(module):
            if not name.endswith(".bias"):
                del self.tensors[name]
        self.layouts.pop(module, None)

    def store(self, module: str, layout: Layout) -> None:
        """Store a module in a layout, at the end of the checkpoint."""
        shape = self._of_parent(module)[1]
        self.strip(module)
        self.tensors |= layout(module, shape)
        self.layouts[module] = layout

    def keep(self, module: str) -> None:
        """Store a module as the parent stores it."""
        weight = self._of_parent(module)
        self.strip(module)
        self.tensors[f"{module}.weight"] = weight

    def _of_parent(self, module: str) -> Header:
        """Return the parent's weight. Raises Unfit if the parent has it in a larger tensor."""
        if f"{module}.weight" not in self.plain:
            raise Unfit
        return self.plain[f"{module}.weight"]

    def placed(self) -> Files:
        """Return the shards and the index, with the edits of files."""
        names = list(self.tensors)
        parts = [list(part) for part in _cut(names, self.cuts)]
        count = len(parts)
        shards = {
            f"model-{number:05d}-of-{count:05d}.safetensors": part
            for number, part in enumerate(parts, 1)
        }
        files = Files(shards, {name: file for file, part in shards.items() for name in part})
        for edit in self.edits:
            edit(files)
        for names in files.shards.values():  # a later mutation may have dropped a tensor
            names[:] = [name for name in names if name in self.tensors]
        return files

    def write(self, folder: Path) -> Path:
        """Write the checkpoint into a new folder and return the folder."""
        folder.mkdir(parents=True)
        files = self.placed()
        total = sum(nbytes(*header) for header in self.tensors.values())
        for file, names in files.shards.items():
            if file not in files.lost:
                _write_shard(folder / file, {name: self.tensors[name] for name in names})
        if files.index is not None:
            index = {"metadata": {"total_size": total}, "weight_map": files.index}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=1))
        for name, content in self.files.items():
            (folder / name).write_text(json.dumps(content, indent=1))
        (folder / CONFIG_NAME).write_text(json.dumps(self.config, indent=1))
        return folder


def _cut(names: Sequence[str], count: int) -> Iterator[Sequence[str]]:
    for number in range(count):
        yield names[number * len(names) // count : (number + 1) * len(names) // count]


def _write_shard(path: Path, tensors: dict[str, Header]) -> None:
    header, _ = build_header([(name, *tensor) for name, tensor in tensors.items()])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(nbytes(*tensor) for tensor in tensors.values()))


@dataclass(frozen=True)
class Mutation:
    """A change of drafts. `good`: loaders should not mind the change. `weight`: how often."""

    name: str
    apply: Callable[[Draft, Random], str | None]
    good: bool
    weight: float
    fits: Callable[[Draft], bool]


MUTATIONS: Final[dict[str, Mutation]] = {}
"""Every mutation by its name: what a reader sees."""
_Apply = Callable[[Draft, Random], str | None]


def mutation(
    name: str,
    *,
    good: bool = False,
    weight: float = 1,
    fits: Callable[[Draft], bool] = lambda _: True,
) -> Callable[[_Apply], _Apply]:
    """Register a function that changes a draft in place, and returns which part was changed.

    The function raises Unfit if the draft has nothing to change; `fits` says so beforehand.
    """

    def register(apply: _Apply) -> _Apply:
        assert name not in MUTATIONS, name
        MUTATIONS[name] = Mutation(name, apply, good, weight, fits)
        return apply

    return register


def chance(seed: str) -> Random:
    """Return the random numbers of a seed."""
    return Random(seed)  # noqa: S311  (no secret)


def pick(random: Random, options: Iterable[T]) -> T:
    """Return one of the options. Raises Unfit if there are none."""
    choices = list(options)
    if not choices:
        raise Unfit
    return random.choice(choices)


def by_method(*methods: str) -> Callable[[Draft], bool]:
    """Return whether a draft declares one of the methods."""
    return lambda draft: draft.method in methods


__all__ = [
    "MUTATIONS",
    "Draft",
    "Files",
    "Header",
    "Layout",
    "Mutation",
    "Unfit",
    "by_method",
    "chance",
    "mutation",
    "pick",
]
