"""`verify-ignore` judges the ignore lists of checkpoints in every published layout."""

from pathlib import Path
from typing import Any

import pytest

from ignore_reports import Judge, judge, message, rules
from make import Row, make_checkpoint, make_names, make_row, minimax_m2, renamed, write_json
from mquant.checkpoint import Folder, open_checkpoint
from mquant.errors import SourceError
from mquant.family_files import load_families
from mquant.loader_model.modules import MODELOPT_NAME, read_modules
from mquant.verify.ignore_report import check_ignore
from quantized_rows import (
    FP8,
    FP8_BLOCK,
    FP8_CONFIG,
    MODELOPT,
    MODELOPT_CONFIG,
    NVFP4,
    NVFP4A16,
    W4A16,
    Suffixes,
    compressed,
    quantized,
)

__all__ = ["judge"]  # the fixture

GATES = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(2)]
KEPT = ["lm_head", "model.embed_tokens", *GATES]
HUB_EXPERT = "model.layers.0.block_sparse_moe.experts.{}.{}"


GOOD = (
    "All 2 routers, lm_head and the embeddings are kept: nothing in ignore stops vLLM 0.32 from "
    "loading this checkpoint."
)


def test_a_good_ignore_list_does_not_say_that_vllm_loads_what_is_not_known(tmp_path: Path) -> None:
    families = load_families()
    untold = families["minimax_m2"].model_copy(update={"vllm": None})
    config = {"quantization_config": compressed(KEPT, scheme="NVFP4A16")}
    folder = make_checkpoint(tmp_path / "model", edit=quantized(NVFP4A16), config=config)
    opened = open_checkpoint(Folder(folder))
    report = check_ignore(read_modules(opened, {**families, "minimax_m2": untold}))
    assert report.verdict == (
        "All 2 routers, lm_head and the embeddings are kept; whether vLLM 0.32 loads this "
        "checkpoint is not known."
    )


# --- layouts


@pytest.mark.parametrize(
    ("scheme", "suffixes"),
    [("NVFP4A16", NVFP4A16), ("NVFP4", NVFP4), ("FP8", FP8), ("W4A16", W4A16)],
)
def test_a_complete_ignore_list_of_compressed_tensors_is_good(
    judge: Judge, scheme: str, suffixes: Suffixes
) -> None:
    report = judge(quantized(suffixes), compressed(KEPT, scheme=scheme))
    assert report.findings == ()
    assert report.verdict == GOOD
    assert [(k.role.value, k.found, k.kept, k.quantized, k.covered) for k in report.kinds] == [
        ("router", 2, 2, 0, 2),
        ("head", 1, 1, 0, 1),
        ("embedding", 1, 1, 0, 1),
        ("expert", 24, 0, 24, 0),
        ("attention", 8, 0, 8, 0),
    ]


@pytest.mark.parametrize(
    ("config", "excluded"),
    [
        ({**MODELOPT_CONFIG, "ignore": ["lm_head", "*gate"]}, None),
        (..., ["lm_head", *GATES]),
        (..., ["lm_head", "model.layers.*.block_sparse_moe.gate"]),
    ],
)
def test_a_complete_exclusion_list_of_modelopt_is_good(
    tmp_path: Path, config: Any, excluded: list[str] | None
) -> None:
    keys = {"quantization_config": config}
    folder = make_checkpoint(tmp_path, edit=quantized(MODELOPT), config=keys)
    if excluded:
        quantization = {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": excluded,
        }
        table = {"producer": {"name": "modelopt"}, "quantization": quantization}
        write_json(folder / MODELOPT_NAME, table)
    report = check_ignore(read_modules(open_checkpoint(Folder(folder)), load_families()))
    assert report.findings == ()
    assert report.verdict == GOOD
    assert report.method == "modelopt"


def test_the_original_release_is_good(judge: Judge) -> None:
    kept = ["gate", "e_score_correction_bias", "lm_head"]
    config = {**FP8_CONFIG, "modules_to_not_convert": kept}
    report = judge(quantized(FP8_BLOCK), config)
    assert report.findings == ()
    assert report.verdict == GOOD
    assert [entry.hub for entry in report.entries] == [2, 2, 1]


def test_a_plain_checkpoint_has_no_ignore_list_to_judge(judge: Judge) -> None:
    report = judge(None)
    assert report.findings == ()
    assert report.verdict == (
        "Nothing is quantized, so there is no ignore list to judge. All 2 routers, lm_head and "
        "the embeddings are kept."
    )


# --- quantized modules that loaders refuse


@pytest.mark.parametrize(
    ("suffixes", "config"),
    [
        (NVFP4A16, compressed(["lm_head", "model.embed_tokens"])),
        (NVFP4A16, compressed(KEPT)),  # the list does not matter
        (MODELOPT, {**MODELOPT_CONFIG, "ignore": ["lm_head"]}),
        (FP8_BLOCK, {**FP8_CONFIG, "modules_to_not_convert": ["lm_head"]}),
    ],
)
def test_quantized_routers_are_an_error(judge: Judge, suffixes: Suffixes, config: Any) -> None:
    report = judge(quantized(suffixes, ".gate"), config)
    assert (
        report.verdict
        == "2 of 2 routers are quantized: vLLM 0.32 will refuse to load this checkpoint."
    )
    assert rules(report) == {"router-quantized": "error"}
    assert message(report, "router-quantized") == (
        f"2 router modules are quantized ({', '.join(GATES)}), with "
        f"{', '.join(sorted(suffixes))} on disk; vLLM 0.32 refuses such a checkpoint."
    )
    assert [(name, parts) for name, _, parts in report.quantized] == [
        (gate, tuple(sorted(suffixes))) for gate in GATES
    ]


def test_quantized_head_and_embeddings_are_errors(judge: Judge) -> None:
    report = judge(quantized(NVFP4A16, ".gate", "lm_head", "embed_tokens"), compressed([]))
    assert report.verdict == (
        "2 of 2 routers, lm_head and the embeddings are quantized: vLLM 0.32 will refuse to load "
        "this checkpoint."
    )
    assert set(rules(report)) == {"router-quantized", "embedding-quantized", "head-quantized"}


def test_a_quantized_head_alone_is_an_error(judge: Judge) -> None:
    report = judge(quantized(NVFP4A16, "lm_head"), compressed(KEPT[1:]))
    assert report.verdict == "lm_head is quantized: vLLM 0.32 will refuse to load this checkpoint."
    assert rules(report) == {"head-quantized": "error"}


def test_a_quantized_head_that_a_target_names_loads(judge: Judge) -> None:
    config = compressed(KEPT[1:])
    (group,) = config["config_groups"].values()
    group["targets"] = ["Linear", "lm_head"]
    report = judge(quantized(NVFP4A16, "lm_head"), config)
    assert report.verdict == (
        "lm_head is quantized: vLLM 0.32 will load this checkpoint, and other loaders may not."
    )
    assert rules(report) == {"head-quantized": "warning"}
    assert "; vLLM 0.32 loads such a checkpoint" in message(report, "head-quantized")


def test_a_lone_scale_beside_a_plain_router_is_refused(judge: Judge) -> None:
    def edit(rows: list[Row]) -> list[Row]:
        edited = quantized(NVFP4A16)(rows) or rows
        return [*edited, make_row(f"{GATES[1]}.weight_scale", "F8_E4M3", (4,))]

    report = judge(edit, compressed(KEPT))
    assert (
        report.verdict
        == "1 of 2 routers are quantized: vLLM 0.32 will refuse to load this checkpoint."
    )
    assert report.quantized[0][2] == ("weight_scale",)


def _as_oneshot(rows: list[Row]) -> list[Row]:
    rows = quantized(NVFP4A16)(rows) or rows
    for old, new in ((".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj.")):
        rows = renamed(rows, old, new)
    return rows


@pytest.mark.parametrize("whole", [False, True])
def test_experts_under_transformers_names_are_an_error(judge: Judge, whole: bool) -> None:
    def edit(rows: list[Row]) -> list[Row]:
        rows = _as_oneshot(rows)
        return renamed(rows, ".block_sparse_moe.", ".mlp.") if whole else rows

    report = judge(edit, compressed(["lm_head", "model.embed_tokens", r"re:.*\.gate$"]))
    assert rules(report) == {"expert-names": "error"}
    assert "24 expert modules are named as in a loaded model" in message(report, "expert-names")
    assert "leave the experts uninitialised" in report.verdict


def test_a_missing_quantization_config_is_an_error(judge: Judge) -> None:
    report = judge(quantized(NVFP4A16))
    assert rules(report) == {"quantization-undeclared": "error"}


# --- lists that stop vLLM


def test_plain_attention_must_be_ignored(judge: Judge) -> None:
    edit = quantized(NVFP4A16, but=("self_attn",))
    report = judge(edit, compressed(KEPT))
    assert rules(report) == {"kept-but-not-ignored": "error"}
    assert "8 modules are plain on disk" in message(report, "kept-but-not-ignored")
    fine = judge(edit, compressed([*KEPT, r"re:.*self_attn.*"]))
    assert fine.findings == ()
    assert fine.verdict == GOOD


def test_plain_experts_must_be_ignored_by_vllms_names(judge: Judge) -> None:
    edit = quantized(NVFP4A16, but=("experts",))
    report = judge(edit, compressed([*KEPT, r"re:.*block_sparse_moe\.experts.*"]))
    assert rules(report) == {"kept-but-not-ignored": "error", "ignore-hub-only": "warning"}
    assert "(vLLM's name is model.layers.0.mlp.experts.0.w1)" in message(
        report, "kept-but-not-ignored"
    )
    assert judge(edit, compressed([*KEPT, r"re:.*mlp\.experts\..*"])).findings == ()
    assert judge(edit, compressed([*KEPT, r"re:.*experts\..*"])).findings == ()


def test_quantized_experts_ignored_by_hub_names_are_a_warning(judge: Judge) -> None:
    ignore = [*KEPT, r"re:.*block_sparse_moe\.experts\.[0-9]"]
    report = judge(quantized(NVFP4A16), compressed(ignore))
    assert rules(report) == {"ignore-hub-only": "warning"}
    assert report.verdict == GOOD
    assert (report.entries[-1].hub, report.entries[-1].vllm) == (24, 0)


def test_one_plain_expert_among_quantized_experts_is_an_error(judge: Judge) -> None:
    edit = quantized(NVFP4A16, but=("layers.0.block_sparse_moe.experts.3.",))
    names = [HUB_EXPERT.format(3, w) for w in ("w1", "w2", "w3")]
    names += [name.replace("block_sparse_moe", "mlp") for name in names]
    report = judge(edit, compressed([*KEPT, *names]))
    assert "kept-but-not-ignored" in rules(report)
    assert "3 modules are" in message(report, "kept-but-not-ignored")


def test_exact_names_of_experts_must_include_vllms_name_of_the_first(judge: Judge) -> None:
    rows = (row.removesuffix(".weight") for _, row in make_names(layers=2, experts=4))
    hub = [name for name in rows if ".experts." in name]
    both = [*hub, *(minimax_m2().in_vllm_name(name) for name in hub)]
    edit = quantized(NVFP4A16, but=("experts",))
    assert rules(judge(edit, compressed([*KEPT, *hub]))) == {
        "kept-but-not-ignored": "error",
        "ignore-hub-only": "warning",
    }
    first = [name for name in both if "mlp" not in name or ".experts.0." in name]
    assert judge(edit, compressed([*KEPT, *first])).findings == ()


def test_quantized_layers_must_not_be_ignored(judge: Judge) -> None:
    report = judge(quantized(NVFP4A16), compressed([*KEPT, r"re:.*o_proj$"]))
    assert rules(report) == {"ignored-but-quantized": "error"}
    assert "2 modules are quantized on disk" in message(report, "ignored-but-quantized")


@pytest.mark.parametrize("style", ["modelopt", "fp8"])
def test_other_layouts_have_the_same_errors(judge: Judge, style: str) -> None:
    suffixes = MODELOPT if style == "modelopt" else FP8_BLOCK
    key = "ignore" if style == "modelopt" else "modules_to_not_convert"
    o_proj = "model.layers.1.self_attn.o_proj"
    experts = "model.layers.1.mlp.experts"
    config = MODELOPT_CONFIG if style == "modelopt" else FP8_CONFIG
    kept = {**config, key: ["lm_head", *GATES]}
    ignored = {**config, key: ["lm_head", *GATES, o_proj, experts]}
    both = (o_proj, "layers.1.block_sparse_moe.experts")
    assert rules(judge(quantized(suffixes, but=both), ignored)) == {}
    assert rules(judge(quantized(suffixes), ignored)) == {"ignored-but-quantized": "error"}
    assert rules(judge(quantized(suffixes, but=both), kept)) == {"kept-but-not-ignored": "error"}


def test_modelopt_must_exclude_lm_head(judge: Judge) -> None:
    report = judge(quantized(MODELOPT), {**MODELOPT_CONFIG, "ignore": GATES})
    assert rules(report) == {"kept-but-not-ignored": "error", "ignore-uncovered": "warning"}


@pytest.mark.parametrize("entry", [r"re:.*q_proj$", "model.layers.0.self_attn.q_proj"])
def test_a_third_of_q_k_v_cannot_be_ignored(judge: Judge, entry: str) -> None:
    report = judge(quantized(NVFP4A16, but=("q_proj",)), compressed([*KEPT, entry]))
    assert rules(report)["fused-set-split"] == "error"
    assert report.verdict.startswith("vLLM 0.32 refuses this checkpoint: ")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["Linear"], {}),
        (["re:.*self_attn.*_proj$", r"re:.*mlp\.experts\.\d+\.w[123]$"], {}),
        (
            ["re:.*self_attn.*_proj$", r"re:.*block_sparse_moe\.experts.*"],
            {"quantized-not-targeted": "error"},
        ),
        (
            ["re:.*self_attn.*_proj$", r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"],
            {"quantized-not-targeted": "error"},
        ),
        (["re:.*[kvo]_proj$", r"re:.*mlp\.experts.*"], {}),  # qkv_proj matches, too
        ([r"re:.*attn\.[kvo]_proj$", r"re:.*mlp\.experts.*"], {"fused-set-split": "error"}),
        ([], {"quantized-not-targeted": "error"}),
        (["re:("], {"quantized-not-targeted": "error", "ignore-bad-entry": "error"}),
    ],
)
def test_targets_are_matched_on_vllm_s_names(
    judge: Judge, targets: list[str], expected: dict[str, str]
) -> None:
    report = judge(quantized(NVFP4A16), compressed(KEPT, targets))
    assert rules(report) == expected
    if "re:(" in targets:
        assert "'re:(' in targets" in message(report, "ignore-bad-entry")


# --- entries


def test_a_gate_that_is_not_covered_loads(judge: Judge) -> None:
    report = judge(quantized(NVFP4A16), compressed([]))
    assert rules(report) == {"ignore-uncovered": "warning"}
    assert set(report.uncovered) == set(KEPT)
    assert report.verdict == GOOD


def test_an_entry_in_transformers_names_covers_nothing(judge: Judge) -> None:
    ignore = ["lm_head", "model.embed_tokens", r"re:.*mlp\.gate$"]
    report = judge(quantized(NVFP4A16), compressed(ignore))
    assert rules(report) == {"ignore-uncovered": "warning", "ignore-unmatched": "warning"}
    assert message(report, "ignore-unmatched").endswith("; only transformers has such names.")


def test_entries_that_match_nothing_are_a_warning(judge: Judge) -> None:
    ignore = [*KEPT, "head", r"re:block_sparse_moe\.gate$", "model.visual"]
    report = judge(quantized(NVFP4A16), compressed(ignore))
    assert rules(report) == {"ignore-unmatched": "warning"}
    assert message(report, "ignore-unmatched").startswith("3 entries of ignore match nothing")
    assert [entry.hub for entry in report.entries[-3:]] == [0, 0, 0]


@pytest.mark.parametrize("ignore", [["re:(", *KEPT], [*KEPT, 7], [["lm_head"], *KEPT]])
def test_entries_that_vllm_cannot_read_are_an_error(judge: Judge, ignore: Any) -> None:
    report = judge(quantized(NVFP4A16), compressed(ignore))
    assert rules(report)["ignore-bad-entry"] == "error"
    assert report.verdict.startswith("vLLM 0.32 refuses this checkpoint: ")


@pytest.mark.parametrize("ignore", ["lm_head", {"lm_head": 1}])
def test_what_is_no_list_is_a_warning_if_vllm_goes_through_it(judge: Judge, ignore: Any) -> None:
    report = judge(quantized(NVFP4A16), compressed(ignore))
    assert rules(report)["ignore-bad-entry"] == "warning"
    assert report.verdict == GOOD


def test_an_overlong_entry_cannot_be_judged(judge: Judge) -> None:
    with pytest.raises(SourceError, match="cannot be judged"):
        judge(quantized(NVFP4A16), compressed(["x" * 2000]))


@pytest.mark.parametrize("groups", [None, [], {"a": None}, {"a": {"targets": None}}, {"a": {}}])
def test_unusable_config_groups_are_an_error(judge: Judge, groups: Any) -> None:
    config = {**compressed(KEPT), "config_groups": groups}
    assert rules(judge(quantized(NVFP4A16), config)) == {"quantized-not-targeted": "error"}
