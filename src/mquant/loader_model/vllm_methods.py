"""The names of quantization methods, formats and strategies (`vllm_methods.yaml`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mquant.data_files import read_yaml

_DATA: Final = read_yaml(Path(__file__).with_suffix(".yaml"))
METHODS: Final = frozenset(_DATA["names"])
"""The methods that vLLM has."""
INSTEAD: Final[Mapping[str, Mapping[str, str]]] = _DATA["instead"]
"""model_type -> a method in config.json, and the method that vLLM takes instead."""
FORMATS: Final[Mapping[str, str | None]] = _DATA["formats"]
"""The formats that compressed-tensors has, and the short name of the storage format of each."""
STRATEGIES: Final = _DATA["strategies"]
"""The strategies that compressed-tensors has."""
