"""`scales: search` lowers the error of every weight, and --importance weighs the errors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges import data, differences, hashes, opened, read_json
from make import make_checkpoint, write_shard
from mquant.checkpoint import Folder
from mquant.engines.importance import open_importance
from mquant.errors import DataFileError, OutputError, SourceError, UsageError
from mquant.events import Emit, Event, Progress, silent
from mquant.family_files import load_families
from mquant.loader_model.modules import read_modules
from mquant.numerics.floats import BF16, FLOATS, Array, Floats
from mquant.runs.quantize import quantize
from mquant.runs.spec import Engine
from mquant.verify.judge import Depth, verify
from mquant.weights.stored_weight import weight_of
from run import TRAINED, plan_of, quantize_nvfp4

SMALL = 20_000
"""The bytes of an output shard, so few that a small checkpoint has several shards."""
Vectors = dict[str, Floats]


def quantize_searched(
    src: Path,
    out: Path,
    importance: Path | None = None,
    emit: Emit = silent,
    workers: int | None = None,
) -> Path:
    plan = plan_of(src, "nvfp4-opt", SMALL)
    quantize(plan, out, importance=importance, emit=emit, workers=workers)
    return out


def widths(src: Path) -> dict[str, int]:
    """Return the number of input channels of each quantized module."""
    plan = plan_of(src, "nvfp4-opt")
    return {a.module: a.source.shape[1] for a in plan.actions if a.scheme}


def vectors(src: Path, seed: int = 0) -> Vectors:
    random = np.random.default_rng(seed)
    return {
        module: random.lognormal(0, 2, width).astype(np.float32)
        for module, width in widths(src).items()
    }


def write_vectors(path: Path, importance: Mapping[str, Array]) -> Path:
    names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
    rows = [(name, names[v.dtype], v.shape, v.tobytes()) for name, v in importance.items()]
    write_shard(path, rows)
    return path


def errors(out: Path, src: Path, importance: Vectors | None = None) -> dict[str, float]:
    """Return every quantized module's squared error, weighed by importance.

    `verify`'s decoder reads the weights.
    """
    view = read_modules(opened(out), load_families())
    parent = opened(src)
    result = {}
    for module in view.quantized:
        info = parent.tensors[f"{module.name}.weight"]
        raw = np.frombuffer(data(parent, info.name), FLOATS[info.dtype].word)
        original = FLOATS[info.dtype].values(raw).reshape(info.shape).astype(np.float64)
        weight = weight_of(view, module)
        assert weight
        squares = np.square(weight.rows(0, info.shape[0]).values - original)
        result[module.name] = float((squares * (importance or {}).get(module.name, 1)).sum())
    return result


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small") / "src", layers=1, experts=2, shards=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_searched(TRAINED, tmp_path_factory.mktemp("opt") / "out")


def test_every_tensor_has_a_smaller_error_than_with_min_max(trained: Path, tmp_path: Path) -> None:
    minmax = errors(quantize_nvfp4(TRAINED, tmp_path / "minmax"), TRAINED)
    searched = errors(trained, TRAINED)
    assert len(searched) == 102
    assert all(searched[name] < 0.8 * minmax[name] for name in minmax)


def test_only_scales_and_codes_differ_from_min_max(trained: Path, tmp_path: Path) -> None:
    minmax = quantize_nvfp4(TRAINED, tmp_path / "minmax", shard_bytes=SMALL)
    tensors, expected = opened(trained).tensors, opened(minmax).tensors
    assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in expected.items()
    }
    config = "config.json"
    assert read_json(trained / config) == read_json(minmax / config)
    suffixes = {n.rpartition(".")[2] for n in differences(trained, minmax, set(tensors))}
    assert suffixes <= {"weight_packed", "weight_scale", "weight_global_scale"}


def test_verify_finds_every_weight_within_its_bounds(trained: Path) -> None:
    report = verify(Folder(trained), load_families(), Depth.FULL, parent=Folder(TRAINED))
    assert not [finding for finding in report.findings if finding.severity != "info"]


def test_global_scales_are_shared_by_fused_sets_and_bf16(trained: Path) -> None:
    checkpoint = opened(trained)
    scales = {
        name: np.frombuffer(data(checkpoint, name), np.float32)[0]
        for name in checkpoint.tensors
        if name.endswith("weight_global_scale")
    }
    assert all(scale == np.float32(BF16.value.type(scale)) for scale in scales.values())
    for name, scale in scales.items():
        assert scale == scales[name.replace(".w3.", ".w1.").replace(".k_proj", ".q_proj")]


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_dtypes_are_searched_too(tmp_path: Path, dtype: str) -> None:
    src = make_checkpoint(tmp_path / "src", dtype=dtype)
    searched = errors(quantize_searched(src, tmp_path / "searched"), src)
    minmax = errors(quantize_nvfp4(src, tmp_path / "minmax"), src)
    assert all(searched[name] < 0.85 * minmax[name] for name in minmax)


def test_recipe_yaml_says_that_mquant_searched_the_scales(trained: Path) -> None:
    assert "# mquant searches the scales;" in (trained / "recipe.yaml").read_text()


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_workers_changes_no_byte(trained: Path, tmp_path: Path, workers: int) -> None:
    file = write_vectors(tmp_path / "i.safetensors", vectors(TRAINED))
    assert hashes(quantize_searched(TRAINED, tmp_path / "many", workers=workers)) == hashes(trained)
    one = quantize_searched(TRAINED, tmp_path / "i1", file, workers=1)
    assert hashes(quantize_searched(TRAINED, tmp_path / "i2", file, workers=workers)) == hashes(one)


def test_a_stopped_run_resumes_to_the_same_bytes(src: Path, tmp_path: Path) -> None:
    file = write_vectors(tmp_path / "i.safetensors", vectors(src))
    whole = hashes(quantize_searched(src, tmp_path / "whole", file))
    out, units = tmp_path / "out", 0

    def stop(event: Event) -> None:
        nonlocal units
        units += isinstance(event, Progress) and event.stage == "quantize"
        if units == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_searched(src, out, file, stop, workers=1)
    events: list[Event] = []
    assert hashes(quantize_searched(src, out, file, events.append)) == whole
    assert next(e.done for e in events if isinstance(e, Progress)) > 0


# --- importance


def test_importance_lowers_the_weighed_error(src: Path, tmp_path: Path) -> None:
    importance = vectors(src)
    file = write_vectors(tmp_path / "i.safetensors", importance)
    weighed = errors(quantize_searched(src, tmp_path / "weighed", file), src, importance)
    plain = errors(quantize_searched(src, tmp_path / "plain"), src, importance)
    assert sum(weighed.values()) < 0.9 * sum(plain.values())


def test_the_runs_record_has_the_files_sha256(src: Path, tmp_path: Path) -> None:
    file = write_vectors(tmp_path / "i.safetensors", vectors(src))
    out = quantize_searched(src, tmp_path / "out", file)
    record = read_json(out / "mquant.json")
    assert record["fingerprint"]["importance"] == hashes(tmp_path)["i.safetensors"]
    assert record["recipe"]["name"] == "nvfp4-opt"
    assert record["recipe"]["scales"] == "search"
    plain = read_json(quantize_searched(src, tmp_path / "plain") / "mquant.json")
    assert plain["fingerprint"]["importance"] == "none"


def test_another_importance_file_is_another_run(src: Path, tmp_path: Path) -> None:
    out = quantize_searched(
        src, tmp_path / "out", write_vectors(tmp_path / "a.safetensors", vectors(src))
    )
    other = write_vectors(tmp_path / "b.safetensors", vectors(src, seed=1))
    with pytest.raises(OutputError, match="importance was"):
        quantize_searched(src, out, other)
    with pytest.raises(OutputError, match="importance was"):
        quantize_searched(src, out)


Q = "model.layers.0.self_attn.q_proj"


def put(name: str, value: Array) -> Callable[[Vectors], None]:
    return lambda table: table.update({name: value})


def drop(part: str) -> Callable[[Vectors], None]:
    def edit(table: dict[str, Any]) -> None:
        for name in [name for name in table if part in name]:
            del table[name]

    return edit


def ones(count: int, last: float = 1) -> Floats:
    return np.array([1] * (count - 1) + [last], np.float32)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(Q), f"i.safetensors lacks 1 of 10 modules, the first is {Q}."),
        (drop(".experts."), "lacks 6 of 10 modules, the first is model.layers.0.block_sparse_moe."),
        (put("lm_head", ones(64)), "i.safetensors has lm_head, which the plan does not quantize."),
        (put(Q, ones(32)), f"{Q} in i.safetensors is F32 [32]; its module needs F32 [64]."),
        (put(Q, np.ones(64, np.float16)), f"{Q} in i.safetensors is F16 [64]; its module needs"),
        (put(Q, ones(64, np.nan)), f"{Q} in i.safetensors has nan for channel 63;"),
        (put(Q, ones(64, np.inf)), f"{Q} in i.safetensors has inf for channel 63;"),
        (put(Q, ones(64, -1)), f"{Q} in i.safetensors has -1 for channel 63;"),
    ],
)
def test_an_importance_file_that_does_not_fit_is_one_sentence(
    src: Path, tmp_path: Path, edit: Callable[[Vectors], None], message: str
) -> None:
    importance = vectors(src)
    edit(importance)
    file = write_vectors(tmp_path / "i.safetensors", importance)
    with pytest.raises(DataFileError) as caught:
        quantize_searched(src, tmp_path / "out", file)
    assert message in caught.value.message
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_missing_importance_file_is_one_sentence(src: Path, tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"none.safetensors cannot be read: No such file"):
        quantize_searched(src, tmp_path / "out", tmp_path / "none.safetensors")


def test_an_importance_file_that_changes_stops_the_run(src: Path, tmp_path: Path) -> None:
    file = write_vectors(tmp_path / "i.safetensors", vectors(src))
    importance = open_importance(file, plan_of(src, "nvfp4-opt"))
    assert np.array_equal(importance.of(Q), vectors(src)[Q])
    write_vectors(file, vectors(src, seed=1))
    with pytest.raises(SourceError, match=r"i.safetensors changed while it was read"):
        importance.of(Q)


def test_engines_and_recipes_without_a_search_refuse_its_options(src: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        quantize(plan_of(src, "nvfp4-opt"), tmp_path / "out", engine=Engine.ONESHOT)
    assert caught.value.message == (
        "Recipe nvfp4-opt searches scales, which only the stream engine does."
    )
    file = write_vectors(tmp_path / "i.safetensors", vectors(src))
    with pytest.raises(UsageError) as caught:
        quantize(plan_of(src, "nvfp4"), tmp_path / "out", importance=file)
    assert caught.value.message == (
        "Recipe nvfp4 has no scales searched, so --importance has no effect."
    )
