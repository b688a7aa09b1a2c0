"""Weights that stay as the source stores them, in the terms of compressed-tensors. Pure.

Codes and scales keep their bytes. Names are those of compressed-tensors' layout; E8M0 scales of FP8
blocks become F32, which holds every power of two. The config group is the group that config.json
declares, if the source is of compressed-tensors, or else the group that means the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from mquant.checkpoint import TensorInfo
from mquant.findings import Finding, rule
from mquant.loader_model.integer_parts import SCALAR, byte_scales
from mquant.loader_model.storage import (
    E8M0S,
    FP8S,
    INTEGERS,
    MX_GROUP,
    MXFP4S,
    SUFFIXES,
    StorageFormat,
    groups,
)
from mquant.plan.action import Action, OutputTensor
from mquant.plan.stored_integers import ORDER
from mquant.plan.stored_parts import Stored
from mquant.schemes import (
    FP8_BLOCK,
    FP8_DYNAMIC,
    KNOWN,
    MXFP4A16,
    MXFP8,
    NVFP4,
    NVFP4A16,
    W4A16,
    Scheme,
)

NOT_AS_STORED: Final = rule(
    "not-as-stored",
    "Weights that the recipe keeps as the source stores them are in a layout that config.json can "
    "declare in the terms of compressed-tensors.",
    "A checkpoint has one quantization_config, and loaders read weights as it says.",
    "Give the role a scheme, or leave the role out of the recipe: its weights then become BF16.",
    needs="plan",
)

Group = Mapping[str, Any]
_KEYS: Final = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric")
_INPUTS: Final = ("num_bits", "type", "strategy", "group_size", "dynamic")
_PER_TOKEN: Final = FP8_DYNAMIC.config_group["input_activations"]
_STATIC: Final = {**_PER_TOKEN, "strategy": "tensor", "dynamic": False}


class Layouts:
    """The schemes in which a source stores weights. `config` is its quantization config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Keep the config; each scheme is made once."""
        self._config = config
        self._schemes: dict[object, Scheme | None] = {}

    def scheme(self, stored: Stored, wanted: Scheme | None = None) -> Scheme | None:
        """Return the scheme in which the source stores a weight; None without such a scheme.

        If a scheme is `wanted`, return None also for a weight that is stored in another scheme.
        """
        strategy = _strategy(stored)
        block = strategy == "block" and stored.block
        also = (stored.input, stored.zeros, stored.order)
        key = (stored.format, strategy, block, stored.bits, *map(bool, also))
        if key not in self._schemes:
            group = _group(stored, self._config)
            self._schemes[key] = None if group is None else _named(group)
        scheme = self._schemes[key]
        fits = scheme is None or wanted is None or _means(scheme.config_group, wanted)
        return scheme if fits else None


def refusals(actions: list[Action]) -> list[Finding]:
    """Return an error if weights are kept as they are stored, which the output cannot declare."""
    lost = [a for a in actions if a.stored and a.as_stored and a.already is None]
    if not lost or lost[0].stored is None:
        return []
    action, storage = lost[0], lost[0].stored.described
    more = f" (and {len(lost) - 1:,} more like it)" if len(lost) > 1 else ""
    return [
        NOT_AS_STORED.finding(
            action.source.name,
            f"{action.source.name} is stored as {storage}{more}, which config.json cannot declare "
            "in the terms of compressed-tensors.",
        )
    ]


def copies(action: Action) -> Iterator[Action]:
    """Yield a copy of each tensor of a weight that stays as the source stores it.

    An action of another kind is yielded as it is.
    """
    stored = action.stored
    if action.already is None or stored is None:
        yield action
        return
    layout = _layout(stored)
    names = SUFFIXES[layout]
    named = dict(
        zip(names, (stored.codes, stored.scale, stored.second, stored.input), strict=False)
    )
    integers = {"weight_zero_point": stored.zeros, ORDER: stored.order, "weight_shape": stored.size}
    for suffix, info in {**named, **integers}.items():
        if info is not None:
            output = OutputTensor(f"{action.module}.{suffix}", _dtype(info, layout), info.shape)
            yield replace(action, source=info, stored=None, made=(output,))


def _layout(stored: Stored) -> StorageFormat:
    """Return the layout of compressed-tensors that holds a weight with the same codes."""
    if stored.format in MXFP4S:
        return StorageFormat.MXFP4
    if stored.format not in FP8S:
        return stored.format
    in_mx = stored.block == (1, MX_GROUP) and stored.scale.dtype in E8M0S
    return StorageFormat.MXFP8 if in_mx else StorageFormat.FP8


def _dtype(info: TensorInfo, layout: StorageFormat) -> str:
    """Return the dtype under which compressed-tensors stores codes or scales in a layout."""
    if layout is StorageFormat.FP8 and info.dtype in E8M0S:
        return "F32"
    bytes_ = {"F8_E8M0": "U8"} if layout in INTEGERS else {"I8": "U8", "F8_E8M0": "U8"}
    return bytes_.get(info.dtype, info.dtype)


def _strategy(stored: Stored) -> str:
    """Return what shares a scale: the whole weight, a row of it, or a block."""
    if stored.scale.shape in SCALAR:
        return "tensor"
    return "channel" if stored.block == (1, stored.shape[1]) else "block"


def _group(stored: Stored, config: Mapping[str, Any]) -> Group | None:
    """Return the config group of a weight; None if there is none, or if many fit and disagree."""
    if stored.format is StorageFormat.INT:
        return _integers(stored, config)
    if stored.format is StorageFormat.INT8:
        return _integers_in_bytes(stored, config)
    implied = _implied(stored, config)
    if implied is None or config.get("quant_method") != "compressed-tensors":
        return implied
    if stored.format is not _layout(stored):
        return implied
    fitting = [
        {**implied, "input_activations": _inputs(group.get("input_activations"))}
        for group in groups(config)
        if isinstance(weights := group.get("weights"), dict)
        and _alike(weights, implied["weights"], _KEYS)
    ]
    return fitting[0] if fitting and all(group == fitting[0] for group in fitting) else None


def _integers(stored: Stored, config: Mapping[str, Any]) -> Group | None:
    """Return the config group of packed integers: the group that is declared, if one fits alone."""
    fitting = []
    for group in groups(config):
        weights = group.get("weights")
        if not isinstance(weights, dict) or weights.get("type") != "int":
            continue
        size, symmetric = weights.get("group_size"), weights.get("symmetric") is not False
        grouped = type(size) is int and size > 0
        wide = size if grouped else stored.shape[1]
        said = (weights.get("num_bits"), wide, symmetric)
        if said == (stored.bits, stored.block[1], not stored.zeros):
            args = {
                **W4A16.config_group["weights"],
                **_words(weights, ("actorder", "zp_dtype")),
                "num_bits": stored.bits,
                "group_size": size if grouped else None,
                "strategy": "group" if grouped else "channel",
                "symmetric": symmetric,
            }
            inputs = _inputs(group.get("input_activations"))
            fitting.append({**W4A16.config_group, "weights": args, "input_activations": inputs})
    return fitting[0] if fitting and all(group == fitting[0] for group in fitting) else None


def _integers_in_bytes(stored: Stored, config: Mapping[str, Any]) -> Group | None:
    """Return the config group of integers in I8: the group that is declared, if one fits alone.

    None if activations have zero points too: mquant does not keep tensors of such points.
    """
    fitting = []
    for group in groups(config):
        weights, inputs = group.get("weights"), _inputs(group.get("input_activations"))
        if not isinstance(weights, dict) or weights.get("type") != "int":
            continue
        if inputs and inputs["symmetric"] is False and inputs["dynamic"] is not True:
            return None
        symmetric = weights.get("symmetric") is not False
        if stored.scale.shape in byte_scales(*stored.shape, weights) and symmetric is not bool(
            stored.zeros
        ):
            args = {
                **W4A16.config_group["weights"],
                "group_size": None,
                **_words(weights, (*_KEYS, "zp_dtype")),
                **({"block_structure": [*stored.block]} if _blocks(weights) else {}),
            }
            named = {"format": "int-quantized", "weights": args, "input_activations": inputs}
            fitting.append({**W4A16.config_group, **named})
    return fitting[0] if fitting and all(group == fitting[0] for group in fitting) else None


def _blocks(weights: Mapping[str, Any]) -> bool:
    return weights.get("strategy") == "block"


def _inputs(declared: object) -> Mapping[str, Any] | None:
    """Return declared arguments of activations with every key that compressed-tensors writes."""
    if not isinstance(declared, dict):
        return None
    return {**_PER_TOKEN, "dynamic": False, **_words(declared, (*_INPUTS, "symmetric", "observer"))}


def _words(declared: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return those of some arguments that are words, numbers, true or false."""
    return {key: declared[key] for key in keys if isinstance(declared.get(key), str | int)}


def _implied(stored: Stored, config: Mapping[str, Any]) -> Group | None:
    """Return the config group that says what the tensors say; None if there is none."""
    match _layout(stored):
        case StorageFormat.MXFP4:
            return MXFP4A16.config_group
        case StorageFormat.MXFP8:
            return MXFP8.config_group
        case StorageFormat.NVFP4:
            return (NVFP4 if stored.input else NVFP4A16).config_group
        case StorageFormat.FP8:
            return _fp8(stored, config)
    return None


def _fp8(stored: Stored, config: Mapping[str, Any]) -> Group | None:
    """Return the config group of FP8; None for a weight that compressed-tensors does not have."""
    strategy = _strategy(stored)
    if strategy != "block":
        weights = {**FP8_DYNAMIC.config_group["weights"], "strategy": strategy}
        inputs = _STATIC if stored.input else _PER_TOKEN
        return {**FP8_DYNAMIC.config_group, "weights": weights, "input_activations": inputs}
    if stored.block[0] == 1 or stored.input or config.get("activation_scheme") == "static":
        return None  # compressed-tensors has no blocks with static activations, nor with one row
    weights = {**FP8_BLOCK.config_group["weights"], "block_structure": [*stored.block]}
    inputs = {**FP8_BLOCK.config_group["input_activations"], "group_size": stored.block[1]}
    return {**FP8_BLOCK.config_group, "weights": weights, "input_activations": inputs}


def _means(group: Group, wanted: Scheme) -> bool:
    """Return whether a weight in `group` is what a recipe wants that names a scheme.

    Integers of 4 bits are W4A16 in groups of any size, with zero points or without.
    """
    weights, inputs = wanted.config_group["weights"], wanted.config_group["input_activations"]
    keys = ("num_bits", "type") if wanted.format == "pack-quantized" else _KEYS
    return (
        group["format"] == wanted.format
        and _alike(group["weights"], weights, keys)
        and _alike(group["input_activations"] or {}, inputs or {}, _INPUTS)
    )


def _alike(args: Mapping[str, Any], others: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    defaults = {"symmetric": True, "dynamic": False}
    return all(
        (args.get(key, defaults.get(key)) or None) == (others.get(key, defaults.get(key)) or None)
        for key in keys
    )


def _named(group: Group) -> Scheme:
    """Return the scheme of a config group: a known one, or one with a name that says its keys."""
    for scheme in KNOWN:
        if scheme.config_group == group:
            return scheme
    weights, inputs = group["weights"], group["input_activations"]
    block, size = weights["block_structure"], weights["group_size"]
    shared = "x".join(map(str, block)) if block else size
    words = [
        f"{'INT' if weights['type'] == 'int' else 'FP'}{weights['num_bits']}",
        f"{weights['strategy']} {shared or ''}".strip(),
        "" if weights["symmetric"] else "asymmetric",
        f"{'dynamic' if inputs['dynamic'] else 'static'} inputs" if inputs else "plain inputs",
    ]
    rows = block[0] if block else 1
    return Scheme(", ".join(filter(None, words)), (), dict(group), rows=rows)
