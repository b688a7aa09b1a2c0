"""generation_config.json: how the model's makers recommend to sample."""

from typing import Final

from mquant.checkpoint import Source, read_json

GENERATION: Final = "generation_config.json"
SAMPLING_KEYS: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Sampling keys that a server also accepts in a request."""
_KEYS: Final = ("do_sample", *SAMPLING_KEYS, "max_new_tokens")
_MOST: Final = 1e9


def read_sampling(source: Source) -> dict[str, float | bool]:
    """Return the sampling settings of generation_config.json, the most important first."""
    if GENERATION not in source.files:
        return {}
    recommended = read_json(source, GENERATION)
    return {
        key: recommended[key]
        for key in _KEYS
        if isinstance(recommended.get(key), bool | int | float) and abs(recommended[key]) < _MOST
    }
