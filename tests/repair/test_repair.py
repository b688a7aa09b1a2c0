"""A broken checkpoint is repaired to the tensors and config.json of a correct run on its parent."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from corpus import EXPERT, OF_NVFP4A16, Case
from judges import hashes, model_free_ptq, one_shard, oneshot_and_save, opened, read_json
from make import Row, make_checkpoint, without, write_json, write_shard
from mquant.checkpoint import Folder
from mquant.errors import SourceError
from mquant.events import Event, Note
from mquant.loader_model.modules import read_modules
from mquant.output import RECORD
from mquant.repair.diagnose import diagnose
from mquant.repair.repair import repair
from mquant.runs.quantize import quantize
from mquant.verify.judge import Depth
from mutate import changed, mutated, scalar
from repairs import (
    FAMILIES,
    UNKNOWN,
    case_of,
    diagnosis_of,
    problems,
    refusal,
    repaired,
    right,
    tensors,
)
from run import TRAINED, plan_of

__all__ = ["right"]


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
        assert read_modules(opened(bad), FAMILIES).outcome.loads
        return
    done = repair(diagnosis, tmp_path / "out")
    assert done.parent_bytes == sum(a.source.nbytes for a in diagnosis.repair_plan.replaced)
    assert tensors(done.out) == tensors(right)
    assert read_json(done.out / "config.json") == read_json(right / "config.json")
    assert not problems(done.out)
    assert hashes(bad) == before


def change_last_byte_of(shard: Path, name: str) -> None:
    """Change the last byte of a tensor of a shard."""
    content = bytearray(shard.read_bytes())
    content[opened(shard.parent).tensors[name].end - 1] ^= 1
    shard.write_bytes(content)


def test_a_shard_unlike_its_record_is_made_again(right: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(right, tmp_path / "bad"))
    shard = sorted(bad.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert hashes(repaired(bad, tmp_path / "out"))[shard.name] == hashes(right)[shard.name]


def test_a_shard_that_another_parent_gives_is_a_warning(right: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(right, tmp_path / "bad"))
    parent = Path(shutil.copytree(TRAINED, tmp_path / "parent"))
    name = "model.embed_tokens.weight"
    embedding = opened(bad).tensors[name].shard
    change_last_byte_of(bad / embedding, name)
    change_last_byte_of(parent / opened(parent).tensors[name].shard, name)
    events: list[Event] = []
    repair(diagnosis_of(bad, parent), tmp_path / "out", emit=events.append)
    notes = [event.message for event in events if isinstance(event, Note)]
    message = f"{embedding} was made again, and is not the shard in mquant.json"
    assert f"{message}: check that PARENT is the parent of the checkpoint." in notes


def test_a_parent_unlike_its_own_record_is_refused(right: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(right, tmp_path / "bad"))
    parent = Path(shutil.copytree(TRAINED, tmp_path / "parent"))
    name = "model.embed_tokens.weight"
    change_last_byte_of(bad / opened(bad).tensors[name].shard, name)
    shard = opened(parent).tensors[name].shard
    entry = {"bytes": (parent / shard).stat().st_size, "sha256": "0" * 64}
    write_json(parent / RECORD, {"files": {shard: entry}})
    with pytest.raises(SourceError, match=f"{shard} has changed: its sha256 is .* says {'0' * 64}"):
        repair(diagnosis_of(bad, parent), tmp_path / "out")


def test_a_shard_unlike_its_record_does_not_stay(right: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(right, tmp_path / "bad"))
    (bad / "LICENSE").unlink()
    shard = sorted(bad.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    diagnosis = diagnose(Folder(bad), Folder(TRAINED), FAMILIES, Depth.STRUCTURE)
    with pytest.raises(SourceError, match=f"{shard.name} of bad has changed: its sha256 is"):
        repair(diagnosis, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


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


@pytest.mark.parametrize("engine", [{}, "stream", None, ["stream"], {"name": 7}])
def test_any_engine_in_the_source_s_mquant_json_is_repaired(
    right: Path, tmp_path: Path, engine: object
) -> None:
    bad = case_of("one router quantized").make(right, tmp_path)
    write_json(bad / RECORD, {**read_json(bad / RECORD), "engine": engine})

    assert tensors(repaired(bad, tmp_path / "out")) == tensors(right)


def test_a_second_repair_is_already_done(right: Path, tmp_path: Path) -> None:
    bad = case_of("one router quantized").make(right, tmp_path)
    assert repair(diagnosis_of(bad), tmp_path / "out").fresh
    assert not repair(diagnosis_of(bad), tmp_path / "out").fresh


def test_a_good_checkpoint_needs_no_repair(right: Path) -> None:
    assert not diagnosis_of(right).needed


def test_a_changed_norm_is_taken_from_the_parent(right: Path, tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    bad = mutated(right, tmp_path, edit=changed(name, data=lambda raw: np.flip(raw).copy()))
    assert [action.source.name for action in diagnosis_of(bad).repair_plan.replaced] == [name]


def test_a_vector_that_is_too_large_for_a_norm_is_not_read(
    right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mquant.repair.diagnose._NORM_BYTES", 8)
    name = "model.layers.0.input_layernorm.weight"
    bad = mutated(right, tmp_path, edit=changed(name, data=lambda raw: np.flip(raw).copy()))
    assert not diagnose(Folder(bad), Folder(TRAINED), FAMILIES, Depth.STRUCTURE).needed


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
