"""Where config.json says how a checkpoint is quantized."""

from collections.abc import Mapping
from typing import Any, Final

from mquant.checkpoint import Checkpoint

_PLACES: Final = ("quantization_config", "compression_config")


def declared_config(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """Return config.json's quantization config; None if it is missing, or no table of keys.

    The places are those of vLLM 0.32 (`get_quant_config`), in its order.
    """
    config = checkpoint.config
    nested = config.get("text_config")
    first, last = _PLACES
    places = (
        config.get(first),
        nested.get(first) if isinstance(nested, dict) else None,
        config.get(last),
    )
    declared = next((each for each in places if each is not None), None)
    return declared if isinstance(declared, dict) else None


def undeclared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without its quantization config, wherever `declared_config` finds it."""
    plain = {key: value for key, value in config.items() if key not in _PLACES}
    nested = config.get("text_config")
    if isinstance(nested, dict) and _PLACES[0] in nested:
        plain["text_config"] = {key: value for key, value in nested.items() if key != _PLACES[0]}
    return plain
