"""A plan's memory grows with the number of tensors by a known amount for each."""

import tracemalloc
from pathlib import Path

import pytest

from make import make_checkpoint
from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.plan import build, make_plan
from mquant.recipe import find_recipe
from mquant.synth import Sizes, synth

EACH = 1_000
"""Bytes for each tensor of the source; three outputs with their names alone took as much."""


def held_by_a_plan(folder: Path, experts: int) -> tuple[int, int]:
    """Return the bytes that a plan holds, and the number of tensors of the source."""
    families, recipe = load_families(), find_recipe("nvfp4")
    synth(folder, families["qwen3_moe"], sizes=Sizes(layers=2, experts=experts), shapes_only=True)
    checkpoint = open_checkpoint(Folder(folder))
    tracemalloc.start()
    try:
        plan = make_plan(checkpoint, recipe, families)
        return tracemalloc.get_traced_memory()[0], sum(1 for _ in plan.actions)
    finally:
        tracemalloc.stop()


def test_a_plan_holds_less_than_a_kilobyte_for_each_tensor(tmp_path: Path) -> None:
    few, tensors = held_by_a_plan(tmp_path / "few", 64)
    many, more_tensors = held_by_a_plan(tmp_path / "many", 576)
    assert (many - few) / (more_tensors - tensors) < EACH


def test_an_output_of_too_many_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = make_checkpoint(tmp_path / "model")
    families, recipe = load_families(), find_recipe("nvfp4")

    def refusals() -> list[str]:
        plan = make_plan(open_checkpoint(Folder(src)), recipe, families)
        return [finding.rule for finding in plan.refusals]

    tensors = make_plan(open_checkpoint(Folder(src)), recipe, families).output_tensors
    monkeypatch.setattr(build, "MAX_TENSORS", tensors)
    assert refusals() == []
    monkeypatch.setattr(build, "MAX_TENSORS", tensors - 1)
    assert refusals() == ["output-too-many"]
