"""The model that vLLM builds of a config.json, by the names there."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from mquant.data_files import read_yaml
from mquant.family_files import load_families
from mquant.loader_model.vllm.config_types import said
from mquant.loader_model.vllm.tensors import LoadRefused, Unknown
from mquant.loader_rows import VllmRows

_FILE: Final = "config.json"


def built_as(config: Mapping[str, Any], read_as: VllmRows | None) -> VllmRows:
    """Return what vLLM builds: by `architectures`, or by the model_type without architectures.

    `read_as` are the rows of the model_type's family; None if mquant knows no such family. Raises
    LoadRefused for names that vLLM does not know, and Unknown for those that mquant does not know.
    """
    kind, named = config.get("model_type"), config.get("architectures")
    if read_as is None:
        if isinstance(kind, str) and kind in _known()["model_types"]:
            raise Unknown(f"model_type {said(kind)}")
        if config.get("auto_map"):
            raise Unknown(f"model_type {said(kind)}, whose code is in the repo")
        raise LoadRefused(_FILE, f"says model_type {said(kind)}, which vLLM does not know")
    if kind in read_as.lacks:  # no fault of config.json
        raise Unknown(f"model_type {said(kind)}, which vLLM does not have")
    if not named:
        if read_as.needs_architectures:
            raise LoadRefused(_FILE, "names no architectures")
        if read_as.wrapped:
            raise Unknown("config.json without architectures")
        return read_as
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise LoadRefused(_FILE, f"says architectures {said(named)}, not a list of names")
    if named[0] in read_as.every_architecture:
        return read_as
    shipped = (family.vllm for family in load_families().values())
    other = next((r for r in shipped if r and named[0] in r.every_architecture), None)
    if other is not None:
        return other
    # vLLM may take the class of another task, or build transformers' class of the model_type.
    like = {*map(_stem, _known()["architectures"]), str(kind).replace("_", "")}
    if not like.isdisjoint(map(_stem, named)):
        raise Unknown(f"architectures {said(named)}")
    if not any(name in _known()["architectures"] for name in named):
        raise LoadRefused(_FILE, f"says architectures {said(named)}, which vLLM does not know")
    raise Unknown(f"architectures {said(named)}")


def _stem(architecture: str) -> str:
    """Return the name of an architecture without its task: `qwen3` of `Qwen3ForCausalLM`."""
    return architecture.partition("For")[0].lower()


def config_class(kind: Any) -> VllmRows | None:
    """Return how transformers reads a model_type that no family has; None if it is not told."""
    read = _classes().get(kind) if isinstance(kind, str) else None
    return None if read is None else VllmRows(**{"architectures": (), "layers": (), **read})


def is_proven(config: Mapping[str, Any]) -> bool:
    """Return whether it is known what vLLM builds of a config.json in another model's config class.

    The class has other attributes and defaults, so config.json must have every key of the released
    config.json of the architecture. scripts/prove_config_classes.py asks vLLM about each pair of
    model_type and architecture.
    """
    kind, named = config.get("model_type"), config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    if not is_known_pair(first, kind):
        return False
    return any(
        _has_keys(config, family.synth.config)
        for family in load_families().values()
        if family.vllm and first in family.vllm.every_architecture
    )


def is_known_pair(architecture: Any, model_type: Any) -> bool:
    """Return whether vLLM was asked about an architecture under a model_type, and did as told."""
    return isinstance(architecture, str) and model_type in _pairs().get(architecture, ())


def _has_keys(config: Any, released: Mapping[str, Any]) -> bool:
    """Return whether a table has the keys of a released table, and so have the tables inside."""
    return isinstance(config, Mapping) and all(
        key in config and (not isinstance(value, Mapping) or _has_keys(config[key], value))
        for key, value in released.items()
    )


@cache
def _pairs() -> Mapping[str, list[str]]:
    return read_yaml(Path(__file__).with_name("config_pairs.yaml"))


@cache
def _classes() -> Mapping[str, Any]:
    return read_yaml(Path(__file__).with_name("config_classes.yaml"))


@cache
def _known() -> Mapping[str, frozenset[str]]:
    data = read_yaml(Path(__file__).with_name("known_names.yaml"))
    return {key: frozenset(map(str, names)) for key, names in data.items()}
