"""`quantize` writes every file of OUT, and a run that fails leaves no config.json."""

import json
import shutil
from pathlib import Path

import pytest

from judges import differences, hashes, opened, read_json
from make import make_checkpoint
from mquant.engines import oneshot
from mquant.errors import EngineError, OutputError
from mquant.events import Event, Note, Progress
from mquant.output import LEDGER
from mquant.runs.quantize import quantize
from mquant.runs.spec import Engine
from run import TRAINED, plan_of, quantize_nvfp4


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Return every file's hash and modification time."""
    return {
        name: (digest, (folder / name).stat().st_mtime_ns)
        for name, digest in hashes(folder).items()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("q") / "out", shard_bytes=1_000_000)


def test_out_holds_shards_index_config_and_the_parents_side_files(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    total = len(shards)
    assert total > 1
    assert shards == {f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)}
    parents = {path.name for path in TRAINED.iterdir()}
    weights = {name for name in parents if "safetensors" in name}
    assert names - shards == (parents - weights - {"README.md"}) | {
        "config.json",
        "model.safetensors.index.json",
        "mquant.json",
        "recipe.yaml",
    }


def test_side_files_are_byte_for_byte_the_parents(trained: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json", "modeling_minimax_m2.py", "LICENSE"):
        assert (trained / name).read_bytes() == (TRAINED / name).read_bytes()


def test_the_index_is_sorted_and_its_total_size_true(trained: Path) -> None:
    index = read_json(trained / "model.safetensors.index.json")
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    result = opened(trained)
    assert index["metadata"]["total_size"] == result.nbytes
    assert result.findings == ()


def test_config_json_is_the_parents_and_one_key_more(trained: Path) -> None:
    parent, config = read_json(TRAINED / "config.json"), read_json(trained / "config.json")
    del config["quantization_config"]
    assert config == parent
    assert list(config) == list(parent)


def test_unquantized_tensors_are_bit_identical(trained: Path) -> None:
    kept = set(opened(trained).tensors) & set(opened(TRAINED).tensors)
    assert len(kept) == 3 * (1 + 1 + 2 + 2) + 3
    assert differences(trained, TRAINED, kept) == []


def test_safetensors_own_reader_opens_every_shard(trained: Path) -> None:
    from safetensors.torch import load_file

    names = [n for shard in sorted(trained.glob("*.safetensors")) for n in load_file(shard)]
    assert sorted(names) == sorted(opened(trained).tensors)


def test_mquant_json_has_the_sha256_of_every_other_file(trained: Path) -> None:
    record = read_json(trained / "mquant.json")
    expected = hashes(trained)
    del expected["mquant.json"]
    assert {name: entry["sha256"] for name, entry in record["files"].items()} == expected


def test_equal_runs_in_other_places_make_equal_files(trained: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(TRAINED, tmp_path / "elsewhere" / "renamed")
    again = quantize_nvfp4(copied, tmp_path / "again", shard_bytes=1_000_000)
    assert hashes(again) == hashes(trained)


def test_the_source_is_untouched(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src")
    before = snapshot(src)
    quantize_nvfp4(src, tmp_path / "out")
    assert snapshot(src) == before


def test_a_second_run_is_already_done(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src")
    out = quantize_nvfp4(src, tmp_path / "out")
    before = snapshot(out)
    result = quantize(plan_of(src), out)
    assert not result.fresh
    assert snapshot(out) == before


def test_a_changed_source_is_not_already_done(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", seed=1)
    out = quantize_nvfp4(src, tmp_path / "out")
    shutil.rmtree(src)
    make_checkpoint(src, seed=2)
    with pytest.raises(OutputError, match="was made from something else: content was"):
        quantize(plan_of(src), out)
    quantize(plan_of(src), out, restart=True)
    assert read_json(out / "mquant.json")["source"] == opened(src).source.identity()


@pytest.mark.parametrize("failure", [RuntimeError("no more"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.upstream
def test_a_failure_leaves_no_config_json_and_the_rerun_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    src = make_checkpoint(tmp_path / "src", layers=2)
    before = snapshot(src)
    out = tmp_path / "out"
    calls = iter(range(9))
    compress = oneshot.compress

    def fails_later(*arguments: object) -> object:
        if next(calls) == 8:
            raise failure
        return compress(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(oneshot, "compress", fails_later)
        with pytest.raises(type(failure)):
            quantize_nvfp4(src, out, shard_bytes=5_000, engine=Engine.ONESHOT)
    left = {path.name for path in out.iterdir()}
    assert LEDGER in left
    assert not left & {"config.json", "model.safetensors.index.json", "mquant.json"}
    quantize_nvfp4(src, out, shard_bytes=5_000, engine=Engine.ONESHOT)
    fresh = quantize_nvfp4(src, tmp_path / "fresh", shard_bytes=5_000, engine=Engine.ONESHOT)
    assert hashes(out) == hashes(fresh)
    assert snapshot(src) == before


def test_a_source_that_shrinks_is_one_sentence(tmp_path: Path) -> None:
    from mquant.errors import SourceError

    src = make_checkpoint(tmp_path / "src", shards=1)
    plan = plan_of(src)
    shard = next(src.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"ends at byte [\d,]+; [\d,]+ were expected"):
        quantize(plan, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


def test_too_little_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = make_checkpoint(tmp_path / "src")
    monkeypatch.setattr("mquant.output.disk.free_disk", lambda _out: 1000)
    with pytest.raises(OutputError, match=r"needs [\d.]+ kB, 1\.00 kB are free there"):
        quantize_nvfp4(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.upstream
def test_an_output_that_does_not_verify_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, out = make_checkpoint(tmp_path / "src"), tmp_path / "out"
    compress = oneshot.compress

    def swaps(*arguments: object) -> object:
        tensors = compress(*arguments)  # type: ignore[arg-type]
        for name, value in tensors.items():
            if name.endswith("weight_packed"):
                tensors[name] = (value >> 4) | (value << 4)
        return tensors

    with monkeypatch.context() as patched:
        patched.setattr(oneshot, "compress", swaps)
        with pytest.raises(EngineError, match=r"is wrong \(weight-beyond-bound\)"):
            quantize_nvfp4(src, out, engine=Engine.ONESHOT)
    assert not (out / "config.json").exists()
    quantize_nvfp4(src, out, engine=Engine.ONESHOT)
    assert (out / "config.json").exists()


def test_absent_side_files_are_notes(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src")
    events: list[Event] = []
    quantize_nvfp4(src, tmp_path / "out", emit=events.append)
    notes = [event.message for event in events if isinstance(event, Note)]
    assert "The source has no chat template; none was written." in notes


def test_progress_is_in_bytes_of_the_source_and_reaches_the_end(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src")
    events: list[Event] = []
    quantize_nvfp4(src, tmp_path / "out", emit=events.append, shard_bytes=20_000)
    steps = [event for event in events if isinstance(event, Progress)]
    assert {step.stage for step in steps} == {"quantize"}
    assert steps[-1].done == steps[-1].total == opened(src).nbytes
    assert [step.done for step in steps] == sorted(step.done for step in steps)


def test_llmcompressors_recipe_of_our_output_is_our_plan(trained: Path) -> None:
    plan, read_back = plan_of(TRAINED), plan_of(TRAINED, str(trained / "recipe.yaml"))
    assert read_back.refusals == ()
    assert read_back.ignore == plan.ignore
    assert read_back.fingerprint == plan.fingerprint


def test_sixty_two_layers_list_sixty_two_gates(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", layers=62, experts=2)
    out = quantize_nvfp4(src, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    gates = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(62)]
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.embed_tokens", *gates]
