"""The quantization configs of which it is known what vLLM builds (`vllm_methods.yaml`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mquant.data_files import read_yaml
from mquant.loader_model.modules import ModuleView
from mquant.loader_model.storage import block_of, format_of

_DATA: Final = read_yaml(Path(__file__).with_suffix(".yaml"))
METHODS: Final = frozenset(_DATA["names"])
"""The methods that vLLM has."""
KNOWN_METHODS: Final = frozenset(_DATA["methods"])
"""The methods of which some configs are known."""
FORMATS: Final[Mapping[str, str | None]] = _DATA["formats"]
"""The formats that compressed-tensors has, and the short name of the storage format of each."""
STRATEGIES: Final = _DATA["strategies"]
"""The strategies that compressed-tensors has."""

_KINDS: Final[Mapping[object, type]] = {"anything": object, "a text": str, "a table": dict}


def unknown_config(view: ModuleView) -> str:
    """Why it is not known what vLLM builds of the quantization config, as a clause; or empty.

    Empty also if nothing is known of the method.
    """
    if view.method not in KNOWN_METHODS:
        return ""
    configs = _DATA["methods"][view.method]
    known = min(configs, key=lambda each: len(_unlike(view.config, each["config"])))
    unlike = _unlike(view.config, known["config"])
    if unlike:
        return f"what vLLM makes of {unlike[0][:40]!r} in the quantization config is not known"
    declared = {known["stores"]} if "stores" in known else _stored_by_groups(view.config)
    stored = {str(storage) for each in view.quantized if (storage := format_of(view, each))}
    lost = view.checkpoint.lost_shards or not stored
    if not stored <= declared or not (lost or declared <= stored):
        formats = " and ".join(sorted(stored))
        return f"what vLLM makes of {formats} under this quantization config is not known"
    return ""


def _stored_by_groups(config: Mapping[str, Any]) -> set[str]:
    """The storage format of each group of compressed-tensors; empty for a group not known."""
    groups = config.get("config_groups")
    return {
        next((name for name, known in _DATA["groups"].items() if _fits(group, known)), "")
        for group in (groups.values() if isinstance(groups, dict) else ())
    }


def _unlike(config: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Return the keys that are not known, or whose values are not."""
    known = {**_DATA["tables"].get(known.get("like"), {}), **known}
    keys = (key for key in {**known, **config} if key != "like" or key in config)
    return [key for key in keys if key not in known or not _fits(config.get(key), known[key])]


def _fits(value: object, known: object) -> bool:
    match known:
        case "a block":
            return block_of(value) is not None
        case str() if known in _KINDS:
            return isinstance(value, _KINDS[known])
        case list():
            return any(_fits(value, each) for each in known)
        case dict():
            return isinstance(value, dict) and not _unlike(value, known)
    return type(value) is type(known) and value == known
