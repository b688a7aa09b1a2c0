"""A family file says what differs from another family; inner models have names with a prefix."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mquant.errors import DataFileError
from mquant.family import Family
from mquant.family_files import family_of, load_families, load_family

QWEN = load_families()["qwen3_moe"]
NAME = "model.layers.3.mlp.experts.7.up_proj.weight"
NESTED = {
    "model_type": "mine",
    "text_config": {"num_hidden_layers": 3, "tie_word_embeddings": True},
}


def family(tmp_path: Path, **content: Any) -> Family:
    """Return the family of a file that is like Qwen3-MoE but for `content`."""
    path = tmp_path / "mine.yaml"
    synth = {"config": {**QWEN.synth.config, "model_type": "mine"}}
    own = {"like": "qwen3_moe", "name": "mine", "model_types": ["mine"], "synth": synth, **content}
    path.write_text(yaml.safe_dump(own))
    return load_family(path)


def test_all_that_a_file_does_not_say_is_that_of_the_other_family(tmp_path: Path) -> None:
    mine = family(tmp_path, title="Mine")

    assert (mine.name, mine.title, mine.model_types) == ("mine", "Mine", ("mine",))
    assert mine.tensors == QWEN.tensors
    assert mine.synth.tiny == QWEN.synth.tiny


def test_rows_replace_rows_of_their_name_and_others_follow(tmp_path: Path) -> None:
    gate = {"name": "model.layers.{layer}.mlp.gate.weight", "role": "router", "dtype": "F32"}
    new = {"name": "model.layers.{layer}.mlp.gate.bias", "role": "routing_bias"}
    mine = family(tmp_path, tensors=[new, gate])

    place = [row.name for row in QWEN.tensors].index(gate["name"])
    assert mine.tensors[place].dtype == "F32"
    assert [row.name for row in mine.tensors[len(QWEN.tensors) :]] == [new["name"]]


def test_rows_can_be_left_out(tmp_path: Path) -> None:
    mine = family(tmp_path, without=["*.self_attn.?_norm*"])

    left_out = {row.name for row in QWEN.tensors} - {row.name for row in mine.tensors}
    assert left_out == {f"model.layers.{{layer}}.self_attn.{x}_norm.weight" for x in "qk"}
    assert mine.vllm
    assert not [row for row in mine.vllm.layers if "_norm" in row.name.rpartition(".")[2][:6]]


def test_words_of_the_other_family_are_replaced(tmp_path: Path) -> None:
    replacing = {"num_experts": "n_routed_experts", ".mlp.": ".moe."}
    synth = {"config": {**QWEN.synth.config, "model_type": "mine", "n_routed_experts": 128}}
    mine = family(tmp_path, replacing=replacing, synth=synth)

    assert mine.config.experts == "n_routed_experts"
    assert mine.config.top_k == "num_experts_per_tok"
    assert mine.classify(NAME) is None
    assert mine.classify(NAME.replace(".mlp.", ".moe."))


def test_null_takes_a_key_away(tmp_path: Path) -> None:
    assert family(tmp_path, forward=None).forward is None
    assert "dense" not in family(tmp_path, blocks={"dense": None}, without=["*.mlp.*_proj*"]).blocks


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"like": "nothing"}, "mine.yaml: like: 'nothing' is none of "),
        ({"like": "../x"}, "mine.yaml: like: '../x' is none of "),
        (
            {"without": "x"},
            "mine.yaml: `replacing` is a table of texts, `without` is a list of names.",
        ),
        ({"replacing": {"": "x"}}, "mine.yaml: `replacing` is a table of texts"),
        ({"like": None, "without": ["x"]}, "mine.yaml: `replacing` and `without` need `like`."),
    ],
)
def test_a_file_that_is_like_nothing_is_refused(
    tmp_path: Path, content: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataFileError) as caught:
        family(tmp_path, **content)
    assert caught.value.message.startswith(sentence)


def test_the_keys_of_a_text_model_are_in_a_nested_table(tmp_path: Path) -> None:
    mine = family(tmp_path, nested="text_config")

    assert mine.value("num_hidden_layers", NESTED) == 3
    assert mine.tied_heads(NESTED) == ("lm_head",)
    assert mine.with_settings(NESTED, {"num_hidden_layers": 9, "model_type": "x"}) == {
        "model_type": "x",
        "text_config": {"num_hidden_layers": 9, "tie_word_embeddings": True},
    }


def test_a_model_inside_a_larger_one_has_its_names_with_a_prefix(tmp_path: Path) -> None:
    wrapping = {
        "names": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        "in_vllm": [["language_model.", "inner."]],
    }
    mine = family(tmp_path, wrapped=[wrapping])
    inside = family_of({"model_type": "mine"}, {"mine": mine}, {"language_model.model.norm.weight"})

    assert inside
    role = inside.classify(f"language_model.{NAME}")
    assert role
    assert (role.layer, role.expert, role.name) == (3, 7, f"language_model.{NAME}")
    assert inside.classify(NAME) is None
    assert inside.in_vllm_name(role.name) == f"inner.{NAME}"
    assert family_of({"model_type": "mine"}, {"mine": mine}, {"model.norm.weight"}) is mine


def test_a_larger_model_that_no_family_names_has_the_family_of_its_text_model(
    tmp_path: Path,
) -> None:
    mine = family(tmp_path, nested="text_config")
    other = {"model_type": "larger", "text_config": {"model_type": "mine"}}

    assert family_of(other, {"qwen3_moe": QWEN, "mine": mine}) is mine
    assert family_of({**other, "model_type": "qwen3_moe"}, {"mine": mine, "q": QWEN}) is QWEN
    assert family_of(other, {"mine": family(tmp_path)}) is None


def test_a_row_stands_for_all_tensors_below_a_prefix(tmp_path: Path) -> None:
    mine = family(tmp_path, tensors=[{"name": "model.visual.*", "role": "vision"}])
    role = mine.classify("model.visual.blocks.0.attn.qkv.weight")

    assert role
    assert role.name == "model.visual.blocks.0.attn.qkv.weight"
    assert role.row.role == "vision"
    assert mine.classify("model.visuals.x") is None
    assert mine.may_lack(mine.tensors[-1], {})


def test_digits_of_a_name_stand_for_themselves(tmp_path: Path) -> None:
    rows = [
        {"name": f"model.layers.{{layer}}.self_attn.{number}.q_proj.weight", "role": "attention"}
        for number in (0, 1)
    ]
    mine = family(tmp_path, tensors=rows)
    role = mine.classify("model.layers.5.self_attn.1.q_proj.weight")

    assert role
    assert (role.layer, role.expert, role.row.name) == (5, None, rows[1]["name"])
    assert mine.classify("model.layers.5.self_attn.2.q_proj.weight") is None
