"""A broken checkpoint is repaired to the tensors and config.json of a correct run on its parent."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from corpus import EXPERT, OF_NVFP4A16, OF_OTHER_SCHEMES, Case
from judges import data, hashes, model_free_ptq, one_shard, oneshot_and_save, opened, read_json
from killed import repair_and_die
from make import Row, make_checkpoint, without, write_json, write_shard
from mquant.checkpoint import Folder
from mquant.errors import OutputError, Refused, SourceError
from mquant.family import load_families
from mquant.findings import Finding
from mquant.output import RECORD, WORK, apply
from mquant.repair.diagnose import Diagnosis, diagnose
from mquant.repair.repair import finish_in_place, repair, repair_in_place
from mquant.runs.quantize import quantize
from mquant.verify.judge import Depth, verify
from mutate import changed, mutated, scalar
from run import TRAINED, plan_of, quantize_nvfp4

FAMILIES = load_families()
UNKNOWN = "a prefix before every name"
"""The name of a case whose recipe only mquant.json can tell."""


@pytest.fixture(scope="session")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("right") / "good", shard_bytes=10**6)


def case_of(name: str) -> Case:
    return next(case for case in OF_NVFP4A16 if case.name == name)


def diagnosis_of(bad: Path, parent: Path = TRAINED) -> Diagnosis:
    return diagnose(Folder(bad), Folder(parent), FAMILIES)


def repaired(bad: Path, out: Path, parent: Path = TRAINED) -> Path:
    return repair(diagnosis_of(bad, parent), out).out


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    checkpoint = opened(folder)
    return {
        name: (info.dtype, info.shape, data(checkpoint, name))
        for name, info in checkpoint.tensors.items()
    }


def problems(folder: Path) -> list[Finding]:
    findings = verify(Folder(folder), FAMILIES, Depth.NUMBERS).findings
    return [finding for finding in findings if finding.severity != "info"]


def refusal(bad: Path, parent: Path = TRAINED) -> Finding:
    with pytest.raises(Refused) as caught:
        diagnosis_of(bad, parent)
    return caught.value.findings[0]


# --- the repaired checkpoint


@pytest.mark.parametrize(
    "case", [case for case in OF_NVFP4A16 if case.name != UNKNOWN], ids=lambda case: case.name
)
def test_a_case_is_repaired_to_the_output_of_a_correct_run(
    right: Path, tmp_path: Path, case: Case
) -> None:
    bad = case.make(right, tmp_path)
    (bad / RECORD).unlink()
    before, diagnosis = hashes(bad), diagnosis_of(bad)
    if not diagnosis.needed:
        assert tensors(bad) == tensors(right)
        return
    done = repair(diagnosis, tmp_path / "out")
    assert done.parent_bytes == sum(a.source.nbytes for a in diagnosis.repair_plan.replaced)
    assert tensors(done.out) == tensors(right)
    assert read_json(done.out / "config.json") == read_json(right / "config.json")
    assert not problems(done.out)
    assert hashes(bad) == before


def test_a_recipe_in_mquant_json_needs_no_intact_tensor(right: Path, tmp_path: Path) -> None:
    bad = case_of(UNKNOWN).make(right, tmp_path)
    assert diagnosis_of(bad).made_by == "mquant.json"
    assert tensors(repaired(bad, tmp_path / "out")) == tensors(right)


@pytest.mark.upstream
def test_a_checkpoint_of_plain_oneshot_is_repaired(right: Path, tmp_path: Path) -> None:
    bad = oneshot_and_save(TRAINED, tmp_path / "bad")
    out = repaired(bad, tmp_path / "out")
    assert tensors(out) == tensors(right)
    assert read_json(out / "config.json") == read_json(right / "config.json")


@pytest.mark.upstream
def test_a_checkpoint_of_model_free_ptq_with_the_origins_ignore_is_repaired(
    right: Path, tmp_path: Path
) -> None:
    shard = one_shard(TRAINED, tmp_path / "one")
    bad = model_free_ptq(shard, tmp_path / "bad", ignore=["lm_head"])
    diagnosis = diagnosis_of(bad)
    assert {a.role.value for a in diagnosis.repair_plan.replaced} == {"router", "embedding"}
    assert tensors(repair(diagnosis, tmp_path / "out").out) == tensors(right)


def test_attention_that_was_kept_stays_kept(tmp_path: Path) -> None:
    parent = make_checkpoint(tmp_path / "parent")
    recipe = tmp_path / "experts.yaml"
    recipe.write_text("{name: experts, suffix: x, roles: {expert: NVFP4A16}}")
    good = quantize(plan_of(parent, str(recipe)), tmp_path / "good").out
    bad = mutated(good, tmp_path, edit=without("experts.3."))
    (bad / RECORD).unlink()
    assert tensors(repaired(bad, tmp_path / "out", parent)) == tensors(good)


@pytest.fixture(scope="module")
def importance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    rows: list[Row] = []
    for action in (a for a in plan_of(TRAINED, "nvfp4-opt").actions if a.scheme):
        columns = action.source.shape[1]
        rows.append((action.module, "F32", (columns,), random.random(columns, "<f4").tobytes()))
    file = tmp_path_factory.mktemp("importance") / "importance.safetensors"
    write_shard(file, rows)
    return file


@pytest.mark.parametrize("weighed", [False, True])
def test_scales_that_were_searched_are_searched_again(
    tmp_path: Path, importance: Path, *, weighed: bool
) -> None:
    file = importance if weighed else None
    good = quantize(plan_of(TRAINED, "nvfp4-opt"), tmp_path / "good", importance=file).out
    bad = mutated(good, tmp_path, edit=without(EXPERT))
    diagnosis = diagnose(Folder(bad), Folder(TRAINED), FAMILIES, importance=file)
    out = repair(diagnosis, tmp_path / "out").out
    assert tensors(out) == tensors(good)
    records = [read_json(folder / RECORD)["fingerprint"]["importance"] for folder in (good, out)]
    assert records[0] == records[1]


def test_the_recipe_of_searched_scales_is_recognized(tmp_path: Path) -> None:
    good = quantize(plan_of(TRAINED, "nvfp4-opt"), tmp_path / "good").out
    bad = mutated(good, tmp_path, edit=without(EXPERT))
    (bad / RECORD).unlink()
    diagnosis = diagnosis_of(bad)
    assert (diagnosis.made_by, diagnosis.repair_plan.right.recipe.name) == (
        "reproduced",
        "nvfp4-opt",
    )
    assert tensors(repair(diagnosis, tmp_path / "out").out) == tensors(good)


def test_a_missing_importance_file_is_named(tmp_path: Path, importance: Path) -> None:
    plan = plan_of(TRAINED, "nvfp4-opt")
    good = quantize(plan, tmp_path / "good", importance=importance).out
    finding = refusal(mutated(good, tmp_path, edit=without(EXPERT)))
    assert finding.fix.startswith(
        "If the scales need an importance file, give the file with --importance. "
    )


# --- reads and writes


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("the origin bug: all routers quantized", {"router": 3}),
        ("routers, head and embeddings quantized", {"router": 3, "head": 1, "embedding": 1}),
        ("an expert missing", {"expert": 3}),
        ("w1 and w3 of one expert differ in their global scale", {"expert": 2}),
        ("k missing", {"attention": 3}),
        ("a router in BF16", {"router": 1}),
        ("experts as plain oneshot names them", {}),
        ("no rotary_dim", {}),
    ],
)
def test_only_replaced_tensors_of_the_parent_are_read(
    right: Path, tmp_path: Path, name: str, roles: dict[str, int]
) -> None:
    diagnosis = diagnosis_of(case_of(name).make(right, tmp_path))
    assert diagnosis.repair_plan.replaced_by_role == roles
    sizes = [action.source.nbytes for action in diagnosis.repair_plan.replaced]
    done = repair(diagnosis, tmp_path / "out")
    assert done.parent_bytes == diagnosis.repair_plan.parent_bytes == sum(sizes)


def test_tensors_stay_in_their_shards(right: Path, tmp_path: Path) -> None:
    bad = case_of("the origin bug: all routers quantized").make(right, tmp_path)
    out = repaired(bad, tmp_path / "out")
    before, after = opened(bad).tensors, opened(out).tensors
    assert {n: after[n].shard for n in after if n in before} == {
        n: before[n].shard for n in after if n in before
    }
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    assert after[gate].shard == before[f"{gate}_packed"].shard


def test_shards_without_a_change_are_hard_links(right: Path, tmp_path: Path) -> None:
    bad = case_of("an expert missing").make(right, tmp_path)
    diagnosis = diagnosis_of(bad)
    out = repair(diagnosis, tmp_path / "out").out
    kept = diagnosis.repair_plan.kept
    assert len(kept) == len(opened(out).shards) - 1 > 0
    for shard in opened(out).shards:
        assert (out / shard).samefile(bad / shard) == (shard in kept)


def test_shards_without_a_change_are_copies_on_another_file_system(
    right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    bad = case_of("an expert missing").make(right, tmp_path)
    out = repaired(bad, tmp_path / "out")
    assert tensors(out) == tensors(right)
    assert not any((out / shard).samefile(bad / shard) for shard in opened(bad).shards)


def test_the_card_stays_and_lost_side_files_come_from_the_parent(
    right: Path, tmp_path: Path
) -> None:
    bad = case_of("one router quantized").make(right, tmp_path)
    (bad / "README.md").write_text("# A card\n")
    (bad / "tokenizer.json").unlink()
    out = repaired(bad, tmp_path / "out")
    assert (out / "README.md").read_text() == "# A card\n"
    assert (out / "tokenizer.json").read_bytes() == (TRAINED / "tokenizer.json").read_bytes()


def test_mquant_json_records_findings_and_replaced_tensors(right: Path, tmp_path: Path) -> None:
    first = repaired(case_of("one router quantized").make(right, tmp_path), tmp_path / "first")
    again = mutated(first, tmp_path / "again", edit=without(EXPERT))
    record = read_json(repaired(again, tmp_path / "second") / RECORD)
    router, expert = record["repairs"]
    assert router["replaced"] == {"router": 1}
    assert router["modules"] == ["model.layers.0.block_sparse_moe.gate"]
    assert "router-quantized" in [finding["rule"] for finding in router["findings"]]
    assert expert["replaced"] == {"expert": 3}
    sizes = [info.nbytes for name, info in opened(TRAINED).tensors.items() if EXPERT in name]
    assert expert["parent_bytes"] == sum(sizes)
    assert record["recipe"]["name"] == "nvfp4"
    files = {name: entry["sha256"] for name, entry in record["files"].items()}
    assert files == {n: h for n, h in hashes(tmp_path / "second").items() if n != RECORD}


def test_a_second_repair_is_already_done(right: Path, tmp_path: Path) -> None:
    bad = case_of("one router quantized").make(right, tmp_path)
    assert repair(diagnosis_of(bad), tmp_path / "out").fresh
    assert not repair(diagnosis_of(bad), tmp_path / "out").fresh


def test_a_good_checkpoint_needs_no_repair(right: Path) -> None:
    assert not diagnosis_of(right).needed


# --- refusals


def test_another_parent_is_refused(right: Path, tmp_path: Path) -> None:
    def other(rows: list[Row]) -> list[Row]:
        return [(n, d, s, raw[::-1] if len(s) == 1 else raw) for n, d, s, raw in rows]

    stranger = mutated(TRAINED, tmp_path / "stranger", edit=other)
    bad = case_of("one router quantized").make(right, tmp_path)
    finding = refusal(bad, stranger)
    assert finding.rule == "parent-differs"
    assert finding.message.startswith("bad was not made from bad: model.layers.0.block_sparse_moe.")


def _searched(rows: list[Row]) -> list[Row]:
    """Return the rows with the codes of other scales: the lowest bit of each byte is flipped."""
    return [
        (n, d, s, bytes(b ^ 1 for b in raw) if n.endswith("weight_packed") else raw)
        for n, d, s, raw in rows
    ]


@pytest.mark.parametrize("keep_record", [True, False])
def test_quantizing_again_is_refused_if_intact_tensors_have_another_recipe(
    right: Path, tmp_path: Path, *, keep_record: bool
) -> None:
    def edit(rows: list[Row]) -> list[Row]:
        return without(EXPERT)(_searched(rows)) or rows

    bad = mutated(right, tmp_path, edit=edit)
    if not keep_record:
        (bad / RECORD).unlink()
    finding = refusal(bad)
    assert finding.rule == "recipe-not-known"
    recipe = (
        "recipe nvfp4, which mquant.json names" if keep_record else "any recipe that needs no data"
    )
    assert finding.message == (
        f"{EXPERT}w1, {EXPERT}w3, {EXPERT}w2 must be quantized again, but the intact parts were "
        f"not made from this parent with {recipe}."
    )


def test_routers_are_repaired_beside_tensors_of_another_recipe(right: Path, tmp_path: Path) -> None:
    good = mutated(right, tmp_path / "good", edit=_searched)
    bad = case_of("the origin bug: all routers quantized").make(good, tmp_path)
    (bad / RECORD).unlink()
    assert tensors(repaired(bad, tmp_path / "out")) == tensors(good)


def test_min_max_scales_are_recognized_as_nvfp4(right: Path, tmp_path: Path) -> None:
    bad = mutated(right, tmp_path, edit=without(EXPERT))
    (bad / RECORD).unlink()
    diagnosis = diagnosis_of(bad)
    assert (diagnosis.made_by, diagnosis.repair_plan.right.recipe.name) == ("reproduced", "nvfp4")


def _calibrated(right: Path, tmp_path: Path) -> Path:
    """Write a checkpoint with other codes and an mquant.json whose recipe needs data."""
    good = mutated(right, tmp_path, edit=_searched)
    record = read_json(good / RECORD)
    record["recipe"] |= {"name": "nvfp4-gptq", "rounding": "gptq"}
    write_json(good / RECORD, record)
    return good


def test_a_calibrated_checkpoint_is_not_quantized_again(right: Path, tmp_path: Path) -> None:
    bad = mutated(_calibrated(right, tmp_path / "good"), tmp_path, edit=without(EXPERT))
    finding = refusal(bad)
    assert finding.rule == "recipe-not-known"
    assert finding.message == (
        f"{EXPERT}w1, {EXPERT}w3, {EXPERT}w2 must be quantized again, but recipe nvfp4-gptq, which "
        "mquant.json names, depends on the data it was calibrated with."
    )
    assert finding.fix == (
        "Quantize the parent again: mquant quantize PARENT --recipe nvfp4-gptq --data FILE."
    )


def test_routers_of_a_calibrated_checkpoint_are_repaired(right: Path, tmp_path: Path) -> None:
    good = _calibrated(right, tmp_path / "good")
    bad = case_of("the origin bug: all routers quantized").make(good, tmp_path)
    assert tensors(repaired(bad, tmp_path / "out")) == tensors(good)


def test_without_known_names_and_mquant_json_repair_is_refused(right: Path, tmp_path: Path) -> None:
    bad = case_of(UNKNOWN).make(right, tmp_path)
    (bad / RECORD).unlink()
    assert refusal(bad).message == (
        "bad has no mquant.json and no quantized module with a known name: mquant cannot tell how "
        "the checkpoint was made."
    )


@pytest.mark.parametrize("keep_record", [True, False])
def test_experts_in_nvfp4_beside_attention_in_fp8_are_refused(
    tmp_path: Path, *, keep_record: bool
) -> None:
    good = quantize(plan_of(TRAINED, "nvfp4-fp8"), tmp_path / "mixed").out
    bad = mutated(good, tmp_path, edit=without(EXPERT))
    if not keep_record:
        (bad / RECORD).unlink()
    finding = refusal(bad)
    assert finding.rule == "layout-not-repairable"
    assert finding.message == "bad is quantized as FP8; mquant repairs NVFP4A16."


@pytest.mark.parametrize("case", OF_OTHER_SCHEMES, ids=lambda case: case.name)
def test_other_schemes_are_refused(right: Path, tmp_path: Path, case: Case) -> None:
    bad = case.make(right, tmp_path)
    before, finding = hashes(bad), refusal(bad)
    assert finding.rule == "layout-not-repairable"
    assert finding.message.startswith("bad is quantized as ")
    assert finding.message.endswith("; mquant repairs NVFP4A16.")
    assert hashes(bad) == before


def test_a_broken_parent_is_refused(right: Path, tmp_path: Path) -> None:
    parent = mutated(TRAINED, tmp_path / "parent", edit=without("layers.1.block_sparse_moe.gate."))
    bad = case_of("one router quantized").make(right, tmp_path)
    assert refusal(bad, parent).rule == "tensor-missing"


# --- in place


@pytest.fixture
def bad(right: Path, tmp_path: Path) -> Path:
    """A checkpoint with quantized routers and a spare shard, without an expert and a side file."""

    def edit(rows: list[Row]) -> list[Row]:
        case = case_of("the origin bug: all routers quantized")
        assert case.edit
        return without(EXPERT)(case.edit(rows) or rows) or rows

    folder = mutated(right, tmp_path, edit=edit)
    (folder / "tokenizer.json").unlink()
    shutil.copy(folder / opened(folder).shards[0], folder / "model-spare.safetensors")
    return folder


def test_repair_in_place_gives_the_same_checkpoint(bad: Path, right: Path, tmp_path: Path) -> None:
    out = repaired(bad, tmp_path / "out")
    repair_in_place(diagnosis_of(bad))
    assert tensors(bad) == tensors(right)
    assert hashes(bad).keys() == hashes(out).keys()
    assert not (bad / WORK).exists()
    assert not problems(bad)
    assert not diagnosis_of(bad).needed


def test_a_rerun_finishes_after_a_kill_at_any_change_of_the_folder(
    bad: Path, right: Path, tmp_path: Path
) -> None:
    expected = tensors(right)
    for most in range(200):
        copy = Path(shutil.copytree(bad, tmp_path / f"copy-{most}"))
        stopped = repair_and_die(copy, TRAINED, most) != 0
        if (copy / "config.json").exists() and not (copy / WORK / "apply.json").exists():
            assert tensors(copy) in (expected, tensors(bad))
        if not finish_in_place(copy) and diagnosis_of(copy).needed:
            repair_in_place(diagnosis_of(copy))
        assert tensors(copy) == expected
        assert not (copy / WORK).exists()
        shutil.rmtree(copy)
        if not stopped:
            break
    assert not stopped
    assert most > 15


def test_a_link_in_a_path_of_the_journal_is_not_followed(bad: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (bad / "sub").symlink_to(elsewhere)
    (bad / WORK / "sub").mkdir(parents=True)
    (bad / WORK / "sub/file").write_text("x")
    table = {"schema": "mquant.apply/1", "files": ["sub/file"], "obsolete": []}
    write_json(bad / WORK / "apply.json", table)
    with pytest.raises(
        OutputError, match=r"sub/file would be outside of .*by its name, or by a link"
    ):
        apply(bad)
    assert not any(elsewhere.iterdir())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "other"}'])
def test_a_strange_journal_is_refused(bad: Path, text: str) -> None:
    (bad / WORK).mkdir()
    (bad / WORK / "apply.json").write_text(text)
    before = hashes(bad)
    with pytest.raises(OutputError, match="is not a journal of mquant"):
        finish_in_place(bad)
    assert hashes(bad) == before


def test_a_journal_cannot_name_a_file_outside_the_folder(bad: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    (bad / WORK).mkdir()
    names = ["../precious", str(precious)]
    table = {"schema": "mquant.apply/1", "files": names, "obsolete": names}
    (bad / WORK / "apply.json").write_text(json.dumps(table))
    with pytest.raises(OutputError, match="would be outside of"):
        apply(bad)
    assert precious.read_text() == "x"


def test_a_changed_norm_is_taken_from_the_parent(right: Path, tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    bad = mutated(right, tmp_path, edit=changed(name, data=lambda raw: np.flip(raw).copy()))
    assert [action.source.name for action in diagnosis_of(bad).repair_plan.replaced] == [name]


def test_a_parent_that_shrinks_is_one_sentence(right: Path, tmp_path: Path) -> None:
    parent = Path(shutil.copytree(TRAINED, tmp_path / "parent"))
    bad = case_of("the origin bug: all routers quantized").make(right, tmp_path)
    diagnosis = diagnosis_of(bad, parent)
    for shard in opened(parent).shards:
        os.truncate(parent / shard, 1000)
    with pytest.raises(SourceError, match=r"changed while it was read|ends at byte"):
        repair(diagnosis, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


def test_a_scale_that_is_wrong_in_one_place_costs_its_fused_set(
    right: Path, tmp_path: Path
) -> None:
    edit = changed(EXPERT + "w2.weight_global_scale", data=scalar(float("nan")))
    diagnosis = diagnosis_of(mutated(right, tmp_path, edit=edit))
    assert [action.source.name for action in diagnosis.repair_plan.replaced] == [
        EXPERT + "w2.weight"
    ]
