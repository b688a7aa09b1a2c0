"""The full-size model is planned from the names, dtypes and shapes of its tensors alone."""

import gzip
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from make import make_config
from mquant.checkpoint import Checkpoint, Stamp, TensorInfo
from mquant.dtypes import nbytes
from mquant.events import Emit
from mquant.family_files import load_families
from mquant.plan import DEFAULT_SHARD_BYTES, Plan, make_plan
from mquant.recipe import find_recipe

LISTING = Path(__file__).parent.parent / "data" / "minimax-m2.7-reap-154.tensors.tsv.gz"


class Listed:
    """A source that has only names, sizes and shapes of tensors."""

    name = "MiniMax-M2.7-REAP-154"
    folders = ()

    def __init__(self, files: Mapping[str, int]) -> None:
        self.files = files
        self.stamps = {path: Stamp(size) for path, size in files.items()}

    def materialize(self, emit: Emit, only: Collection[str] | None = None) -> "Listed":
        return self

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        raise AssertionError(f"a plan reads no byte of {path} [{start}, {end})")

    def identity(self) -> dict[str, str]:
        return {}


@cache
def golden() -> Plan:
    """Return the plan of the full-size listing."""
    tensors, places = {}, Counter[str]()
    lines = gzip.decompress(LISTING.read_bytes()).decode().splitlines()
    for number, line in enumerate(line for line in lines if not line.startswith("#")):
        name, dtype, sizes = line.split("\t")
        shape = tuple(map(int, sizes.split("x")))
        shard = f"model-{number // 300 + 1:05d}-of-00098.safetensors"
        end = places[shard] + nbytes(dtype, shape)
        tensors[name] = TensorInfo(name, dtype, shape, shard, places[shard], end)
        places[shard] = end
    source = Listed(places)
    checkpoint = Checkpoint(source, make_config(), tensors, tuple(sorted(places)), ())
    return make_plan(checkpoint, find_recipe("nvfp4"), load_families())


def test_the_full_size_model_is_planned_from_names_alone() -> None:
    plan = golden()

    assert plan.findings == ()
    assert (plan.survey.layers, plan.survey.experts) == (62, 154)
    assert len(plan.survey.checkpoint.tensors) == 29_267
    assert plan.source_bytes == 278_357_089_584
    assert plan.survey.checkpoint.parameters == 139_149_203_788


def test_the_full_size_model_becomes_80_gb() -> None:
    plan = golden()

    assert sum(shard.tensors for shard in plan.shards) == 87_051
    assert plan.output_bytes == 80_140_558_496
    assert all(sum(j.output_bytes for j in s.units) <= DEFAULT_SHARD_BYTES for s in plan.shards)


def test_the_full_size_model_ignores_head_embeddings_and_62_gates() -> None:
    assert golden().ignore == (
        "lm_head",
        "model.embed_tokens",
        *(f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(62)),
    )


def test_fused_sets_stay_whole_in_the_full_size_model() -> None:
    sizes = Counter(len(unit.actions) for shard in golden().shards for unit in shard.units)

    assert sizes[3] == 62
    assert sizes[2] == 62 * 154
