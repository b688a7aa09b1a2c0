"""A plan gives every output one place in one shard, before a weight is read."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from make import NUMPY, make_checkpoint, write_index, write_shard
from make import make_row as row
from mquant.checkpoint import Folder, TensorInfo, open_checkpoint, read_header
from mquant.family_files import load_families
from mquant.plan import DEFAULT_SHARD_BYTES, make_plan
from mquant.recipe import find_recipe
from plan.planning import planned, with_odd_norm


@pytest.mark.parametrize("shard_bytes", [1, 3_000, 10_000, DEFAULT_SHARD_BYTES])
def test_a_fused_set_is_one_work_unit_even_if_the_parent_cuts_it(
    src: Path, shard_bytes: int
) -> None:
    plan = planned(src, shard_bytes=shard_bytes)
    units = [
        {action.module.rpartition(".")[2] for action in unit.actions}
        for shard in plan.shards
        for unit in shard.units
        if len(unit.actions) > 1
    ]
    cut = [
        unit
        for shard in plan.shards
        for unit in shard.units
        if len({action.source.shard for action in unit.actions}) > 1
    ]

    assert Counter(map(frozenset, units)) == {
        frozenset({"q_proj", "k_proj", "v_proj"}): 2,
        frozenset({"w1", "w3"}): 8,
    }
    assert len(cut) == 2  # the parent has three shards, and each of the two cuts splits a fused set
    for shard in plan.shards:
        for unit in shard.units:
            assert len({(action.layer, action.expert) for action in unit.actions}) == 1


@pytest.mark.parametrize("limit", [1, 5_000, 20_000, 60_000])
def test_a_shard_stays_within_the_limit_unless_one_work_unit_exceeds_it(
    src: Path, limit: int
) -> None:
    shards = planned(src, shard_bytes=limit).shards

    assert len(shards) > 1
    for shard in shards:
        size = sum(unit.output_bytes for unit in shard.units)
        assert size <= limit or len(shard.units) == 1
    for shard, following in pairwise(shards):
        size = sum(unit.output_bytes for unit in shard.units)
        assert size + following.units[0].output_bytes > limit  # every new shard was necessary


def test_shards_are_numbered_to_their_total(src: Path) -> None:
    shards = planned(src, shard_bytes=40_000).shards

    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]


def test_planned_files_are_what_safetensors_reads(src: Path, tmp_path: Path) -> None:
    plan = planned(src, shard_bytes=20_000)

    for shard in plan.shards:
        outputs = [output for unit in shard.units for output in unit.outputs]
        first, starts = shard.layout
        file = tmp_path / shard.name
        file.write_bytes(first + bytes(shard.file_bytes - len(first)))
        tensors = {t.name: (t.start, t.dtype, t.shape) for t in _tensors(file)}
        assert tensors == {o.name: (starts[o.name], o.dtype, o.shape) for o in outputs}
        with safe_open(file, framework="np") as opened:
            assert set(opened.keys()) == tensors.keys()
        assert shard.tensors == len(outputs)
    assert plan.file_bytes == sum(shard.file_bytes for shard in plan.shards)
    assert plan.output_bytes == sum(a.output_bytes for a in plan.actions)
    assert plan.source_bytes == open_checkpoint(Folder(src)).nbytes


def test_tensors_are_stored_in_the_order_of_the_work_units(src: Path) -> None:
    for shard in planned(src, shard_bytes=20_000).shards:
        first, starts = shard.layout
        position = len(first)
        for output in (output for unit in shard.units for output in unit.outputs):
            assert starts[output.name] == position
            position += output.nbytes


def test_tensors_are_stored_in_safetensors_order_if_one_would_be_misaligned(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(Folder(make_checkpoint(tmp_path / "src", edit=with_odd_norm)))
    plan = make_plan(checkpoint, find_recipe("nvfp4"), load_families())
    (shard,) = plan.shards
    outputs = [output for unit in shard.units for output in unit.outputs]
    arrays = {o.name: np.zeros(o.shape, NUMPY[o.dtype]) for o in outputs}
    save_file(arrays, tmp_path / "expected.safetensors", metadata={"format": "pt"})

    first, starts = shard.layout

    assert (tmp_path / "expected.safetensors").read_bytes().startswith(first)
    assert all(starts[o.name] % NUMPY[o.dtype].itemsize == 0 for o in outputs)


def _tensors(path: Path) -> tuple[TensorInfo, ...]:
    return read_header(Folder(path.parent), path.name)


def test_an_unsorted_parent_is_planned(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", edit=lambda rows: rows[::-1])

    assert planned(src).findings == ()


def test_a_fused_set_in_three_shards_is_one_work_unit(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", shards=1)
    rows = {t.name: row(t.name, t.dtype, t.shape) for t in _tensors(src / "model.safetensors")}
    (src / "model.safetensors").unlink()
    where = {}
    for number, (name, tensor) in enumerate(rows.items()):
        where[name] = f"{number % 47:02d}.safetensors"
        write_shard(src / where[name], [tensor])
    write_index(src, where)

    plan = planned(src)

    assert plan.findings == ()
    (unit,) = [
        unit
        for shard in plan.shards
        for unit in shard.units
        if any(a.module == "model.layers.0.self_attn.q_proj" for a in unit.actions)
    ]
    assert len({action.source.shard for action in unit.actions}) == 3
