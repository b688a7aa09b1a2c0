"""Every family file describes what upstream does. MiniMax-M2 has further tests elsewhere.

`synth` writes the checkpoints. The judges are transformers' own model code, llmcompressor, and the
published numbers of parameters.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from family_cases import FAMILY_CASES
from judges import data, differences, model_free_ptq, one_shard, opened, quantized_names, read_json
from mquant.checkpoint import Folder
from mquant.family import Family, FusedSet
from mquant.family_files import load_families
from mquant.family_rows import Role
from mquant.plan import Plan, Target
from mquant.runs.export import export
from mquant.synth import Precision, Sizes, make_config, make_tensors, synth
from mquant.verify.judge import verify
from run import plan_of, quantize_nvfp4

FAMILIES = load_families()
NAMES = sorted(FAMILY_CASES)
CASES = {name: (name, dict[str, Any]()) for name in NAMES} | {
    f"{name}, {variant}": (name, tiny)
    for name, case in FAMILY_CASES.items()
    for variant, tiny in case.variants.items()
}
# tests/engines/test_stacked_experts.py has tests of experts that lie in one tensor.
SPLIT = [case for case, (name, _) in CASES.items() if not FAMILIES[name].stacks]


def with_config(family: Family, **tiny: Any) -> Family:
    """Return the family with other values in its tiny config.json."""
    section = family.synth.model_copy(update={"tiny": {**family.synth.tiny, **tiny}})
    return family.model_copy(update={"synth": section})


def make(out: Path, name: str, *, drop: str = "", **tiny: Any) -> Path:
    """Write a tiny checkpoint of a family, without the rows whose name ends in `drop`."""
    family = with_config(FAMILIES[name], **tiny)
    if drop:
        rows = tuple(row for row in family.tensors if not row.name.endswith(drop))
        family = family.model_copy(update={"tensors": rows})
    return synth(out, family, max_shard_bytes=300_000).path


def reconfigured(path: Path, **changes: Any) -> Path:
    """Change keys of a checkpoint's config.json; `...` removes a key."""
    config = {**read_json(path / "config.json"), **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))
    return path


def rules(path: Path) -> set[str]:
    return {finding.rule for finding in plan_of(path).findings}


Quantized = tuple[str, Path, Path]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Quantized]:
    """Return a function: case -> its family, its checkpoint and the quantized checkpoint.

    Each case is quantized once.
    """
    results: dict[str, Quantized] = {}

    def get(case: str) -> Quantized:
        if case not in results:
            name, tiny = CASES[case]
            folder = tmp_path_factory.mktemp(name)
            src = make(folder / "src", name, **tiny)
            results[case] = (name, src, quantize_nvfp4(src, folder / "out", shard_bytes=400_000))
        return results[case]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_fused_sets_are_the_sets_that_loaders_merge(name: str) -> None:
    sets = {
        fused: [row.name.split(".")[-2] for row in rows]
        for fused, rows in FAMILIES[name].fused_sets.items()
    }
    assert sets == FAMILY_CASES[name].fused_sets


@pytest.mark.parametrize("case", CASES)
def test_a_synthetic_checkpoint_plans_clean(tmp_path: Path, case: str) -> None:
    name, tiny = CASES[case]
    plan = plan_of(make(tmp_path / "src", name, **tiny))

    assert plan.findings == ()
    quantized = {action.role for action in plan.actions if action.scheme}
    assert quantized <= {Role.EXPERT, Role.SHARED_EXPERT, Role.MLP, Role.ATTENTION}
    kept = [a for a in plan.actions if a.role in quantized and not a.scheme]
    assert [action.source.name for action in kept] == []


@pytest.mark.parametrize("name", NAMES)
def test_only_what_a_family_says_is_kept_beside_head_and_embeddings(
    tmp_path: Path, name: str
) -> None:
    plan, case = plan_of(make(tmp_path / "src", name)), FAMILY_CASES[name]
    linear = [module for module in plan.ignore if ".linear_attn." in module]
    kept = {"lm_head", "model.embed_tokens", *case.routers, *case.kept, *linear}

    assert set(plan.ignore) == kept


@pytest.mark.parametrize("name", NAMES)
def test_the_real_size_has_the_parameters_of_the_release(tmp_path: Path, name: str) -> None:
    summary = synth(tmp_path / "out", FAMILIES[name], shapes_only=True)

    assert summary.parameters == FAMILY_CASES[name].parameters
    assert plan_of(summary.path).findings == ()


def test_deepseek_v3_without_multi_token_prediction_is_671_billion() -> None:
    family = FAMILIES["deepseek_v3"]
    config = make_config(family, Sizes(), Precision.BF16, tiny=False)
    tensors = list(make_tensors(family, config, Precision.BF16))
    main = [t for t in tensors if not t.name.startswith("model.layers.61.")]

    assert sum(int(np.prod(tensor.shape)) for tensor in main) == 671_026_419_200
    assert len(tensors) - len(main) == 3 * 256 + 20


@pytest.mark.upstream
@pytest.mark.parametrize("case", [case for case in CASES if "multi-token" not in case])
def test_transformers_loads_every_tensor_and_misses_none(tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    name, tiny = CASES[case]
    src = make(tmp_path / "src", name, **tiny)
    _, report = AutoModelForCausalLM.from_pretrained(src, dtype="auto", output_loading_info=True)

    assert {key: value for key, value in report.items() if value} == {}


@pytest.mark.upstream
@pytest.mark.parametrize("case", SPLIT)
def test_fused_sets_share_one_global_scale_made_of_the_largest_weight(
    quantized: Callable[[str], Quantized], case: str
) -> None:
    _, src, out = quantized(case)
    result = opened(out)
    sets: dict[FusedSet, list[str]] = {}
    for member in plan_of(src).survey.members:
        if fused_set := member.tensor_role.fused_set:
            sets.setdefault(fused_set, []).append(member.module)

    assert sets
    for modules in sets.values():
        if modules[0] in plan_of(src).ignore:
            continue
        scales = {data(result, f"{module}.weight_global_scale") for module in modules}
        assert scales == {_global_scale(src, modules)}, modules


def _global_scale(src: Path, modules: list[str]) -> bytes:
    """Return 448 * 6 / amax as upstream computes it: reciprocal and product are rounded to BF16."""
    checkpoint, bf16 = opened(src), ml_dtypes.bfloat16
    raw = [data(checkpoint, f"{module}.weight") for module in modules]
    largest = max(np.abs(np.frombuffer(r, bf16)).max() for r in raw)
    reciprocal = (np.float32(1) / np.float32(largest)).astype(bf16).astype(np.float32)
    scale = (reciprocal * np.float32(448 * 6)).astype(bf16).astype(np.float32)
    return bytes(scale.tobytes())


@pytest.mark.upstream
@pytest.mark.parametrize("case", SPLIT)
def test_every_tensor_that_is_not_quantized_is_bit_identical(
    quantized: Callable[[str], Quantized], case: str
) -> None:
    _, src, out = quantized(case)
    source, result = opened(src), opened(out)
    linear = {a.source.name for a in plan_of(src).actions if a.scheme}
    kept = set(source.tensors) - linear

    assert linear
    assert set(result.tensors) - quantized_names(out) == kept
    assert differences(out, src, kept) == []
    assert len(quantized_names(out)) == 3 * len(linear)


@pytest.mark.parametrize("name", NAMES)
def test_awq_is_refused_if_the_family_has_no_smoothing_table(tmp_path: Path, name: str) -> None:
    plan = plan_of(make(tmp_path / "src", name), "w4a16-awq")
    (refusal,) = [finding for finding in plan.refusals if finding.rule == "not-scalable"]
    assert refusal.message == (
        "Recipe w4a16-awq scales weights and the layers that feed them, but mquant does not know "
        f"which layers feed which in {FAMILIES[name].title}."
    )
    assert refusal.fix == "Take another recipe: mquant recipes lists all."


@pytest.mark.parametrize("case", ["llama, tied", "qwen3, tied"])
def test_a_tied_head_is_on_the_ignore_list(
    quantized: Callable[[str], Quantized], case: str
) -> None:
    _, src, out = quantized(case)

    assert "lm_head.weight" not in opened(out).tensors
    declared = read_json(out / "config.json")["quantization_config"]
    assert declared["ignore"] == ["lm_head", "model.embed_tokens"]
    report = verify(Folder(out), FAMILIES, parent=Folder(src))
    assert [finding for finding in report.findings if finding.severity != "info"] == []


def test_a_tied_head_must_be_on_modelopts_ignore_list(
    quantized: Callable[[str], Quantized], tmp_path: Path
) -> None:
    _, _, out = quantized("llama, tied")
    out = export(Folder(out), FAMILIES, Target.MODELOPT, tmp_path / "out").out
    config = read_json(out / "config.json")
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.embed_tokens"]
    config["quantization_config"]["ignore"].remove("lm_head")
    (out / "config.json").write_text(json.dumps(config))

    findings = {finding.rule: finding for finding in verify(Folder(out), FAMILIES).findings}
    assert findings["kept-but-not-ignored"].message == (
        "1 module is plain on disk, but vLLM takes it for quantized: targets match it, ignore does "
        "not. First: lm_head."
    )


@pytest.mark.upstream
def test_mixtral_equals_model_free_ptq(
    quantized: Callable[[str], Quantized], tmp_path: Path
) -> None:
    _, src, out = quantized("mixtral")
    expected = model_free_ptq(one_shard(src, tmp_path / "one"), tmp_path / "expected")

    assert quantized_names(out) == quantized_names(expected)
    assert differences(out, expected, quantized_names(expected)) == []


@pytest.mark.upstream
def test_model_free_ptq_gives_deepseek_s_sets_several_scales(
    quantized: Callable[[str], Quantized], tmp_path: Path
) -> None:
    _, src, _ = quantized("deepseek_v3")
    ignore = ["lm_head", "model.embed_tokens", r"re:.*\.gate$", r"re:.*norm$"]
    expected = opened(
        model_free_ptq(one_shard(src, tmp_path / "one"), tmp_path / "expected", ignore)
    )
    sets: dict[FusedSet, set[bytes]] = {}
    for member in plan_of(src).survey.members:
        if fused_set := member.tensor_role.fused_set:
            scale = data(expected, f"{member.module}.weight_global_scale")
            sets.setdefault(fused_set, set()).add(scale)
    split = {fused[0] for fused, scales in sets.items() if len(scales) > 1}

    assert split == {"qkv_a", "expert_gate_up", "shared_gate_up"}


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MISSING, EXTRA = "tensor-missing", "block-disagrees"
# The family, changes of the tiny config.json before `synth`, changes afterwards, and the rules that
# the checkpoint breaks.
Change = tuple[str, dict[str, Any], dict[str, Any], set[str]]
CHANGES: list[Change] = [
    ("llama", {}, TIED, set()),
    ("llama", TIED, UNTIED, {MISSING}),
    ("llama", TIED, {"tie_word_embeddings": ...}, {MISSING}),
    ("llama", {}, {"attention_bias": True}, {MISSING}),
    ("llama", {"attention_bias": True}, {"attention_bias": ...}, {EXTRA}),
    ("llama", {}, {"head_dim": None}, set()),
    ("llama", {}, {"head_dim": 64}, {"shape-disagrees"}),
    ("llama", {}, {"num_key_value_heads": ...}, {"shape-disagrees"}),
    ("llama", {}, {"num_attention_heads": ...}, {"config-key-unusable"}),
    ("qwen3", {}, {"head_dim": ...}, {"config-key-unusable"}),
    ("qwen3_moe", {}, {"mlp_only_layers": ...}, set()),
    ("qwen3_moe", {}, {"mlp_only_layers": [0]}, {MISSING, EXTRA}),
    ("deepseek_v3", {}, {"first_k_dense_replace": 2}, {MISSING, EXTRA}),
    ("deepseek_v3", {}, {"first_k_dense_replace": ...}, {"config-key-unusable"}),
    ("deepseek_v3", {"n_shared_experts": None}, {}, {"output-not-loadable"}),
    ("deepseek_v3", {"n_shared_experts": None}, {"n_shared_experts": 1}, {MISSING}),
    ("deepseek_v3", {}, {"n_shared_experts": 2}, {"shape-disagrees"}),
    ("deepseek_v3", {}, {"q_lora_rank": None}, {MISSING, EXTRA}),
    (
        "deepseek_v3",
        {"q_lora_rank": None},
        {"q_lora_rank": 48},
        {MISSING, EXTRA, "fused-set-incomplete"},
    ),
    ("deepseek_v3", {}, {"num_nextn_predict_layers": 1}, set()),
    ("deepseek_v3", {}, {"num_nextn_predict_layers": ...}, set()),
    ("deepseek_v3", {}, {"num_nextn_predict_layers": 10**6}, {"config-key-unusable"}),
    (
        "deepseek_v3",
        {"num_nextn_predict_layers": 1},
        {"num_nextn_predict_layers": 0},
        {"layers-disagree"},
    ),
    (
        "deepseek_v3",
        {"num_nextn_predict_layers": 2},
        {"num_nextn_predict_layers": 1},
        {"layers-disagree"},
    ),
]


@pytest.mark.parametrize(("name", "before", "after", "broken"), CHANGES)
def test_the_tensors_must_be_those_that_config_json_implies(
    tmp_path: Path, name: str, before: dict[str, Any], after: dict[str, Any], broken: set[str]
) -> None:
    src = reconfigured(make(tmp_path / "src", name, **before), **after)

    assert rules(src) == broken


@pytest.mark.parametrize(
    "drop", ["shared_experts.up_proj.weight", "shared_experts.down_proj.weight"]
)
def test_an_incomplete_shared_expert_is_found(tmp_path: Path, drop: str) -> None:
    broken = rules(make(tmp_path / "src", "deepseek_v3", drop=drop))

    assert broken == {"fused-set-incomplete" if "up_proj" in drop else "tensor-missing"}


def mtp_plan(tmp_path: Path, **options: Any) -> Plan:
    return plan_of(make(tmp_path / "src", "deepseek_v3", num_nextn_predict_layers=1, **options))


def test_multi_token_prediction_is_copied_and_on_the_ignore_list(tmp_path: Path) -> None:
    plan = mtp_plan(tmp_path)
    beyond = [action for action in plan.actions if action.layer == 3]

    assert {action.role for action in beyond} == {Role.OTHER}
    assert not [action for action in beyond if action.scheme]
    matrices = {action.module for action in beyond if len(action.source.shape) == 2}
    assert {"model.layers.3.eh_proj", "model.layers.3.mlp.experts.7.up_proj"} <= matrices
    assert {entry for entry in plan.ignore if ".layers.3." in entry} == matrices


@pytest.mark.parametrize("drop", [".eh_proj.weight", ".shared_head.norm.weight"])
def test_an_incomplete_layer_of_multi_token_prediction_is_found(tmp_path: Path, drop: str) -> None:
    plan = mtp_plan(tmp_path, drop=drop)

    assert [finding.rule for finding in plan.findings] == ["tensor-missing"]
    assert plan.findings[0].where == f"model.layers.3{drop}"


def test_old_llama_releases_may_hold_inv_freq_tables(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    rows = tuple(row.model_copy(update={"optional": False}) for row in family.tensors)
    src = synth(tmp_path / "src", family.model_copy(update={"tensors": rows})).path
    plan = plan_of(src)
    tables = [a for a in plan.actions if a.source.name.endswith(".inv_freq")]

    assert plan.findings == ()
    assert [(a.source.shape, a.scheme) for a in tables] == [((16,), None)] * 2


def test_fp8_releases_have_every_linear_layer_in_blocks(tmp_path: Path) -> None:
    family = FAMILIES["deepseek_v3"]
    src = synth(tmp_path / "src", family, precision=Precision.FP8_BLOCK).path
    roles = {
        meaning.row.role
        for name, tensor in opened(src).tensors.items()
        if tensor.dtype == "F8_E4M3" and (meaning := family.classify(name))
    }

    assert roles == {Role.EXPERT, Role.SHARED_EXPERT, Role.MLP, Role.ATTENTION}


def test_a_copy_derives_its_names_anew() -> None:
    family = load_families()["qwen3_vl"]
    inside = family.named_for(family.synth.config)
    assert inside.named_for(family.synth.config) is not inside  # now the names are known
    alone = inside.model_copy(update={"wrapped": ()})
    assert alone.named_for(family.synth.config) is alone
