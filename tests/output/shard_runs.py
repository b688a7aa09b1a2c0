"""Write the shards of a plan in tests: helpers and their checks."""

import hashlib
import json
from pathlib import Path

import numpy as np

from judges import data, opened
from mquant.checkpoint import Folder, Stamp
from mquant.output import ShardSet
from mquant.plan import OutputTensor, Plan, WorkUnit


def stamps(plan: Plan) -> dict[str, Stamp]:
    source = plan.survey.checkpoint.source
    assert isinstance(source, Folder)
    return {name: source.stamps[name] for name in plan.survey.checkpoint.shards}


def outputs(plan: Plan) -> list[OutputTensor]:
    return [output for action in plan.actions for output in action.outputs]


def fill(output: OutputTensor) -> bytes:
    return bytes(np.random.default_rng(len(output.name)).integers(0, 256, output.nbytes, np.uint8))


def do(shards: ShardSet, unit: WorkUnit) -> None:
    for output in unit.outputs:
        shards.write(output.name, fill(output))


def assert_whole(out: Path, plan: Plan, digests: dict[str, str]) -> None:
    names = [shard.name for shard in plan.shards]
    assert sorted(path.name for path in out.glob("*.safetensors*")) == names
    assert digests == {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names
    }
    (out / "config.json").write_text(json.dumps(plan.survey.checkpoint.config))
    written = opened(out)
    assert written.tensors.keys() == {output.name for output in outputs(plan)}
    assert all(data(written, output.name) == fill(output) for output in outputs(plan))
