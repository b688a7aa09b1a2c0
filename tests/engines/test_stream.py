"""The stream engine writes the bytes that upstream's own tools write for the same files."""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from family_cases import DEEP
from judges import differences, hashes, model_free_ptq, one_shard, opened, quantized_names
from make import Row, make_checkpoint
from mquant.checkpoint import Reader
from mquant.errors import SourceError
from mquant.family_files import load_families
from mquant.runs.quantize import quantize
from mquant.runs.spec import Engine
from mquant.synth import Precision, Sizes, synth
from run import TRAINED, plan_of, quantize_nvfp4

REAL = {
    "layers": 1,
    "experts": 1,
    "hidden": 3072,
    "intermediate": 1536,
    "heads": 48,
    "kv_heads": 8,
    "head_dim": 128,
}


def assert_as_model_free_ptq(src: Path, tmp_path: Path) -> None:
    expected = model_free_ptq(src, tmp_path / "expected")
    out = quantize_nvfp4(src, tmp_path / "out", engine=Engine.STREAM)
    assert quantized_names(out) == quantized_names(expected) != set()
    assert differences(out, expected, quantized_names(expected)) == []
    kept = opened(out).tensors.keys() - quantized_names(out)
    assert differences(out, src, kept) == []


def assert_as_oneshot(src: Path, tmp_path: Path) -> None:
    """Assert that both engines write the same files, except mquant.json, which names the engine."""
    stream = hashes(quantize_nvfp4(src, tmp_path / "stream", shard_bytes=10**6))
    oneshot = hashes(
        quantize_nvfp4(src, tmp_path / "oneshot", shard_bytes=10**6, engine=Engine.ONESHOT)
    )
    assert stream.pop("mquant.json") != oneshot.pop("mquant.json")
    assert stream == oneshot


def hard_values(rows: list[Row]) -> list[Row]:
    """Put zero tensors, -0.0, subnormals, ties and huge values into the quantized weights."""
    edited: list[Row] = []
    for number, (name, dtype, shape, raw) in enumerate(rows):
        if len(shape) != 2 or not (".experts." in name or "_proj" in name):
            edited.append((name, dtype, shape, raw))
            continue
        types = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
        value = np.frombuffer(raw, types[dtype]).reshape(shape).copy()
        huge = 6e4 if dtype == "F16" else 3e38
        if number % 4 == 0:
            value[:] = 0
        elif number % 4 == 1:
            value[:, :16] = -0.0
            value[0, 16:32] = 1e-7 if dtype == "F16" else 1e-40
            value[1] = np.resize([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], shape[1])
            value[2] = -value[1]
        elif number % 4 == 2:
            value[0] = huge
            value[1, ::2] = -huge
        edited.append((name, dtype, shape, value.tobytes()))
    return edited


@pytest.mark.upstream
def test_a_trained_checkpoint_equals_model_free_ptq(tmp_path: Path) -> None:
    assert_as_model_free_ptq(one_shard(TRAINED, tmp_path / "one"), tmp_path)


@pytest.mark.upstream
def test_a_trained_checkpoint_equals_oneshot_in_every_file(tmp_path: Path) -> None:
    assert_as_oneshot(TRAINED, tmp_path)


@pytest.mark.upstream
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_real_shapes_equal_model_free_ptq(tmp_path: Path, dtype: str) -> None:
    src = make_checkpoint(tmp_path / "src", dtype=dtype, shards=1, **REAL)  # type: ignore[arg-type]
    assert_as_model_free_ptq(src, tmp_path)


@pytest.mark.upstream
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_hard_values_equal_model_free_ptq(tmp_path: Path, dtype: str) -> None:
    src = make_checkpoint(tmp_path / "src", dtype=dtype, shards=1, edit=hard_values)
    assert_as_model_free_ptq(src, tmp_path)


@pytest.mark.upstream
def test_mixtral_equals_model_free_ptq(tmp_path: Path) -> None:
    family = load_families()["mixtral"]
    src = synth(tmp_path / "src", family, sizes=Sizes(2, 4, 256, 128, 256)).path
    assert_as_model_free_ptq(src, tmp_path)


@pytest.mark.upstream
@pytest.mark.parametrize("name", DEEP)
def test_every_family_equals_oneshot_in_every_file(tmp_path: Path, name: str) -> None:
    assert_as_oneshot(synth(tmp_path / "src", load_families()[name]).path, tmp_path)


@pytest.mark.upstream
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.FP32])
def test_other_dtypes_equal_oneshot_in_every_file(tmp_path: Path, precision: Precision) -> None:
    family = load_families()["deepseek_v3"]
    assert_as_oneshot(synth(tmp_path / "src", family, precision=precision).path, tmp_path)


# --- the engine's work


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_the_cuts_between_shards_change_no_byte(tmp_path: Path, shards: int) -> None:
    # The order of the parent's tensors is the same for every cut, and decides the output's order.
    src = make_checkpoint(tmp_path / "src", shards=shards)
    whole = quantize_nvfp4(make_checkpoint(tmp_path / "whole", shards=1), tmp_path / "expected")
    out = quantize_nvfp4(src, tmp_path / "out")
    assert differences(out, whole, set(opened(whole).tensors)) == []


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_changes_no_byte(tmp_path: Path, workers: int) -> None:
    plan = plan_of(TRAINED, max_shard_bytes=700_000)
    quantize(plan, tmp_path / "one", workers=1)
    quantize(plan, tmp_path / "many", workers=workers)
    assert hashes(tmp_path / "many") == hashes(tmp_path / "one")


def test_every_byte_of_the_source_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[tuple[str, int, int]] = []
    read_into = Reader.read_into

    def record(self: Reader, path: str, start: int, buffer: memoryview) -> None:
        spans.append((path, start, start + len(buffer)))
        read_into(self, path, start, buffer)

    monkeypatch.setattr(Reader, "read_into", record)
    src = make_checkpoint(tmp_path / "src", shards=3, hidden=2048, intermediate=1024)
    quantize_nvfp4(src, tmp_path / "out")
    tensors = opened(src).tensors.values()
    assert sum(end - start for _, start, end in spans) == sum(t.nbytes for t in tensors)
    last: dict[str, int] = {}
    for path, start, end in sorted(spans):
        assert start >= last.get(path, 0), f"{path} is read twice at {start}"
        last[path] = end


@pytest.mark.parametrize(
    ("value", "count", "words"),
    [(np.nan, 1, "1 value that is"), (-np.inf, 3, "3 values that are")],
)
def test_nan_and_infinity_stop_the_run_with_the_weights_name(
    tmp_path: Path, value: float, count: int, words: str
) -> None:
    bad = "model.layers.1.block_sparse_moe.experts.2.w2.weight"

    def spoil(rows: list[Row]) -> list[Row]:
        edited: list[Row] = []
        for name, dtype, shape, raw in rows:
            weight = np.frombuffer(raw, ml_dtypes.bfloat16).copy() if name == bad else None
            if weight is not None:
                weight[-count:] = value
            edited.append((name, dtype, shape, raw if weight is None else weight.tobytes()))
        return edited

    src = make_checkpoint(tmp_path / "src", edit=spoil)
    with pytest.raises(SourceError) as caught:
        quantize_nvfp4(src, tmp_path / "out")
    assert caught.value.message == (f"{bad} holds {words} NaN or infinite: it cannot be quantized.")
    assert not (tmp_path / "out/config.json").exists()


def test_nan_in_a_copied_tensor_is_kept(tmp_path: Path) -> None:
    nan = np.full(64, np.nan, ml_dtypes.bfloat16).tobytes()

    def spoil(rows: list[Row]) -> list[Row]:
        return [(n, d, s, nan if n == "model.norm.weight" else raw) for n, d, s, raw in rows]

    src = make_checkpoint(tmp_path / "src", edit=spoil)
    out = quantize_nvfp4(src, tmp_path / "out")
    assert differences(out, src, {"model.norm.weight"}) == []


WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        extras = ("torch", "transformers", "llmcompressor", "compressed_tensors")
        if name.partition(".")[0] in extras:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from mquant.cli import main
main()
"""


def test_the_stream_engine_needs_no_extras(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src")
    out = tmp_path / "out"
    command = [sys.executable, "-c", WITHOUT_TORCH, "quantize", str(src), "--recipe", "nvfp4"]
    run = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (out / "config.json").is_file()
