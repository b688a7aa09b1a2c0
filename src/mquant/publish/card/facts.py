"""Gather a card's facts from the checkpoint, its record, its parent and its publisher."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mquant.checkpoint import Source, open_checkpoint
from mquant.checkpoint.generation_config import read_sampling
from mquant.errors import SourceError
from mquant.events import Emit, silent
from mquant.family import Family
from mquant.family_rows import Role
from mquant.loader_model.modules import ModuleView, read_modules
from mquant.loader_model.storage import FP8S, StorageFormat, format_of, groups, weight_shape
from mquant.output import Record, read_record
from mquant.publish.card.about import About
from mquant.publish.card.measured import Measured
from mquant.publish.card.parent import Parent, find_parent
from mquant.schemes import QUANTIZED_SUFFIXES, SCHEMES
from mquant.verify.inspect import Inspection, inspect
from mquant.verify.judge import Depth, Report, verify

_LICENSE: Final = re.compile(r"licen[cs]e[a-z.-]*", re.IGNORECASE | re.ASCII)
_UNKNOWN: Final = "unknown"
_CACHE_BYTES: Final = 2  # of an element of the KV cache in 16 bits


@dataclass(frozen=True, slots=True)
class RoleFacts:
    """One role: the number of kept tensors, of quantized modules, and of elements in both."""

    role: str
    kept: int
    quantized: int
    parameters: int


@dataclass(frozen=True)
class Card:
    """The facts of one card. None or an empty value means: not known.

    `scheme` is mquant's name of the scheme of all quantized modules; `active` counts parameters
    that take part in one token; `cache_bytes` is the size of the KV cache in 16 bits for one token;
    `license_file` is the name of the licence file. `tried`: engines were tried with models of the
    family.
    """

    inspection: Inspection
    report: Report
    scheme: str
    format: str
    ignore: tuple[str, ...]
    roles: tuple[RoleFacts, ...]
    parameters: int | None
    active: int | None
    architecture: str
    tried: bool
    generation: Mapping[str, float | bool]
    cache_bytes: int | None
    cache_scheme: bool
    license_file: str
    record: Record | None
    parent: Parent
    measured: Measured
    about: About

    @property
    def repo(self) -> str:
        """The checkpoint's hub repo, or the folder's name."""
        return self.about.repo or self.inspection.name


def gather(
    source: Source,
    families: Mapping[str, Family],
    *,
    given: Source | None = None,
    measured: Measured | None = None,
    about: About | None = None,
    depth: Depth | None = None,
    vllm: Path | None = None,
    emit: Emit = silent,
) -> Card:
    """Read a checkpoint, verify it against the `given` parent, and read the parent's card.

    `vllm` is the Python of a vLLM that loads the headers too.
    Raises SourceError if the checkpoint is not quantized, or cannot be read.
    """
    checkpoint = open_checkpoint(source, tolerant=True)
    view = read_modules(checkpoint, families)
    if not view.quantized:
        raise SourceError(
            f"{source.name} is not quantized: a card describes a quantization.",
            "Give the checkpoint that mquant quantize wrote.",
        )
    record = read_record(source)
    parent = find_parent(record, given, emit)
    report = verify(source, families, depth, given, emit, vllm=vllm)
    roles = _roles(view)
    parameters = sum(role.parameters for role in roles) if roles else None
    inspection = inspect(checkpoint, families)
    return Card(
        inspection=inspection,
        report=report,
        scheme=_scheme(view),
        format=str(view.config.get("format") or view.method),
        ignore=view.ignore,
        roles=roles,
        parameters=parameters,
        active=_active(parameters, roles, inspection),
        architecture=_architecture(checkpoint.config),
        tried=view.family is not None and not view.family.own,
        generation=read_sampling(source),
        cache_bytes=_cache_bytes(view),
        cache_scheme=bool(view.config.get("kv_cache_scheme")),
        license_file=next(filter(_LICENSE.fullmatch, source.files), ""),
        record=record,
        parent=parent,
        measured=measured or Measured(),
        about=about or About(),
    )


def _scheme(view: ModuleView) -> str:
    """Return the scheme of all quantized modules; empty if the scheme is unknown or not unique.

    Only keys that decide the arithmetic are compared: tools differ in the other keys they write.
    """
    kinds = {format_of(view, module) for module in view.quantized}
    if len({kind.short for kind in kinds if kind}) != 1 or not kinds <= {
        StorageFormat.NVFP4,
        StorageFormat.INT,
        *FP8S,
    }:
        return ""
    config_groups = list(groups(view.config))
    for name, scheme in SCHEMES.items():
        config_group = scheme.config_group
        keys = ("num_bits", "type", "strategy", "group_size", "dynamic")
        if config_groups and all(
            bool(group.get("input_activations")) is bool(config_group["input_activations"])
            and isinstance(weights := group.get("weights"), dict)
            and all(weights.get(key) == config_group["weights"].get(key) for key in keys)
            for group in config_groups
        ):
            return name
    return ""


def _roles(view: ModuleView) -> tuple[RoleFacts, ...]:
    """Return the facts by role, in the order of `Role`; empty if a weight's shape is unknown."""
    kept: Counter[str] = Counter()
    quantized: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for module in view.modules.values():
        kind = format_of(view, module)
        if kind is not None:
            shape = weight_shape(kind, module, view)
            if shape is None:
                return ()
            role = _name(module.role)
            quantized[role] += 1
            parameters[role] += math.prod(shape)
        for suffix, info in module.tensors.items():
            if kind is None or (suffix != "weight" and f".{suffix}" not in QUANTIZED_SUFFIXES):
                meaning = view.family.classify(info.name) if view.family else None
                role = _name(meaning.row.role if meaning else None)
                kept[role] += 1
                parameters[role] += info.elements
    order = [*(role.value for role in Role), _UNKNOWN]
    return tuple(
        RoleFacts(role, kept[role], quantized[role], parameters[role])
        for role in sorted(parameters, key=order.index)
    )


def _name(role: Role | None) -> str:
    return role.value if role else _UNKNOWN


def _active(
    parameters: int | None, roles: tuple[RoleFacts, ...], inspection: Inspection
) -> int | None:
    """Return the number of parameters, without those of experts that a token is not routed to."""
    experts = sum(role.parameters for role in roles if role.role == Role.EXPERT.value)
    count, chosen = inspection.experts, inspection.experts_per_token
    if parameters is None or not experts or not count or not chosen or chosen > count:
        return None
    return parameters - experts * (count - chosen) // count


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    return first if isinstance(first, str) else ""


def _cache_bytes(view: ModuleView) -> int | None:
    family, config = view.family, view.checkpoint.config
    if family is None or not family.config.kv_heads:
        return None
    keys = (family.config.layers, family.config.kv_heads, "head_dim")
    sizes = [family.value(key, config) for key in keys]
    if None in sizes:
        return None
    return 2 * _CACHE_BYTES * math.prod(size or 0 for size in sizes)
