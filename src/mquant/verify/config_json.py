"""Judge whether config.json has the keys that loaders need, and describes the tensors."""

from collections.abc import Iterator
from typing import Any, Final

from mquant.findings import rule
from mquant.loader_model.modules import ModuleView
from mquant.loader_model.storage import StorageFormat, groups, misdeclared
from mquant.loader_model.vllm_methods import FORMATS, METHODS, STRATEGIES
from mquant.text import names
from mquant.verify.parts import Kinds
from mquant.verify.tally import Tally

CONFIG_KEY_MISSING: Final = rule(
    "config-key-missing",
    "config.json has the keys without which engines do not build the model.",
    "vLLM and SGLang stop when they load the model.",
    "Take the key from config.json of the original release.",
    as_fact="warning",
    if_loads="nothing",
)
QUANTIZATION_UNUSED: Final = rule(
    "quantization-unused",
    "If config.json declares a quantization, some tensors are quantized.",
    "Loaders expect scales that are missing.",
    "Remove quantization_config from config.json, or get the quantized shards.",
    severity="warning",
)
QUANTIZATION_CONFIG_INVALID: Final = rule(
    "quantization-config-invalid",
    "Loaders can parse the quantization_config.",
    "vLLM stops at a value it cannot parse.",
    "Take the quantization_config that the tool wrote.",
    if_loads="nothing",
)
WEIGHTS_MISDECLARED: Final = rule(
    "weights-misdeclared",
    "The type, bits and group size in config_groups are those of the tensors.",
    "vLLM chooses the kernel by these keys: vLLM stops, or expects other shapes.",
    "Take the quantization_config that the tool wrote.",
    knowing=("layout",),
    if_loads="warning",
)
LAYOUT_NOT_JUDGED: Final = rule(
    "layout-not-judged",
    "mquant knows the layout of the quantized modules.",
    "Neither parts nor numbers of other layouts (GPTQ, AWQ) can be judged.",
    "mquant knows NVFP4, MXFP4, FP8, MXFP8, INT8 and packed integers, under the names of "
    "compressed-tensors, ModelOpt and releases.",
    severity="warning",
)
FORMAT_DIFFERS: Final = rule(
    "format-differs",
    "The declared format is the format of the tensors.",
    "vLLM follows the tensors; tools that unpack by the declared format fail.",
    "Set format in quantization_config to what the tensors are.",
    severity="warning",
    knowing=("layout",),
)


def check_config_json(view: ModuleView, kinds: Kinds, tally: Tally) -> None:
    """Judge config.json alone, and compare config.json with the tensors."""
    config = view.checkpoint.config
    for key in ("architectures", *(view.family.required_config if view.family else ())):
        if key not in config:
            tally.add(CONFIG_KEY_MISSING, "config.json", f"config.json has no {key}")
    if view.method and not kinds and not view.checkpoint.lost_shards:
        tally.add(
            QUANTIZATION_UNUSED,
            "config.json",
            f"config.json declares {view.method[:40]!r}, but no tensor is quantized",
        )
    other = [name for name, kind in kinds.items() if kind is StorageFormat.OTHER]
    if other:
        tally.add(
            LAYOUT_NOT_JUDGED,
            other[0],
            f"mquant does not know the layout of {names(other)}: neither parts nor numbers were "
            "judged",
        )
    for why in _invalid(view):
        tally.add(QUANTIZATION_CONFIG_INVALID, "config.json", f"quantization_config {why}")
    if view.method == "compressed-tensors":
        for kind in dict.fromkeys(kinds.values()):
            if stated_formats := misdeclared(kind, view):
                name = next(name for name in kinds if kinds[name] is kind)
                tally.add(
                    WEIGHTS_MISDECLARED,
                    "config.json",
                    f"config_groups of config.json say {stated_formats}, but {name} is "
                    f"{kind.short}",
                )
        formats = {str(group["format"]) for group in groups(view.config) if group.get("format")}
        declared = formats or {str(view.config.get("format"))}
        expected = {FORMATS.get(stated) for stated in declared}
        wrong = {name: kind for name, kind in kinds.items() if kind.short not in expected}
        if wrong and None not in expected:
            name, kind = next(iter(wrong.items()))
            stated_formats = " and ".join(repr(stated) for stated in sorted(declared))
            tally.add(
                FORMAT_DIFFERS,
                "config.json",
                f"config.json says format {stated_formats}, but {name} is {kind.short}",
            )


def _invalid(view: ModuleView) -> Iterator[str]:
    """Yield why no loader could parse the quantization config, as ends of sentences."""
    stated = view.checkpoint.config.get("quantization_config")
    if stated is not None and not isinstance(stated, dict):
        yield "is no table of keys"
        return
    if isinstance(stated, dict) and not isinstance(stated.get("quant_method"), str):
        yield "has no quant_method"
    elif isinstance(stated, dict) and view.method.lower() not in METHODS:  # as vLLM reads it
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
    if named is not None and (not isinstance(named, str) or named not in FORMATS):
        return f"has the unknown format {str(named)[:40]!r}"
    if args is None:
        return ""
    if not isinstance(args, dict) or type(args.get("num_bits")) is not int:
        return "does not say how many bits weights have"
    if args.get("strategy") not in (None, *STRATEGIES):
        return f"has the unknown strategy {str(args['strategy'])[:40]!r}"
    return ""
