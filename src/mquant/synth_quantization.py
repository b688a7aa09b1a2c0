"""What config.json of a synthetic checkpoint says of quantized weights, as releases say it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from mquant.family import Family
from mquant.family_rows import EVERY_LAYER, Role, TensorRow
from mquant.loader_model.storage import MX_GROUP
from mquant.synth_formats import FP8_BLOCK, PLAIN, Precision, is_quantized
from mquant.synth_tower import tower_tensors


def quantization(
    precision: Precision, family: Family, config: Mapping[str, Any], layers: int
) -> dict[str, Any]:
    """Return the quantization config of releases; empty if the precision is a dtype."""
    if precision in PLAIN:
        return {}
    family = family.named_for(config)
    released = family.synth.formats.get(precision)
    if released and released.config:
        return _in_layers(released.config, family, config, layers)
    if precision is Precision.MXFP4_BLOCKS:
        patterns = _kept_patterns(precision, family, config, layers)
        return {"modules_to_not_convert": patterns, "quant_method": "mxfp4"}
    if precision in _COMPRESSED:
        return _compressed(precision, _kept_patterns(precision, family, config, layers))
    if precision is Precision.MXFP8:
        kept = _kept_globs(_kept_rows(precision, family, config, layers), family, config)
        return {"ignored_layers": kept, "quant_method": "mxfp8"}
    kept = _not_converted(family, config, layers)
    table: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": kept,
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }
    if precision is Precision.FP8_TENSOR:
        table |= {"activation_scheme": "static", "weight_block_size": None}
    if precision is Precision.MXFP4_FP8:
        table["scale_fmt"] = "ue8m0"
        del table["modules_to_not_convert"]
    return table


def _in_layers(
    released: Mapping[str, Any], family: Family, config: Mapping[str, Any], layers: int
) -> dict[str, Any]:
    """Return a release's quantization config, with entries for the layers of a config.json."""

    def entries(entry: str) -> Iterator[str]:
        for layer in range(layers) if "{layer}" in entry else (None,):
            name = entry.replace("{layer}", str(layer))
            meaning = family.classify(f"{name}.weight")
            block = meaning.row.block if meaning else EVERY_LAYER
            if family.has_block(block, layer, config) is not False:
                yield name

    return {
        key: [name for entry in value for name in entries(str(entry))]
        if isinstance(value, list) and any("{layer}" in str(entry) for entry in value)
        else value
        for key, value in released.items()
    }


_INT: Final = {"group_size": MX_GROUP, "strategy": "group", "symmetric": True, "type": "int"}
_COMPRESSED: Final[dict[Precision, tuple[str, dict[str, Any], dict[str, Any] | None]]] = {
    Precision.MXFP4: (
        "mxfp4-pack-quantized",
        {**_INT, "num_bits": 4, "scale_dtype": "torch.uint8", "type": "float"},
        None,
    ),
    Precision.INT4: ("pack-quantized", {**_INT, "num_bits": 4}, None),
    Precision.INT8: ("pack-quantized", {**_INT, "num_bits": 8}, None),
    Precision.FP8_CHANNEL: (
        "float-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"},
        {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "float"},
    ),
    Precision.INT8_CHANNEL: (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "int"},
        {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "int"},
    ),
}
"""The format, the weights and the input activations of compressed-tensors' group."""


def _compressed(precision: Precision, ignore: list[str]) -> dict[str, Any]:
    named, weights, inputs = _COMPRESSED[precision]
    group = {
        "format": named,
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": {"dynamic": False, **weights},
    }
    return {
        "config_groups": {"group_0": group},
        "format": named,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _kept_rows(
    precision: Precision, family: Family, config: Mapping[str, Any], layers: int
) -> list[TensorRow]:
    """Return the rows of matrices that are not quantized."""
    others = (Role.EMBEDDING, Role.ROUTER, Role.HEAD)
    return [
        row
        for row in family.tensors
        if (row.role in others or (row.role.linear and not is_quantized(precision, family, row)))
        and not family.may_lack(row, config)
        and any(family.has_block(row.block, n, config) is not False for n in range(layers))
    ]


def _kept_patterns(
    precision: Precision, family: Family, config: Mapping[str, Any], layers: int
) -> list[str]:
    """Return `re:` patterns of the modules that are kept, under every name of loaders."""
    rows = _kept_rows(precision, family, config, layers)
    if any(tower_tensors(family, config)):
        rows += [row for row in family.tensors if row.role is Role.VISION]
    named = (each for row in rows for each in row.patterns(*family.looked_up_by))
    return list(dict.fromkeys(named))


def _kept_globs(rows: Iterable[TensorRow], family: Family, config: Mapping[str, Any]) -> list[str]:
    """Return globs of the modules that are kept, under every name of loaders."""
    modules = [row.name.removesuffix(".weight").replace("{layer}", "*") for row in rows]
    modules += [tensor.name.removesuffix(".weight") for tensor in tower_tensors(family, config)]
    return list(dict.fromkeys(rename(each) for each in modules for rename in family.looked_up_by))


def _not_converted(family: Family, config: Mapping[str, Any], layers: int) -> list[str]:
    """Return the modules that FP8 releases keep, named as in those releases.

    A name is the last part alone. If vLLM asks the list for a module, which takes whole names, the
    module is named in every layer. Modules outside the text model are named one by one.
    """
    kept = (Role.ROUTER, Role.ROUTING_BIAS, Role.HEAD)
    modules = [row.name.removesuffix(".weight") for row in family.tensors if row.role in kept]
    rows = family.vllm.layer_rows if family.vllm else ()
    asked = {row.name for row in rows if row.heeds and row.kind != "bare"}
    names = (
        [module.replace("{layer}", str(layer)) for layer in range(layers)]
        if module in asked
        else [module.rpartition(".")[2]]
        for module in modules
    )
    tower = [
        each.name.removesuffix(".weight") for each in tower_tensors(family, config) if each.linear
    ]
    return list(dict.fromkeys([*(name for group in names for name in group), *tower]))
