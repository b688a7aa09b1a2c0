"""A family knows the one meaning of each of its tensor names, and a bad family file is refused."""

import gzip
from collections import Counter
from pathlib import Path

import pytest
import yaml

from make import make_config, make_names, minimax_m2
from mquant.data_files import folder
from mquant.errors import DataFileError
from mquant.family_files import family_of, load_families, load_family
from mquant.family_rows import Role

LISTING = Path(__file__).parent / "data" / "minimax-m2.7-reap-154.tensors.tsv.gz"
ROLES = "{} or {}.".format(", ".join(f"'{role}'" for role in [*Role][:-1]), f"'{[*Role][-1]}'")
LAYER = "model.layers.3"
MOE = f"{LAYER}.block_sparse_moe"

MEANINGS = [
    ("model.embed_tokens.weight", Role.EMBEDDING, None, None),
    ("model.norm.weight", Role.NORM, None, None),
    ("lm_head.weight", Role.HEAD, None, None),
    (f"{LAYER}.input_layernorm.weight", Role.NORM, 3, None),
    (f"{LAYER}.post_attention_layernorm.weight", Role.NORM, 3, None),
    (f"{LAYER}.self_attn.q_proj.weight", Role.ATTENTION, 3, None),
    (f"{LAYER}.self_attn.k_proj.weight", Role.ATTENTION, 3, None),
    (f"{LAYER}.self_attn.v_proj.weight", Role.ATTENTION, 3, None),
    (f"{LAYER}.self_attn.o_proj.weight", Role.ATTENTION, 3, None),
    (f"{LAYER}.self_attn.q_norm.weight", Role.NORM, 3, None),
    (f"{LAYER}.self_attn.k_norm.weight", Role.NORM, 3, None),
    (f"{MOE}.gate.weight", Role.ROUTER, 3, None),
    (f"{MOE}.e_score_correction_bias", Role.ROUTING_BIAS, 3, None),
    (f"{MOE}.experts.17.w1.weight", Role.EXPERT, 3, 17),
    (f"{MOE}.experts.17.w2.weight", Role.EXPERT, 3, 17),
    (f"{MOE}.experts.0.w3.weight", Role.EXPERT, 3, 0),
]


@pytest.mark.parametrize(("name", "role", "layer", "expert"), MEANINGS)
def test_a_name_says_role_layer_and_expert(
    name: str, role: Role, layer: int | None, expert: int | None
) -> None:
    meaning = minimax_m2().classify(name)

    assert meaning is not None
    assert (meaning.row.role, meaning.layer, meaning.expert) == (role, layer, expert)
    assert meaning.row.format(layer, expert) == name


def test_every_row_of_the_family_has_a_meaning_above() -> None:
    meanings = {minimax_m2().classify(name) for name, *_ in MEANINGS}

    assert {meaning.row for meaning in meanings if meaning} == set(minimax_m2().tensors)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.01.input_layernorm.weight",
        "model.layers.-1.input_layernorm.weight",
        "model.layers.+1.input_layernorm.weight",
        "model.layers.1e1.input_layernorm.weight",
        "model.layers.1_0.input_layernorm.weight",
        "model.layers.\u0661.input_layernorm.weight",
        "model.layers.1000000000.input_layernorm.weight",
        "model.layers.99999999999999999999999999.input_layernorm.weight",
        "model.layers..input_layernorm.weight",
        "model.layers.#.input_layernorm.weight",
        "model.layers.0.block_sparse_moe.experts.#.w1.weight",
        "model.layers.{layer}.input_layernorm.weight",
        "model.layers.0.block_sparse_moe.experts.00.w1.weight",
        "model.layers.0.block_sparse_moe.experts.w1.weight",
        "model.layers.0.block_sparse_moe.experts.0.w4.weight",
        "model.layers.0.block_sparse_moe.experts.0.gate_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.0.input_layernorm.weight\n",
        " lm_head.weight",
        "lm_head",
        "LM_HEAD.weight",
        "",
    ],
)
def test_a_name_that_is_not_exactly_in_the_family_is_unknown(name: str) -> None:
    assert minimax_m2().classify(name) is None


def test_the_golden_listing_is_classified_row_by_row() -> None:
    family, config = minimax_m2(), make_config()
    lines = gzip.decompress(LISTING.read_bytes()).decode().splitlines()
    roles: Counter[Role] = Counter()
    for name, dtype, shape in (line.split("\t") for line in lines if not line.startswith("#")):
        meaning = family.classify(name)
        assert meaning is not None, name
        assert meaning.row.format(meaning.layer, meaning.expert) == name
        assert meaning.row.dtype == dtype
        assert family.shape(meaning.row, config) == tuple(map(int, shape.split("x"))), name
        roles[meaning.row.role] += 1

    assert roles == {
        Role.EXPERT: 62 * 154 * 3,
        Role.ATTENTION: 62 * 4,
        Role.NORM: 62 * 4 + 1,
        Role.ROUTER: 62,
        Role.ROUTING_BIAS: 62,
        Role.EMBEDDING: 1,
        Role.HEAD: 1,
    }


def test_the_golden_listing_is_the_family_at_its_real_size() -> None:
    lines = gzip.decompress(LISTING.read_bytes()).decode().splitlines()
    listed = [line.split("\t")[0] for line in lines if not line.startswith("#")]

    assert sorted(listed) == sorted(name for _, name in make_names(62, 154))


def test_fused_sets_are_the_modules_that_loaders_join_into_one_matrix() -> None:
    sets = {
        name: [row.name.split(".")[-2] for row in rows]
        for name, rows in minimax_m2().fused_sets.items()
    }

    assert sets == {"qkv": ["q_proj", "k_proj", "v_proj"], "w13": ["w1", "w3"]}


@pytest.mark.parametrize(
    ("hub", "memory"),
    [
        (f"{MOE}.gate", f"{LAYER}.mlp.gate"),
        (f"{MOE}.gate.weight", f"{LAYER}.mlp.gate.weight"),
        (f"{MOE}.experts.7.w1", f"{LAYER}.mlp.experts.7.gate_proj"),
        (f"{MOE}.experts.7.w2.weight", f"{LAYER}.mlp.experts.7.down_proj.weight"),
        (f"{MOE}.experts.7.w3", f"{LAYER}.mlp.experts.7.up_proj"),
        (f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.q_proj"),
        ("lm_head", "lm_head"),
    ],
)
def test_a_module_has_another_name_in_memory(hub: str, memory: str) -> None:
    assert minimax_m2().in_memory_name(hub) == memory


def shape_of(name: str, **config: object) -> tuple[int, ...] | None:
    meaning = minimax_m2().classify(name)
    assert meaning is not None
    return minimax_m2().shape(meaning.row, config)


def test_a_shape_is_computed_from_config() -> None:
    name = f"{LAYER}.self_attn.q_proj.weight"

    assert shape_of(name, num_attention_heads=4, head_dim=16, hidden_size=32) == (64, 32)


@pytest.mark.parametrize("value", [None, "64", 64.0, True, [64]])
def test_a_shape_is_unknown_if_config_does_not_give_its_sizes(value: object) -> None:
    assert shape_of("model.norm.weight", hidden_size=value) is None
    assert shape_of("model.norm.weight") is None


def test_a_family_is_found_by_model_type() -> None:
    families = load_families()

    assert family_of({"model_type": "minimax_m2"}, families) is families["minimax_m2"]
    for config in ({}, {"model_type": "unheard_of"}, {"model_type": ["minimax_m2"]}):
        assert family_of(config, families) is None


def family_file(tmp_path: Path, edit: str, value: object) -> Path:
    """Write the shipped family file with another value of one key, a dotted path."""
    data = yaml.safe_load((folder("configs") / "minimax_m2.yaml").read_text())
    *tables, last = edit.split(".")
    table = data
    for step in tables:
        table = table[int(step) if step.isdigit() else step]
    table[last] = value
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def complaint(path: Path) -> str:
    with pytest.raises(DataFileError) as caught:
        load_family(path)
    assert caught.value.fix == "Correct the family file."
    return caught.value.message


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("pattern", 1, "mine.yaml: pattern: Extra inputs are not permitted."),
        (
            "tensors.2.roll",
            1,
            "mine.yaml: tensors.2.roll (model.layers.{layer}.post_attention_layernorm.weight): "
            "Extra inputs are not permitted.",
        ),
        ("config.layers", 7, "mine.yaml: config.layers: Input should be a valid string."),
        (
            "tensors.0.name",
            "lm_head.weight",
            "mine.yaml: tensors: lm_head.weight has two rows.",
        ),
        (
            "tensors.0.role",
            "emdebbing",
            "mine.yaml: tensors.0.role (model.embed_tokens.weight): Input should be " + ROLES,
        ),
    ],
)
def test_a_bad_family_file_names_its_key(
    tmp_path: Path, key: str, value: object, sentence: str
) -> None:
    assert complaint(family_file(tmp_path, key, value)) == sentence


def test_a_shape_that_is_no_formula_is_named(tmp_path: Path) -> None:
    path = family_file(tmp_path, "tensors.0.shape", ["vocab_size; rm"])

    assert complaint(path).startswith(
        "mine.yaml: tensors.0.shape.0 (model.embed_tokens.weight): 'vocab_size; rm' is no "
    )


def test_a_missing_key_of_a_family_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\n")

    assert complaint(path) == "mine.yaml: title: Field required."


def test_a_family_may_have_tensors_of_role_other(tmp_path: Path) -> None:
    data = yaml.safe_load((folder("configs") / "minimax_m2.yaml").read_text())
    data["tensors"].append({"name": "model.layers.{layer}.extra", "role": "other"})
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))

    meaning = load_family(path).classify("model.layers.61.extra")

    assert meaning is not None
    assert (meaning.row.role, meaning.layer) == (Role.OTHER, 61)
