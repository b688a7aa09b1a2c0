"""Sizes, conditions and names in a family file are evaluated; malformed ones are refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mquant.data_files import folder
from mquant.errors import DataFileError
from mquant.family_files import load_families, load_family

FAMILIES = load_families()
KEYS: dict[str, Any] = {
    "a": 6,
    "b": 4,
    "zero": 0,
    "listed": [1, 3],
    "null": None,
    "yes": True,
    "kinds": ["full", "linear", "full", "linear", "full", "linear"],
    "pattern": "M-E*M-",
    "flags": [0, 1, 1, 0, 1],
    "heads": [8, 8, 4, 4, 2, 2],
    "inner": {"first_is_1": [1, 4], "size": 5},
    "written": "1,2, 5",
}


def complaint(tmp_path: Path, key: str, value: object) -> str:
    """Return the message of the error that a family file with another `key` raises."""
    shipped = yaml.safe_load((folder("configs") / "llama.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**shipped, key: value}))
    with pytest.raises(DataFileError) as caught:
        load_family(path)
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a", 6),
        ("12", 12),
        ("a * b", 24),
        ("a * b + a * 2", 36),
        ("a + b / 2", 8),
        ("a * b / 3", 8),
        ("a / b", None),
        ("a / zero", None),
        ("a + absent", None),
        ("a * null", None),
        ("yes", None),
        ("len(kinds) + len(pattern)", 12),
        ("len(a)", None),
        ("inner.size * 2", 10),
        ("inner.none", None),
        ("a.size", None),
    ],
)
def test_a_size_is_a_sum_of_products(text: str, value: int | None) -> None:
    family = FAMILIES["llama"].model_copy(update={"defaults": {"made": text}})

    assert family.value("made", KEYS) == value


@pytest.mark.parametrize(
    "text", ["", "a*b", "a - b", "a +", "(a + b)", "a ** b", "1a", "a; b", " a", "a[b]", "len(a"]
)
def test_a_malformed_size_is_refused(tmp_path: Path, text: str) -> None:
    assert "is no sum of products" in complaint(tmp_path, "defaults", {"made": text})


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("layer < b", [0, 1, 2, 3]),
        ("layer < 1", [0]),
        ("layer >= b", [4, 5]),
        ("layer in listed", [1, 3]),
        ("layer not in listed", [0, 2, 4, 5]),
        ("layer in absent", []),
        ("layer not in absent", [0, 1, 2, 3, 4, 5]),
        ("layer in a", []),
        ("layer < absent", []),
        ("layer >= yes", []),
        ("yes", [0, 1, 2, 3, 4, 5]),
        ("null", []),
        ("absent", []),
        ("zero", []),
        ("not null", [0, 1, 2, 3, 4, 5]),
        ("layer >= 2 and layer < b and yes", [2, 3]),
        ("layer >= 2 and not yes", []),
        ("kinds[layer] is linear", [1, 3, 5]),
        ("pattern[layer] is *", [3]),
        ("pattern[layer] is M or pattern[layer] is E", [0, 2, 4]),
        ("flags[layer]", [1, 2, 4]),
        ("not flags[layer]", [0, 3, 5]),
        ("heads[layer] is 4", [2, 3]),
        ("absent[layer] is linear", []),
        ("not absent and 2 divides layer + 1", [1, 3, 5]),
        ("b divides layer - 1", [1, 5]),
        ("b divides layer + 1 - 2", [1, 5]),
        ("b divides layer - absent", []),
        ("not b divides layer - 1", [0, 2, 3, 4]),
        ("not kinds[layer] is linear", [0, 2, 4]),
        ("not b is 4 and yes", []),
        ("not b is 5", [0, 1, 2, 3, 4, 5]),
        ("layer + 1 in inner.first_is_1", [0, 3]),
        ("layer in written", [1, 2, 5]),
        ("layer < inner.size", [0, 1, 2, 3, 4]),
    ],
)
def test_a_condition_selects_layers(text: str, layers: list[int]) -> None:
    family = FAMILIES["llama"].model_copy(update={"blocks": {"some": text}})

    assert [layer for layer in range(6) if family.has_block("some", layer, KEYS)] == layers


def test_a_condition_without_a_layer_depends_on_config_json_alone() -> None:
    blocks = {"some": "layer < absent and yes", "none": "layer < a and null"}
    family = FAMILIES["llama"].model_copy(update={"blocks": blocks})

    assert family.has_block("some", None, KEYS) is True
    assert family.has_block("none", None, KEYS) is False
    assert family.has_block("unnamed", None, KEYS) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "layer > a",
        "layer",
        "layer < ",
        "a or",
        "a and",
        "not not a",
        "layer < a + b",
        "layer[layer]",
        "a is",
        "a[b] is c",
    ],
)
def test_a_malformed_condition_is_refused(tmp_path: Path, text: str) -> None:
    assert "is no condition" in complaint(tmp_path, "blocks", {"some": text})


def test_a_default_stands_below_the_defaults_that_it_refers_to(tmp_path: Path) -> None:
    message = complaint(tmp_path, "defaults", {"a": "b * 2", "b": "hidden_size"})

    assert message == "mine.yaml: defaults: a refers to b, which must stand above a."


def test_smoothing_names_only_modules_of_the_family(tmp_path: Path) -> None:
    message = complaint(tmp_path, "smoothing", {"input_layernorm": ["q_proj", "x_proj"]})

    assert message == "mine.yaml: smoothing: there is no module x_proj."


def test_a_size_may_differ_from_layer_to_layer() -> None:
    family = FAMILIES["llama"]
    row = family.tensors[0].model_copy(update={"shape": ("heads[layer] * 2", "a")})

    assert [family.shape(row, KEYS, layer) for layer in (0, 5)] == [(16, 6), (4, 6)]
    assert family.shape(row, KEYS, 6) is None
    assert row.varies


def test_a_row_has_another_shape_in_the_layers_of_a_block() -> None:
    family = FAMILIES["llama"].model_copy(update={"blocks": {"linear": "kinds[layer] is linear"}})
    row = family.tensors[0].model_copy(update={"shape": ("a",), "shapes": {"linear": ("b",)}})

    assert [family.shape(row, KEYS, layer) for layer in (0, 1)] == [(6,), (4,)]
