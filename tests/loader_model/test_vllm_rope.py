"""What transformers 5.19 and vLLM 0.32 refuse of the rotary embedding in config.json."""

import pytest

from config_stages import DROP, FAMILIES, each_family, judge


@each_family
@pytest.mark.parametrize("theta", ["10000", None, [10000]])
def test_the_base_of_the_rotary_embedding_is_a_number(family: str, theta: object) -> None:
    config = {"rope_theta": theta, "rope_parameters": DROP}
    assert judge(family, **config).startswith("refused: says rope_theta")


@pytest.mark.parametrize("family", ["jamba", "nemotron_h"])
def test_hybrid_models_have_no_rotary_embedding(family: str) -> None:
    assert judge(family, rope_theta="10000") == "taken"


@pytest.mark.parametrize(("kind", "verdict"), [("nope", "taken"), ("rope", "refused")])
def test_granite_rotates_heads_if_config_json_says_so(kind: str, verdict: str) -> None:
    config = {"rope_theta": "10000", "position_embedding_type": kind}
    assert judge("granitemoehybrid", **config).startswith(verdict)


@each_family
@pytest.mark.parametrize("scaling", ["yarn", 8, [8.0]])
def test_rope_scaling_is_a_table(family: str, scaling: object) -> None:
    assert judge(family, rope_scaling=scaling) == (
        f"refused: says rope_scaling {scaling!r}, not a table"
    )


@each_family
def test_empty_rope_scaling_of_any_type_is_none(family: str) -> None:
    assert judge(family, rope_scaling=[]) == judge(family, rope_scaling=None) == "taken"


@each_family
def test_transformers_5_writes_one_table(family: str) -> None:
    rows = FAMILIES[family].vllm
    assert rows is not None
    table = {"rope_type": "default", "rope_theta": 10000.0, **rows.rope.default}

    assert judge(family, rope_scaling=DROP, rope_theta=DROP, rope_parameters=table) == "taken"


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_every_type_of_scaling_needs_its_keys(kind: str) -> None:
    why = judge("qwen3", rope_scaling={"rope_type": kind})

    assert why == f"refused: says rope_type {kind} without factor"


def test_a_linear_factor_has_a_point() -> None:
    assert judge("qwen3", rope_scaling={"type": "linear", "factor": 2.0}) == "taken"
    assert judge("qwen3", rope_scaling={"type": "linear", "factor": 2}).startswith("refused")


def test_two_names_for_the_type_must_agree() -> None:
    tables = {"rope_type": "yarn", "type": "linear", "factor": 4.0}

    assert judge("qwen3", rope_scaling=tables).startswith("refused: says rope_type 'yarn' and type")


def test_an_unknown_type_is_refused_but_deepseek_takes_any_for_yarn() -> None:
    scaling = {"type": "new", "factor": 4.0, "original_max_position_embeddings": 4096}

    assert judge("qwen3", rope_scaling=scaling).endswith("which vLLM does not know")
    assert judge("deepseek_v3", rope_scaling=scaling) == "taken"


def test_minimax_needs_to_know_how_much_of_a_head_is_rotated() -> None:
    assert judge("minimax_m2", rotary_dim=None) == "refused: says no rotary_dim"
    assert judge("minimax_m2", rotary_dim=None, partial_rotary_factor=0.5) == "taken"
    assert judge("minimax_m2", rotary_dim=64, head_dim=32).endswith("not 0 to 1")


# --- numbers that do not go together


# --- LongRoPE


def longrope(**changes: object) -> dict[str, object]:
    return {
        "rope_type": "longrope",
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
    } | changes


def test_phi_3_knows_longrope_and_takes_its_old_names() -> None:
    assert judge("phi3", rope_scaling=longrope()) == "taken"
    assert judge("phi3", rope_scaling=longrope(rope_type="yarn")) == "taken"
    assert judge("phi3", rope_scaling=longrope(rope_type="su")).startswith("refused: says rope_typ")
    assert judge("phi3", rope_scaling=longrope(rope_type="linear", factor=2.0)).startswith(
        "refused"
    )


def test_longrope_has_a_factor_for_every_pair_of_dimensions() -> None:
    why = judge("phi3", rope_scaling=longrope(long_factor=[1.0] * 15))

    assert why == "refused: has 15 numbers in long_factor, not 16"
    assert judge("phi3", rope_scaling=longrope(short_mscale="1")).startswith("refused")


def test_the_length_before_scaling_is_a_key_of_phi_3() -> None:
    key = "original_max_position_embeddings"

    assert judge("phi3", rope_scaling=longrope(), **{key: 0}) == f"refused: says {key} 0"
    assert judge("phi3", rope_scaling=longrope(**{key: 0}), **{key: 4096}) == "taken"


def test_longrope_of_other_families_is_not_judged() -> None:
    assert judge("llama", rope_scaling=longrope()) == "unknown: rope_type longrope"


@pytest.mark.parametrize("family", ["jamba", "mimo_v2_flash"])
def test_a_config_class_without_the_mixin_does_not_know_the_length_before_scaling(
    family: str,
) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert judge(family, rope_scaling=yarn, rope_parameters=DROP) == (
        "refused: says rope_type yarn without original_max_position_embeddings"
    )
    assert judge("llama", rope_scaling=yarn, rope_parameters=DROP) == "taken"
