"""Entries match the names that they match in loaders, and hostile entries are refused."""

import pytest

from make import minimax_m2
from mquant import name_patterns
from mquant.errors import SourceError
from mquant.family_rows import Role
from mquant.name_patterns import Style, match

GATE = "model.layers.0.block_sparse_moe.gate"
W1 = "model.layers.0.mlp.experts.0.w1"
NAMES = ["lm_head", "model.embed_tokens", GATE, W1]


def matched(entry: str, style: Style = Style.NAMES) -> list[str]:
    return sorted(match([entry], NAMES, style).by_entry[entry])


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("lm_head", ["lm_head"]),
        ("lm_hea", []),
        ("LM_HEAD", []),
        ("gate", []),
        ("*lm_head", []),
        ("re:lm_head", ["lm_head"]),
        ("re:lm", ["lm_head"]),  # anchored at the start only
        ("re:head", []),
        (r"re:.*block_sparse_moe\.gate$", [GATE]),
        (r"re:.*mlp\.experts\.\d+\.w1$", [W1]),
        (r"re:.*block_sparse_moe\.experts", []),
        ("re:", sorted(NAMES)),
        ("", []),
    ],
)
def test_entries_match_as_in_vllms_compressed_tensors(entry: str, names: list[str]) -> None:
    assert matched(entry) == names


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("lm_head", ["lm_head"]),
        ("*gate", [GATE]),
        ("model.layers.0.*", sorted([GATE, W1])),
        ("block_sparse_moe", [GATE]),  # part of a name
        ("re:.*gate", []),
    ],
)
def test_entries_match_as_in_vllms_modelopt(entry: str, names: list[str]) -> None:
    assert matched(entry, Style.GLOBS) == names


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("lm_head", ["lm_head"]),
        ("gate", [GATE]),
        ("block_sparse_moe.gate", [GATE]),
        ("ate", []),
        ("*", []),
    ],
)
def test_entries_match_as_in_transformers_fp8(entry: str, names: list[str]) -> None:
    assert matched(entry, Style.PARTS) == names


def test_entries_match_exactly_as_in_vllms_fp8() -> None:
    assert matched("gate", Style.EXACT) == []
    assert matched("lm_head", Style.EXACT) == ["lm_head"]


@pytest.mark.parametrize("entry", ["re:(", "re:*", "re:a{99999999999}", "re:" + "(" * 400])
def test_an_invalid_expression_is_reported(entry: str) -> None:
    matches = match([entry, "lm_head"], NAMES, Style.NAMES)
    assert list(matches.bad) == [entry]
    assert matches.bad[entry]
    assert matches.names == {"lm_head"}


@pytest.mark.parametrize("entry", ["re:[[a]", "re:\udc80", "re:\x00\n"])
def test_unusual_expressions_are_valid(entry: str) -> None:
    assert match([entry], [*NAMES, "\ud800"], Style.NAMES).bad == {}


def test_an_expression_that_takes_forever_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_patterns, "TIME_LIMIT", 0.5)
    forever = "re:(l|m|_|[a-z_]+)*$!"
    with pytest.raises(SourceError, match="reached 're:") as caught:
        match(["re:lm", forever], ["l" * 60], Style.NAMES)
    assert forever in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize("entries", [["x" * 1001], [str(n) for n in range(100_001)]])
def test_lists_that_are_too_long_are_refused(entries: list[str]) -> None:
    with pytest.raises(SourceError, match="cannot be judged"):
        match(entries, NAMES, Style.NAMES)


def test_long_lists_of_exact_names_are_quick() -> None:
    names = [f"model.layers.{n}" for n in range(100_000)]
    assert match(names, names, Style.NAMES).names == set(names)


# --- names in vLLM and in transformers


@pytest.mark.parametrize(
    ("hub", "vllm"),
    [
        (
            "model.layers.3.block_sparse_moe.experts.0.w1",
            "model.layers.3.mlp.experts.0.w1",
        ),
        ("model.layers.3.block_sparse_moe.experts", "model.layers.3.mlp.experts"),
        (GATE, GATE),
        ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.q_proj"),
    ],
)
def test_hub_names_become_vllms_names(hub: str, vllm: str) -> None:
    assert minimax_m2().in_vllm_name(hub) == vllm


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.12.up_proj.weight",
        "model.layers.1.block_sparse_moe.experts.12.up_proj.weight",  # as oneshot saves it
        "model.layers.1.block_sparse_moe.experts.12.w3.weight",
    ],
)
def test_experts_are_known_by_transformers_names(name: str) -> None:
    meaning = minimax_m2().classify_in_memory(name)
    assert meaning is not None
    assert (meaning.layer, meaning.expert, meaning.row.role) == (1, 12, Role.EXPERT)
    assert ".w3." in meaning.row.name


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head", "#.weight"])
def test_other_names_stay_unknown(name: str) -> None:
    assert minimax_m2().classify_in_memory(name) is None
