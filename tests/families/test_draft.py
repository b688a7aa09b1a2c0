"""`mquant families draft` and `mquant families check --against`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from mquant.checkpoint import Folder, open_checkpoint
from mquant.cli.app import app
from mquant.family import Family
from mquant.family_draft import draft_family
from mquant.family_draft.blocks import condition_of
from mquant.family_files import family_of, load_families, load_family
from mquant.family_rows import DRAFTS, Role
from mquant.loader_model.stacks import unstacked
from mquant.synth import synth

FAMILIES = load_families()
TOLD = (Role.ROUTER, Role.ROUTING_BIAS, Role.EMBEDDING, Role.HEAD, Role.EXPERT, Role.SHARED_EXPERT)
Drafted = tuple[Path, Path, Family]


def mquant(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Drafted]:
    """Return a function: name of a family -> its tiny checkpoint, the draft's file, the draft."""
    made: dict[str, Drafted] = {}

    def get(name: str) -> Drafted:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            src = synth(folder / "src", FAMILIES[name]).path
            file = folder / "drafted.yaml"
            file.write_text(draft_family(open_checkpoint(Folder(src))).text)
            made[name] = (src, file, load_family(file))
        return made[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_a_draft_names_every_tensor_and_knows_routers_experts_embeddings_and_head(
    drafted: Callable[[str], Drafted], name: str
) -> None:
    src, _, family = drafted(name)
    checkpoint = open_checkpoint(Folder(src))
    shipped = family_of(checkpoint.config, FAMILIES, checkpoint.tensors)
    assert shipped
    for tensor in unstacked(checkpoint, shipped):
        known, guessed = shipped.classify(tensor), family.classify(tensor)
        assert known and guessed, tensor
        if known.row.block == DRAFTS:  # a draft keeps multi-token prediction as a whole
            assert guessed.row.role is Role.MTP, tensor
        elif known.row.role in TOLD or guessed.row.role in TOLD:
            assert guessed.row.role is known.row.role, tensor
            assert bool(guessed.row.fused) is bool(known.row.fused), tensor


@pytest.mark.parametrize("name", FAMILIES)
def test_a_draft_fits_its_checkpoint_and_makes_a_tiny_one(
    drafted: Callable[[str], Drafted], name: str
) -> None:
    src, file, _ = drafted(name)
    result = mquant("families", "check", file, "--against", src)
    assert result.exit_code == 0, result.output
    assert "The file fits every tensor of" in result.stdout


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_next", "qwen3_5_moe"])
def test_a_checkpoint_is_quantized_with_its_draft(
    drafted: Callable[[str], Drafted], tmp_path: Path, name: str
) -> None:
    src, file, family = drafted(name)
    out = tmp_path / "out"
    result = mquant("quantize", src, "-o", out, "--recipe", "nvfp4", "--family", file)
    assert result.exit_code in (0, 1), result.output  # 1: what vLLM builds is not known
    config = json.loads((out / "config.json").read_text())
    kept = {
        tensor.removesuffix(".weight")
        for tensor in open_checkpoint(Folder(src)).tensors
        if (role := family.classify(tensor)) and role.row.role is Role.ROUTER
    }
    assert kept and kept <= set(config["quantization_config"]["ignore"])


def test_a_layer_that_the_draft_cannot_settle_is_a_comment(
    drafted: Callable[[str], Drafted],
) -> None:
    text = drafted("glm4_moe")[1].read_text()
    assert "# unsure: head_dim, or " in text  # tiny sizes coincide


def test_blocks_are_tied_to_the_keys_of_config_json(drafted: Callable[[str], Drafted]) -> None:
    assert drafted("glm4_moe")[2].blocks["mlp"] == "layer < first_k_dense_replace"


@pytest.mark.parametrize(
    ("settings", "layers", "condition"),
    [
        ({"kinds": ["a", "b", "a", "b"]}, {1, 3}, "kinds[layer] is b"),
        ({"pattern": "M*ME"}, {0, 2}, "pattern[layer] is M"),
        ({"mlp_only_layers": [0, 2]}, {1, 3}, "layer not in mlp_only_layers"),
        ({"attn": {"full_layers": [1, 2]}}, {0, 1}, "layer + 1 in attn.full_layers"),
        ({"moe_layer_freq": [0, 1, 1, 1]}, {1, 2, 3}, "moe_layer_freq[layer]"),
        ({"step_interval": 2}, {1, 3}, "step_interval divides layer + 1"),
        (
            {"first_k_dense_replace": 1, "moe_freq": 2},
            {2},
            "layer >= first_k_dense_replace and moe_freq divides layer",
        ),
    ],
)
def test_a_condition_holds_for_exactly_the_layers(
    settings: dict[str, Any], layers: set[int], condition: str
) -> None:
    assert condition_of(frozenset(layers), 4, settings) == condition


def test_check_says_what_of_a_file_does_not_fit(
    drafted: Callable[[str], Drafted], tmp_path: Path
) -> None:
    src, file, _ = drafted("qwen3_moe")
    content = yaml.safe_load(file.read_text())
    rows = {row["name"]: row for row in content["tensors"]}
    rows["model.norm.weight"]["name"] = "model.final_norm.weight"
    rows["lm_head.weight"]["shape"] = ["hidden_size", "vocab_size"]
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(content))

    result = mquant("families", "check", changed, "--against", src, "--format", "json")

    assert result.exit_code == 1
    found = {(each["kind"], each["name"]) for each in json.loads(result.stdout)["differences"]}
    assert found == {
        ("no row", "model.norm.weight"),
        ("not in the checkpoint", "model.final_norm.weight"),
        ("shape", "lm_head.weight"),
    }


def test_draft_writes_a_file_and_says_what_comes_next(
    drafted: Callable[[str], Drafted], tmp_path: Path
) -> None:
    src, _, _ = drafted("llama")
    file = tmp_path / "mine.yaml"
    result = mquant("families", "draft", src, "-o", file)
    assert result.exit_code == 0, result.output
    assert "Next: mquant families check" in result.stdout
    assert mquant("families", "draft", src).stdout == file.read_text()
