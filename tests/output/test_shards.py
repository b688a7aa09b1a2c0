"""Shards: written at planned places, whole under their final name or not there."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from make import make_checkpoint
from mquant.checkpoint import Folder, open_checkpoint
from mquant.errors import EngineError, OutputError
from mquant.events import Event, Progress
from mquant.family import load_families
from mquant.output import ShardSet
from mquant.plan import Output, Plan, make_plan
from mquant.recipe import find_recipe


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    checkpoint = open_checkpoint(Folder(make_checkpoint(tmp_path / "src", shards=3)))
    return make_plan(checkpoint, find_recipe("nvfp4"), load_families(), max_shard_bytes=20_000)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def quantized(plan: Plan) -> list[Output]:
    return [output for action in plan.actions if action.scheme for output in action.outputs]


def fill(output: Output) -> bytes:
    return bytes(np.random.default_rng(len(output.name)).integers(0, 256, output.nbytes, np.uint8))


def test_every_planned_tensor_lands_in_its_shard(plan: Plan, out: Path) -> None:
    shards = ShardSet(out, plan)
    for output in reversed(quantized(plan)):  # in any order
        shards.write(output.name, fill(output))
    shards.finish()
    assert sorted(path.name for path in out.iterdir()) == [shard.name for shard in plan.shards]
    for shard in plan.shards:
        assert (out / shard.name).stat().st_size == shard.file_bytes
        with safe_open(out / shard.name, framework="np") as file:
            names = {o.name for job in shard.jobs for o in job.outputs}
            assert set(file.keys()) == names
    packed = {o.name: fill(o) for o in quantized(plan)}
    written = open_checkpoint(_with_config(out, plan))
    for tensor in written.tensors.values():
        if tensor.name in packed:
            data = written.source.read(tensor.shard, tensor.start, tensor.end)
            assert data == packed[tensor.name]


def _with_config(out: Path, plan: Plan) -> Folder:
    (out / "config.json").write_text(json.dumps(plan.survey.checkpoint.config))
    return Folder(out)


def test_copied_tensors_are_the_parents_bytes(plan: Plan, out: Path, tmp_path: Path) -> None:
    shards = ShardSet(out, plan)
    for output in quantized(plan):
        shards.write(output.name, fill(output))
    shards.finish()
    parent = open_checkpoint(Folder(tmp_path / "src"))
    written = open_checkpoint(_with_config(out, plan))
    copied = [a.source.name for a in plan.actions if a.scheme is None]
    assert "model.layers.0.block_sparse_moe.gate.weight" in copied
    for name in copied:
        theirs, ours = parent.tensors[name], written.tensors[name]
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert written.source.read(ours.shard, ours.start, ours.end) == parent.source.read(
            theirs.shard, theirs.start, theirs.end
        )


def test_a_shard_is_a_partial_until_its_last_tensor(plan: Plan, out: Path) -> None:
    shards = ShardSet(out, plan)
    first = quantized(plan)[0]
    shards.write(first.name, fill(first))
    assert [path.suffix for path in out.iterdir()] == [".partial"]
    shards.abandon()


def test_a_tensor_of_another_size_than_planned_is_refused(plan: Plan, out: Path) -> None:
    shards = ShardSet(out, plan)
    first = quantized(plan)[0]
    with pytest.raises(EngineError, match=f"{first.nbytes:,} were planned"):
        shards.write(first.name, fill(first)[:-1])
    shards.abandon()


def test_a_tensor_the_plan_does_not_await_is_refused(plan: Plan, out: Path) -> None:
    with pytest.raises(EngineError, match=r"lm_head\.weight_packed, which is not in the plan"):
        ShardSet(out, plan).write("lm_head.weight_packed", b"")


def test_a_tensor_written_twice_is_refused(plan: Plan, out: Path) -> None:
    shards = ShardSet(out, plan)
    first = quantized(plan)[0]
    shards.write(first.name, fill(first))
    with pytest.raises(EngineError, match="does not await"):
        shards.write(first.name, fill(first))
    shards.abandon()


def test_finishing_without_a_planned_tensor_names_it(plan: Plan, out: Path) -> None:
    shards = ShardSet(out, plan)
    first, *rest = quantized(plan)
    for output in rest:
        shards.write(output.name, fill(output))
    with pytest.raises(EngineError, match=f"did not make {first.name}"):
        shards.finish()
    shards.abandon()


def test_a_full_disk_is_one_sentence(
    plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    first = quantized(plan)[0]
    with pytest.raises(OutputError) as caught:
        ShardSet(out, plan).write(first.name, fill(first))
    assert caught.value.message.startswith("The disk is full: model-00001-of-")
    assert caught.value.fix == "Free space, then run the same command again."


def test_progress_ends_at_the_planned_total(plan: Plan, out: Path) -> None:
    events: list[Event] = []
    shards = ShardSet(out, plan, events.append)
    for output in quantized(plan):
        shards.write(output.name, fill(output))
    shards.finish()
    assert events[-1] == Progress("quantize", plan.output_bytes, plan.output_bytes)
