"""Repair refuses a wrong parent, another layout or an unknown recipe; routers need no recipe."""

from pathlib import Path

import pytest

from corpus import EXPERT, OF_OTHER_SCHEMES, Case
from judges import hashes, read_json
from make import Row, without, write_json
from mquant.output import RECORD
from mquant.runs.quantize import quantize
from mutate import mutated
from repairs import UNKNOWN, case_of, diagnosis_of, refusal, repaired, right, tensors
from run import TRAINED, plan_of

__all__ = ["right"]


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


LACKING = [case for case in OF_OTHER_SCHEMES if case.rules & {"part-missing", "part-shape"}]


@pytest.mark.parametrize("case", LACKING, ids=lambda case: case.name)
def test_other_schemes_that_lack_a_part_are_refused(
    right: Path, tmp_path: Path, case: Case
) -> None:
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


@pytest.mark.parametrize("declared", [[2**62, 4, 0], "nvfp4", 7])
def test_a_quantization_config_that_is_no_table_counts_as_none(
    right: Path, tmp_path: Path, declared: object
) -> None:
    bad = mutated(right, tmp_path / "bad", edit=without(EXPERT))
    (bad / RECORD).unlink()
    config = read_json(bad / "config.json")
    write_json(bad / "config.json", {**config, "quantization_config": declared})
    assert refusal(bad, bad).rule == "repair-cannot-mend"
