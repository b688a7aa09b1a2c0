"""Helpers of the tests of what vLLM and transformers say of a config.json."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from family_cases import DEEP
from mquant.family_files import load_families
from mquant.loader_model.vllm.config_names import built_as
from mquant.loader_model.vllm.config_stage import check
from mquant.loader_model.vllm.tensors import LoadRefused, Unknown
from mquant.loader_rows import Settings

FAMILIES = load_families()
DROP = object()


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """Return a family's config.json with changes; a value DROP leaves the key out."""
    synth = FAMILIES[family].synth
    assert synth is not None
    config = copy.deepcopy({**synth.config, **synth.tiny}) | changes
    return {key: value for key, value in config.items() if value is not DROP}


def judge(family: str, **changes: Any) -> str:
    """Return `taken`, or the reason why config.json is refused or not judged."""
    config, read_as = config_of(family, **changes), FAMILIES[family].vllm
    try:
        rows = built_as(config, read_as)
        check(Settings(rows, config, read_as), rows)
    except LoadRefused as stop:
        return f"refused: {stop.why}"
    except Unknown as gap:
        return f"unknown: {gap}"
    return "taken"


def each_family(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for the families of DEEP: the others are judged by the differential test."""
    names = [name for name in DEEP if FAMILIES[name].vllm]
    marked: Callable[..., None] = pytest.mark.parametrize("family", names)(test)
    return marked
