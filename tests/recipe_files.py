"""Functions that write and load recipe files, for the tests of recipes."""

from pathlib import Path

import pytest

from mquant.errors import DataFileError
from mquant.recipe import Recipe, load_recipe
from mquant.schemes import SCHEMES as KNOWN

SCHEMES = ", ".join(KNOWN)
OURS = "name: mine\nsuffix: MINE\nroles: {expert: NVFP4A16}\n"


def written(tmp_path: Path, text: str, name: str = "mine.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def loaded(tmp_path: Path, text: str) -> Recipe:
    return load_recipe(written(tmp_path, text))


def foreign(tmp_path: Path, modifier: str) -> Recipe:
    """Load a recipe of llmcompressor with the modifier `modifier`, a YAML flow mapping."""
    return loaded(
        tmp_path, f"quant_stage: {{quant_modifiers: {{QuantizationModifier: {modifier}}}}}"
    )


def complaint(tmp_path: Path, text: str) -> tuple[str, str]:
    with pytest.raises(DataFileError) as caught:
        loaded(tmp_path, text)
    return caught.value.message, caught.value.fix
