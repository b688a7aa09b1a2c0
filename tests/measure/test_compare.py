"""`compare` measures how far weights are from the parent's, in every layout, and resumes."""

import json
import os
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import schemes
from fakehub import FakeHub, hub
from judges import opened, read_json
from make import Edit, make_checkpoint, without
from mquant.checkpoint import Folder, Reader, reader_of
from mquant.checkpoint.hub import HubRepo
from mquant.events import Event, Note, Progress
from mquant.family_files import load_families
from mquant.loader_model.modules import read_modules
from mquant.measure.comparison import Comparison, ErrorStats, compare, error_stats
from mquant.measure.comparison_cache import ComparisonCache
from mquant.measure.difference import Difference
from mquant.weights.matrix import Scratch, matrix_of
from mquant.weights.stored_weight import weight_of
from mutate import changed, mutated, setting
from run import TRAINED

__all__ = ["hub"]  # the fixture

W2 = "model.layers.1.block_sparse_moe.experts.8.w2.weight"
NORM = "model.layers.0.input_layernorm.weight"
Config = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/mquant/compare"


def compared(folder: Path, parent: Path = TRAINED, **options: Any) -> Comparison:
    return compare(Folder(folder), Folder(parent), load_families(), **options)


def rewritten(folder: Path, out: Path, edit: Edit | None, config: Config | None) -> Path:
    """Write a copy in another scheme."""
    table = read_json(folder / "config.json")
    if config is not None:
        config(table)
    return mutated(folder, out, edit=edit, config=table)


def one(result: Comparison, name: str) -> Difference:
    (difference,) = (tensor for tensor in result.tensors if tensor.name == name)
    return difference


def values(folder: Path, module: str) -> np.ndarray[Any, Any]:
    """Return a weight in float64, as `verify`'s decoder reads it."""
    view = read_modules(opened(folder), load_families())
    weight = weight_of(view, view.modules[module])
    assert weight is not None
    return weight.rows(0, weight.shape[0]).values.astype(np.float64)


def test_errors_follow_their_definition(trained: Path) -> None:
    x, y = (values(path, W2.removesuffix(".weight")) for path in (TRAINED, trained))
    difference = one(compared(trained), W2)
    error = error_stats(difference)
    noise = np.linalg.norm(x - y) / np.linalg.norm(x)
    assert error.relative == pytest.approx(noise, rel=1e-12)
    assert error.sqnr == pytest.approx(-20 * np.log10(noise), rel=1e-12)
    cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    assert error.cosine == pytest.approx(cosine, rel=1e-12)
    assert (difference.form, difference.parent_form, difference.role) == ("NVFP4", "BF16", "expert")
    assert (difference.layer, difference.expert, difference.elements) == (1, 8, x.size)


def test_the_worst_block_has_the_largest_error(trained: Path) -> None:
    x, y = (values(path, W2.removesuffix(".weight")) for path in (TRAINED, trained))
    blocks = np.square(x - y).reshape(len(x), -1, 16).sum(2)
    row, block = np.unravel_index(blocks.argmax(), blocks.shape)
    relative = np.sqrt(blocks[row, block] / np.square(x[row, block * 16 : block * 16 + 16]).sum())
    worst = one(compared(trained), W2).worst
    assert worst is not None
    assert worst[:2] == (row, block * 16)
    assert worst[2] == pytest.approx(relative, rel=1e-6)


LAYOUTS: dict[str, tuple[Edit | None, Config | None]] = {
    "NVFP4": (None, None),
    "NVFP4 W4A4": (schemes.with_input_scales, schemes.w4a4),
    "ModelOpt NVFP4": (schemes.as_modelopt, schemes.modelopt),
    "FP8 by channel": (schemes.FP8_CHANNEL, schemes.fp8_channel),
    "FP8 in blocks": (schemes.FP8_BLOCKS, schemes.fp8_blocks),
    "INT4": (schemes.INT4, schemes.int4),
}


@pytest.mark.parametrize("view", LAYOUTS)
def test_every_layout_is_decoded_as_the_judge_decodes_it(
    view: str, trained: Path, tmp_path: Path
) -> None:
    edit, config = LAYOUTS[view]
    folder = rewritten(trained, tmp_path, edit, config)
    opened_layout = read_modules(opened(folder), load_families())
    module = opened_layout.modules[W2.removesuffix(".weight")]
    matrix = matrix_of(opened_layout, module, reader_of(Folder(folder)))
    assert matrix is not None
    out = np.full((60, matrix.shape[1]), np.nan, np.float32)
    matrix.read(3, 63, out, Scratch())  # rows that cut blocks of rows at both ends
    assert (out == values(folder, module.name)[3:63]).all()
    assert 0.005 < compared(folder).total.relative < 0.2


def test_a_parent_in_fp8_is_decoded_too(trained: Path, tmp_path: Path) -> None:
    parent = rewritten(trained, tmp_path, schemes.FP8_BLOCKS, schemes.fp8_blocks)
    result = compared(trained, parent)
    assert (one(result, W2).parent_form, one(result, W2).form) == ("FP8", "NVFP4")
    assert 0.09 < result.total.relative < 0.11
    assert compared(parent, parent).total.error == 0


def test_a_kept_tensor_that_differs_is_a_finding(trained: Path, tmp_path: Path) -> None:
    assert all(tensor.identical for tensor in compared(trained).tensors if tensor.form != "NVFP4")
    bad = mutated(trained, tmp_path / "bad", edit=changed(NORM, data=setting(1, 0x40)))
    result = compared(bad)
    (finding,) = result.findings
    assert finding.rule == "kept-tensor-differs"
    assert finding.message == f"{NORM} is not bit-equal to the parent's."
    assert not one(result, NORM).identical
    assert one(result, NORM).worst is not None


def test_a_weight_that_cannot_be_compared_is_named(trained: Path, tmp_path: Path) -> None:
    bad = mutated(trained, tmp_path / "bad", edit=without("experts.8.w2.weight_scale"))
    assert {finding.rule for finding in compared(bad).findings} == {"weight-not-compared"}
    bad = mutated(trained, tmp_path / "lost", edit=without("experts.8.w2."))
    assert {finding.rule for finding in compared(bad).findings} == {"parent-tensor-missing"}


def test_weights_that_are_not_numbers_come_first(trained: Path, tmp_path: Path) -> None:
    scale = W2.replace(".weight", ".weight_scale")
    bad = mutated(trained, tmp_path / "bad", edit=changed(scale, data=setting(0, 0x7F)))
    result = compared(bad)
    assert result.changed[0].name == W2
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["worst"][0] == W2


def test_the_sums_of_an_expert_are_those_of_all_its_weights(trained: Path) -> None:
    result = compared(trained)
    weights = [one(result, W2.replace("w2", part)) for part in ("w1", "w2", "w3")]
    error = result.experts[1, 8]
    assert error.tensors == 3
    assert error.error == pytest.approx(sum(weight.error for weight in weights), rel=1e-12)
    assert len(result.experts) == 30
    assert result.layers[1].tensors == 34
    assert result.roles["router"] == (3, ErrorStats())


def test_the_numbers_do_not_depend_on_the_number_of_workers(trained: Path) -> None:
    assert compared(trained, workers=1).tensors == compared(trained, workers=5).tensors


def test_shapes_that_blocks_do_not_divide_are_compared(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.gate.weight"
    parent = make_checkpoint(tmp_path / "parent", hidden=72, shards=1)
    child = mutated(
        parent, tmp_path / "child", edit=changed(name, data=setting(slice(-4, None), 0))
    )
    difference = one(compared(child, parent), name)
    assert difference.worst is not None
    assert difference.worst[:2] == (3, 64), "the last 8 of 72 columns"
    assert 0 < error_stats(difference).relative < 0.5


def test_a_stopped_comparison_resumes(
    trained: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = compared(trained)
    assert list(cache.iterdir()) == []
    seen: list[str] = []
    add = ComparisonCache.add

    def stop(partial: ComparisonCache, difference: Difference) -> None:
        add(partial, difference)
        seen.append(difference.name)
        if len(seen) == 70:
            raise KeyboardInterrupt

    monkeypatch.setattr(ComparisonCache, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        compared(trained)
    (file,) = cache.iterdir()
    assert len(file.read_bytes().splitlines()) == 70
    file.write_bytes(file.read_bytes()[:-10])  # a crash leaves an incomplete last line

    events: list[Event] = []
    assert compared(trained, emit=events.append) == complete
    assert len(seen) == 70 + len(complete.tensors) - 69
    assert any("69 tensors were compared before" in str(event) for event in events)
    assert isinstance(events[-1], Progress)
    assert events[-1].done == events[-1].total
    assert list(cache.iterdir()) == []


def test_a_line_that_is_nested_too_deeply_is_ignored(trained: Path) -> None:
    pair = Folder(trained), Folder(TRAINED)
    with ComparisonCache(*pair) as first:
        path = first.path
    path.write_bytes(b"[" * 100_000 + b"\n")
    with ComparisonCache(*pair) as second:
        assert not second.known


def test_a_changed_file_is_compared_again(trained: Path, tmp_path: Path, cache: Path) -> None:
    keys = set()
    for seed in (0, 1):
        folder = make_checkpoint(tmp_path / "src", seed=seed)
        with ComparisonCache(Folder(folder), Folder(trained)) as partial:
            keys.add(partial.path)
    assert len(keys) == 2


def test_a_cache_that_cannot_be_written_costs_one_sentence(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = compared(trained)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    events: list[Event] = []
    assert compared(trained, emit=events.append) == complete
    assert [event.message for event in events if isinstance(event, Note)] == [
        f"{tmp_path}/file/mquant/compare cannot keep the results (Not a directory): "
        "after an interruption, the comparison starts over."
    ]


def test_a_cache_on_a_full_disk_costs_one_sentence(
    cache: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = compared(trained)
    full = TextIOWrapper(BytesIO(), write_through=True)

    def write(_: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mquant.measure.comparison_cache.open_own", lambda *_: -1)
    monkeypatch.setattr("mquant.measure.comparison_cache.os.fdopen", lambda *_, **__: full)
    monkeypatch.setattr(full, "write", write)
    events: list[Event] = []
    assert compared(trained, emit=events.append) == complete
    (note,) = [event for event in events if isinstance(event, Note)]
    assert note.message.startswith(f"{cache} cannot keep the results (No space left on device)")
    assert full.closed


@pytest.mark.parametrize("make", [os.link, os.symlink])
def test_a_cache_with_another_name_is_not_written_into(
    trained: Path, cache: Path, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    def kept() -> ComparisonCache:
        return ComparisonCache(Folder(trained), Folder(TRAINED))

    tensor = compared(trained).tensors[0]
    victim = tmp_path / "victim"
    victim.write_text("years of work")
    with kept() as empty:
        assert empty.path.parent == cache
    make(victim, empty.path)
    with pytest.raises(KeyboardInterrupt), kept() as begun:
        begun.add(tensor)
        raise KeyboardInterrupt
    assert victim.read_text() == "years of work"
    with kept() as resumed:
        assert list(resumed.known) == [tensor.name]


def test_tensors_of_a_hub_repo_are_downloaded_once(hub: FakeHub, trained: Path) -> None:
    hub.add("org/parent", TRAINED)
    hub.add("org/mine", trained)
    result = compare(HubRepo("org/mine"), HubRepo("org/parent"), load_families())
    local = compared(trained)
    assert result.tensors == local.tensors
    assert result.bytes_read is not None
    assert result.bytes_read < local.bytes_compared + 600_000  # headers, JSON and mquant.json


def test_files_are_closed_when_a_comparison_fails(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Reader] = []
    close = Reader.close

    def record(reader: Reader) -> None:
        closed.append(reader)
        close(reader)

    monkeypatch.setattr(Reader, "close", record)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ComparisonCache, "add", fail)
    with pytest.raises(KeyboardInterrupt):
        compared(trained)
    assert len(closed) == 3  # of the checkpoint, of the parent, and of the digests
