"""What headers and JSON tell: whether all of the model is there, and every part as it must be."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import mquant.verify.structure_rules  # noqa: F401 -- registers the rules
from mquant.family import Family, FusedSet, Role, TensorRole
from mquant.findings import Finding
from mquant.loader_model.formats import (
    INPUT_SCALES,
    METHODS,
    SUFFIXES,
    StorageFormat,
    activations,
    format_of,
    groups,
    misdeclared,
    parts,
    weight_shape,
)
from mquant.loader_model.modules import Module, ModuleView
from mquant.plan import Member, wholeness
from mquant.schemes import QUANTIZED_SUFFIXES
from mquant.text import names
from mquant.verify.mtp import check_mtp
from mquant.verify.rules import RULES, finding
from mquant.verify.tally import Tally

# Scales of the KV cache: loaders know them beside any attention, and do without.
_HARMLESS: Final = ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale")
_STRATEGIES: Final = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_FORMATS: Final[dict[str, str | None]] = {
    "nvfp4-pack-quantized": StorageFormat.NVFP4.short,
    "pack-quantized": StorageFormat.INT.short,
    "float-quantized": StorageFormat.FP8.short,
    "naive-quantized": None,
    "int-quantized": None,
    "mixed-precision": None,
    "mxfp4-pack-quantized": None,
    "mxfp8-quantized": None,
    "marlin-24": None,
    "dense": None,
}

Kinds = Mapping[str, StorageFormat]
"""Quantized modules by name."""


def check_structure(view: ModuleView) -> tuple[Finding, ...]:
    """Judge a checkpoint by its headers, index and config.json."""
    modules = view.modules.values()
    kinds = {m.name: kind for m in modules if (kind := format_of(view, m)) is not None}
    tally = Tally()
    _modules(view, kinds, tally)
    _config(view, kinds, tally)
    # Quantizing refuses what a loader can still make sense of; here it is a warning.
    found = [replace(f, severity=RULES[f.rule].severity) for f in view.checkpoint.findings]
    found += _total_size(view)
    if view.family is None:
        found.append(_unknown_family(view))
        return (*found, *tally.findings())
    _names(view, view.family, tally)
    _mixed(view, kinds, tally)
    whole = [*wholeness(view.family, _members(view, kinds), view.checkpoint.config)]
    if lost_shards(view):
        # What a lost shard held is missing: saying so tensor by tensor tells nothing new.
        whole = [f for f in whole if f.rule == "shape-disagrees"]
        rest = [f for f in tally.findings() if f.rule not in ("part-missing", "fused-set-mixed")]
        return (*found, *whole, *rest)
    found += [*whole, *tally.findings()]
    named = ((name, module.tensor_role) for name, module in view.modules.items())
    found += check_mtp(view.family, view.checkpoint.config, named)
    return tuple(found)


def lost_shards(view: ModuleView) -> bool:
    """Whether shards are missing or damaged; what they held is then not known to be lacking."""
    rules = {finding.rule for finding in view.checkpoint.findings}
    return bool(rules & {"shard-damaged", "shard-missing"})


def _members(view: ModuleView, kinds: Kinds) -> list[Member]:
    """Every known tensor as if nothing were quantized: of a quantized module, its weight.

    What has a loaded model's name counts as what it is: it has a finding of its own.
    """
    members: list[Member] = []
    family, config = view.family, view.checkpoint.config
    if family is None:
        return members
    for module in view.modules.values():
        kind = kinds.get(module.name)
        for suffix, info in module.tensors.items():
            tensor_role = _meant(family, info.name)
            if tensor_role is not None and not (kind and suffix == "weight"):
                name = tensor_role.row.format(tensor_role.layer, tensor_role.expert)
                members.append(Member(replace(info, name=name), tensor_role))
        tensor_role = _meant(family, f"{module.name}.weight")
        if kind is not None and tensor_role is not None:
            shape = weight_shape(kind, module, view) or family.shape(tensor_role.row, config)
            name = tensor_role.row.format(tensor_role.layer, tensor_role.expert)
            any_part = next(iter(module.tensors.values()))
            members.append(Member(replace(any_part, name=name, shape=shape or ()), tensor_role))
    return members


def _meant(family: Family, name: str) -> TensorRole | None:
    return family.classify(name) or family.classify_in_memory(name)


def _total_size(view: ModuleView) -> Iterator[Finding]:
    checkpoint = view.checkpoint
    if checkpoint.total_size not in (None, checkpoint.nbytes) and not lost_shards(view):
        yield finding(
            "total-size-wrong",
            "model.safetensors.index.json",
            f"The index says total_size {checkpoint.total_size:,}; the tensors are "
            f"{checkpoint.nbytes:,} bytes.",
        )


def _unknown_family(view: ModuleView) -> Finding:
    kind = str(view.checkpoint.config.get("model_type"))[:60]
    return finding(
        "family-unknown",
        "config.json",
        f"config.json says model_type {kind!r}, a family mquant does not know: only what holds "
        "for every model was checked.",
    )


def _names(view: ModuleView, family: Family, tally: Tally) -> None:
    for module in view.modules.values():
        renamed = family.classify_in_memory(f"{module.name}.weight")
        for suffix, info in module.tensors.items():
            if family.classify(info.name) is not None or suffix in _HARMLESS:
                continue
            part = f".{suffix}" in QUANTIZED_SUFFIXES or suffix == "weight_g_idx"
            if module.tensor_role is not None and part:
                continue
            if renamed is not None and (part or suffix == "weight"):
                if renamed.row.role is Role.EXPERT:
                    continue  # told by `check_ignore`, with all that vLLM makes of it
                hub = renamed.row.format(renamed.layer, renamed.expert).removesuffix(".weight")
                tally.add(
                    "tensor-renamed",
                    info.name,
                    f"{info.name} has a loaded model's name; on disk the module is {hub}",
                )
            else:
                tally.add(
                    "tensor-unknown", info.name, f"{family.title} has no such tensor as {info.name}"
                )


def _modules(view: ModuleView, kinds: Kinds, tally: Tally) -> None:
    declared = {kind: activations(kind, view) for kind in set(kinds.values())}
    for name, kind in kinds.items():
        module = view.modules[name]
        if kind is StorageFormat.OTHER:
            continue
        _inputs(module, kind, declared[kind], tally)
        codes = SUFFIXES[kind].codes
        if codes != "weight" and codes in module.tensors and "weight" in module.tensors:
            tally.add("weight-stored-twice", name, f"{name} has both weight and {codes}")
        _parts(view, module, kind, tally)


def _parts(view: ModuleView, module: Module, kind: StorageFormat, tally: Tally) -> None:
    shape = weight_shape(kind, module, view)
    # Without codes nothing says how large the rest must be.
    expected = parts(kind, shape or (0, 0), view)
    present = ", ".join(sorted(s for s in module.tensors if s in expected))
    for suffix, part in expected.items():
        info = module.tensors.get(suffix)
        if info is None:
            if part.required:
                tally.add(
                    "part-missing",
                    f"{module.name}.{suffix}",
                    f"{module.name} is quantized ({kind.short}: {present}), but has no {suffix}",
                )
        elif info.dtype not in part.dtypes:
            wanted = " or ".join(part.dtypes)
            tally.add(
                "part-dtype", info.name, f"{info.name} is {info.dtype}; {kind.short} has {wanted}"
            )
        elif shape and part.shapes and info.shape not in part.shapes:
            wanted = " or ".join(str(list(each)) for each in part.shapes)
            tally.add(
                "part-shape",
                info.name,
                f"{info.name} is {list(info.shape)}; a weight of {list(shape)} needs {wanted}",
            )
    known = {*expected, *INPUT_SCALES, "weight"}
    for suffix, info in module.tensors.items():
        if f".{suffix}" in QUANTIZED_SUFFIXES and suffix not in known:
            tally.add(
                "part-unexpected", info.name, f"{info.name} is no part of a module in {kind.short}"
            )


def _inputs(module: Module, kind: StorageFormat, declared: bool | None, tally: Tally) -> None:
    name = SUFFIXES[kind].input
    there = any(suffix in module.tensors for suffix in INPUT_SCALES)
    if declared and name and name not in module.tensors:
        tally.add(
            "activation-scales-missing",
            f"{module.name}.{name}",
            f"config.json declares quantized activations, but {module.name} has no {name}",
        )
    elif declared is False and there:
        tally.add(
            "activation-scales-undeclared",
            module.name,
            f"{module.name} has a scale of its input, but config.json declares no static "
            "scales of activations",
        )


def _mixed(view: ModuleView, kinds: Kinds, tally: Tally) -> None:
    sets: dict[FusedSet, list[Module]] = defaultdict(list)
    experts: dict[int | None, list[Module]] = defaultdict(list)
    for module in view.modules.values():
        if module.tensor_role is None:
            continue
        row, layer = module.tensor_role.row, module.tensor_role.layer
        if fused_set := module.tensor_role.fused_set:
            sets[fused_set].append(module)
        if row.role is Role.EXPERT:
            experts[layer].append(module)
    for rule, groups_ in (("fused-set-mixed", sets.values()), ("experts-mixed", experts.values())):
        for group in groups_:
            _alike(rule, group, kinds, tally)


def _alike(rule: str, group: list[Module], kinds: Kinds, tally: Tally) -> None:
    def state(module: Module) -> str:
        kind = kinds.get(module.name)
        return kind.short if kind else "not quantized"

    states = [state(module) for module in group]
    common = max(set(states), key=states.count)
    # The odd one out is what a person looks for; of a pair, the plain one.
    if odd := next((m for m in group if state(m) != common), None):
        other = next(m for m in group if state(m) == common)
        if states.count(common) == states.count(state(odd)) and odd.name in kinds:
            odd, other = other, odd
        tally.add(
            rule,
            odd.name,
            f"{odd.name} is {_say(state(odd))}, but {other.name} is {_say(state(other))}",
        )


def _say(state: str) -> str:
    return state if state == "not quantized" else f"quantized ({state})"


def _config(view: ModuleView, kinds: Kinds, tally: Tally) -> None:
    config = view.checkpoint.config
    for key in ("architectures", *(view.family.required_config if view.family else ())):
        if key not in config:
            tally.add("config-key-missing", "config.json", f"config.json has no {key}")
    if view.method and not kinds and not lost_shards(view):
        tally.add(
            "quantization-unused",
            "config.json",
            f"config.json declares {view.method[:40]!r}, but no tensor is quantized",
        )
    other = [name for name, kind in kinds.items() if kind is StorageFormat.OTHER]
    if other:
        tally.add(
            "layout-not-judged",
            other[0],
            f"How {names(other)} {'is' if len(other) == 1 else 'are'} quantized is not known here: "
            "neither parts nor numbers were judged",
        )
    for why in _invalid(view):
        tally.add("quantization-config-invalid", "config.json", f"quantization_config {why}")
    if view.method == "compressed-tensors":
        for kind in dict.fromkeys(kinds.values()):
            if said := misdeclared(kind, view):
                name = next(name for name in kinds if kinds[name] is kind)
                tally.add(
                    "weights-misdeclared",
                    "config.json",
                    f"config_groups of config.json say {said}, but {name} is {kind.short}",
                )
        formats = {str(group["format"]) for group in groups(view.config) if group.get("format")}
        declared = formats or {str(view.config.get("format"))}
        expected = {_FORMATS.get(each) for each in declared}
        wrong = {name: kind for name, kind in kinds.items() if kind.short not in expected}
        if wrong and None not in expected:
            name, kind = next(iter(wrong.items()))
            said = " and ".join(repr(each) for each in sorted(declared))
            tally.add(
                "format-differs",
                "config.json",
                f"config.json says format {said}, but {name} is {kind.short}",
            )


def _invalid(view: ModuleView) -> Iterator[str]:
    """What no loader could parse, as ends of a sentence."""
    stated = view.checkpoint.config.get("quantization_config")
    if stated is not None and not isinstance(stated, dict):
        yield "is no table of keys"
        return
    if isinstance(stated, dict) and not isinstance(stated.get("quant_method"), str):
        yield "has no quant_method"
    elif isinstance(stated, dict) and view.method not in METHODS:
        yield f"has the unknown quant_method {view.method[:40]!r}"
    if view.method != "compressed-tensors":
        return
    table = view.config.get("config_groups")
    if not isinstance(table, dict) or not table:
        yield "has no config_groups"
        return
    for name, group in table.items():
        if why := _invalid_group(group):
            yield f"has a config group {name[:40]!r} that {why}"


def _invalid_group(group: Any) -> str:
    if not isinstance(group, dict):
        return "is no table of keys"
    targets, args, named = group.get("targets"), group.get("weights"), group.get("format")
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        return "has no list of targets"
    if named is not None and (not isinstance(named, str) or named not in _FORMATS):
        return f"has the unknown format {str(named)[:40]!r}"
    if args is None:
        return ""
    if not isinstance(args, dict) or type(args.get("num_bits")) is not int:
        return "does not say how many bits weights have"
    if args.get("strategy") not in (None, *_STRATEGIES):
        return f"has the unknown strategy {str(args['strategy'])[:40]!r}"
    return ""


__all__ = ["check_structure", "lost_shards"]
