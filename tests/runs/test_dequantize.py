"""Quantized checkpoints become BF16, and FP8 releases in blocks are quantized directly."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from judges import converted_by, data, differences, hashes, opened, read_json
from make import Edit, Row, without, write_json
from mquant.checkpoint import Folder
from mquant.errors import Refused, SourceError, UsageError
from mquant.events import Event, Progress
from mquant.family_files import load_families
from mquant.plan import Plan, make_bf16_plan
from mquant.repair.diagnose import diagnose
from mquant.repair.repair import repair
from mquant.runs.convert import convert
from mquant.runs.quantize import quantize
from mquant.runs.spec import Engine
from mquant.synth import Precision, Sizes, synth
from mutate import changed, mutated
from run import FIXTURES, TRAINED, plan_of, quantize_nvfp4
from schemes import (
    FP8_BLOCKS,
    FP8_CHANNEL,
    INT4,
    as_modelopt,
    fp8_blocks,
    fp8_channel,
    modelopt,
    w4a4,
    with_input_scales,
)

FAMILIES = load_families()
KEY = "model.layers.1.self_attn.k_proj"


def bf16_plan(src: Path, shard_bytes: int = 10**9) -> Plan:
    return make_bf16_plan(opened(src), FAMILIES, max_shard_bytes=shard_bytes)


def dequantized(src: Path, out: Path, shard_bytes: int = 10**9) -> Path:
    return convert(bf16_plan(src, shard_bytes), out, "dequantize").out


def refused(src: Path) -> str:
    (refusal,) = bf16_plan(src).refusals
    return refusal.message


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("q") / "nvfp4", shard_bytes=10**6)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint stored as the original release, in blocks that do not divide every shape."""
    sizes = Sizes(layers=2, experts=3, hidden=320, intermediate=192, vocab=256)
    src = tmp_path_factory.mktemp("fp8") / "original"
    synth(src, FAMILIES["minimax_m2"], sizes=sizes, precision=Precision.FP8_BLOCK)
    return src


TO_FP8 = [
    "{expert: FP8_DYNAMIC, attention: FP8_DYNAMIC}",
    "{expert: NVFP4A16, attention: FP8_DYNAMIC}",
]


def written(folder: Path, roles: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(f"{{name: x, suffix: X, roles: {roles}}}")
    return str(path)


def synthetic(folder: Path, precision: Precision) -> Path:
    """Write a checkpoint that fits FP8 in blocks, with a block that is cut at either end."""
    sizes = Sizes(layers=2, experts=3, hidden=320, intermediate=256, vocab=256)
    return synth(folder, FAMILIES["minimax_m2"], sizes=sizes, precision=precision).path


Change = Callable[[dict[str, Any]], None]


def stored_as(nvfp4: Path, folder: Path, edit: Edit | None, change: Change | None) -> Path:
    """Write the trained checkpoint in another layout."""
    bad = mutated(nvfp4, folder, edit=edit)
    config = read_json(bad / "config.json")
    if change:
        change(config)
    write_json(bad / "config.json", config)
    return bad


def modelopt_rows(rows: list[Row]) -> list[Row]:
    return as_modelopt(rows)


# --- against upstream


@pytest.mark.upstream
def test_the_original_release_becomes_what_fp8blockdequantizer_makes(
    original: Path, tmp_path: Path
) -> None:
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    names = [n.removesuffix("_scale_inv") for n in opened(original).tensors if "_scale_inv" in n]
    targets = [name.removesuffix(".weight") for name in names]
    upstream = converted_by(FP8BlockDequantizer(targets=targets), original, tmp_path / "theirs")
    out = dequantized(original, tmp_path / "ours")
    assert opened(out).tensors.keys() == opened(upstream).tensors.keys()
    assert differences(out, upstream, set(opened(upstream).tensors)) == []


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("edit", "change"),
    [(None, None), (with_input_scales, w4a4), (FP8_CHANNEL, fp8_channel)],
    ids=["NVFP4A16", "NVFP4", "FP8"],
)
def test_compressed_tensors_become_what_its_own_dequantizer_makes(
    nvfp4: Path, tmp_path: Path, edit: Edit | None, change: Change | None
) -> None:
    from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer

    src = stored_as(nvfp4, tmp_path, edit, change)
    upstream = converted_by(CompressedTensorsDequantizer(src), src, tmp_path / "theirs")
    out = dequantized(src, tmp_path / "ours")
    assert opened(out).tensors.keys() == opened(TRAINED).tensors.keys()
    assert differences(out, upstream, set(opened(out).tensors)) == []


# --- every layout


def test_modelopts_nvfp4_is_its_codes_times_both_scales(nvfp4: Path, tmp_path: Path) -> None:
    src = stored_as(nvfp4, tmp_path, modelopt_rows, modelopt)
    out = opened(dequantized(src, tmp_path / "out"))
    parts = opened(src)
    packed = np.frombuffer(data(parts, f"{KEY}.weight"), np.uint8)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(-1, 16).astype(np.uint8)
    scales = np.frombuffer(data(parts, f"{KEY}.weight_scale"), ml_dtypes.float8_e4m3fn)
    second = np.frombuffer(data(parts, f"{KEY}.weight_scale_2"), np.float32)
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    signed = np.concatenate([e2m1, -e2m1])[codes]
    expected = signed * (scales.astype(np.float32) * second)[:, None]
    assert data(out, f"{KEY}.weight") == expected.astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize(
    ("edit", "change"),
    [
        (None, None),
        (with_input_scales, w4a4),
        (modelopt_rows, modelopt),
        (FP8_CHANNEL, fp8_channel),
        (FP8_BLOCKS, fp8_blocks),
    ],
    ids=["NVFP4A16", "NVFP4", "ModelOpt", "FP8", "FP8 in blocks"],
)
def test_names_shapes_and_config_are_the_parents_and_kept_tensors_are_bit_identical(
    nvfp4: Path, tmp_path: Path, edit: Edit | None, change: Change | None
) -> None:
    src = stored_as(nvfp4, tmp_path, edit, change)
    out = dequantized(src, tmp_path / "out")
    result, parent = opened(out), opened(TRAINED)
    assert {(t.name, t.dtype, t.shape) for t in result.tensors.values()} == {
        (t.name, t.dtype, t.shape) for t in parent.tensors.values()
    }
    kept = {name for name in parent.tensors if name in opened(src).tensors}
    kept -= {member.info.name for member in bf16_plan(src).survey.members if member.stored}
    assert len(kept) == 21
    assert differences(out, TRAINED, kept) == []
    assert read_json(out / "config.json") == read_json(TRAINED / "config.json")
    assert read_json(out / "model.safetensors.index.json")["metadata"] == {
        "total_size": parent.nbytes
    }
    assert not (out / "recipe.yaml").exists()
    assert (out / "tokenizer.json").read_bytes() == (TRAINED / "tokenizer.json").read_bytes()


def test_memory_holds_rows_not_weights(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hashes(dequantized(original, tmp_path / "whole"))
    monkeypatch.setattr("mquant.engines.stream.PIECE", 6400)
    assert hashes(dequantized(original, tmp_path / "rows")) == whole


def test_nan_codes_come_out_as_nan(original: Path, tmp_path: Path) -> None:
    name = f"{KEY}.weight"

    def spoil(values: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        values[:2] = 0x7F, 0xFF

    src = mutated(original, tmp_path, edit=changed(name, data=spoil))
    words = np.frombuffer(data(opened(dequantized(src, tmp_path / "out")), name), np.uint16)
    assert list(words[:2]) == [0x7FC0, 0x7FC0]
    with pytest.raises(SourceError, match="holds 2 values that are NaN or infinite"):
        quantize_nvfp4(src, tmp_path / "quantized")


def test_a_killed_or_repeated_run_writes_the_same_bytes(original: Path, tmp_path: Path) -> None:
    expected = hashes(dequantized(original, tmp_path / "whole", 100_000))
    plan, out = bf16_plan(original, 100_000), tmp_path / "out"

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done > event.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, out, "dequantize", workers=1, emit=stop)
    assert not (out / "config.json").exists()
    events: list[Event] = []
    assert convert(plan, out, "dequantize", emit=events.append).fresh
    first = next(event for event in events if isinstance(event, Progress))
    assert first.done > first.total // 4
    assert hashes(out) == expected
    assert not convert(plan, out, "dequantize").fresh


# --- quantizing an original release


def test_fp8_to_nvfp4_equals_dequantizing_first_in_every_file(
    original: Path, tmp_path: Path
) -> None:
    at_once = hashes(quantize_nvfp4(original, tmp_path / "at-once", shard_bytes=200_000))
    bf16 = dequantized(original, tmp_path / "bf16")
    in_two = hashes(quantize_nvfp4(bf16, tmp_path / "in-two", shard_bytes=200_000))
    assert at_once.pop("mquant.json") != in_two.pop("mquant.json")
    assert at_once == in_two


@pytest.mark.parametrize("roles", TO_FP8)
def test_fp8_to_fp8_equals_dequantizing_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roles: str
) -> None:
    recipe = written(tmp_path, roles)
    original = synthetic(tmp_path / "original", Precision.FP8_BLOCK)
    bf16 = dequantized(original, tmp_path / "bf16")
    in_two = hashes(quantize(plan_of(bf16, recipe), tmp_path / "in-two").out)
    monkeypatch.setattr("mquant.engines.stream.PIECE", 6400)
    at_once = hashes(quantize(plan_of(original, recipe), tmp_path / "at-once").out)
    assert at_once.pop("mquant.json") != in_two.pop("mquant.json")
    assert at_once == in_two


@pytest.mark.parametrize("roles", [*TO_FP8, "{expert: FP8_BLOCK}"])
def test_an_fp8_checkpoint_is_dequantized(tmp_path: Path, roles: str) -> None:
    recipe = written(tmp_path, roles)
    src = synthetic(tmp_path / "src", Precision.BF16)
    quantized = quantize(plan_of(src, recipe), tmp_path / "made").out
    result, parent = opened(dequantized(quantized, tmp_path / "bf16")), opened(src)
    assert {(t.name, t.dtype, t.shape) for t in result.tensors.values()} == {
        (t.name, t.dtype, t.shape) for t in parent.tensors.values()
    }
    actions = {action.source.name: action for action in plan_of(src, recipe).actions}
    kept = {name for name, action in actions.items() if not action.scheme}
    assert differences(tmp_path / "bf16", src, kept) == []
    for name in actions.keys() - kept:
        values, expected = (
            np.frombuffer(data(checkpoint, name), ml_dtypes.bfloat16).astype(np.float64)
            for checkpoint in (result, parent)
        )
        assert np.abs(values - expected).max() < np.abs(expected).max() / 5


def test_fp8_weights_that_the_recipe_keeps_become_bf16(original: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{name: experts, suffix: E, roles: {expert: NVFP4A16}}")
    plan = plan_of(original, str(recipe))
    quantize(plan, tmp_path / "out")
    bf16 = dequantized(original, tmp_path / "bf16")
    assert differences(tmp_path / "out", bf16, {f"{KEY}.weight"}) == []
    assert KEY in plan.ignore


def test_the_oneshot_engine_does_not_read_fp8(original: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the source's weights are stored in FP8"):
        quantize(plan_of(original), tmp_path / "out", engine=Engine.ONESHOT)


def test_oneshot_through_fp8_is_refused(original: Path, tmp_path: Path) -> None:
    message = "The oneshot engine reads BF16, F16 and F32; the source's weights are stored in FP8."
    plan = plan_of(original, "nvfp4-gptq")
    with pytest.raises(UsageError, match=message) as caught:
        quantize(plan, tmp_path / "out", engine=Engine.ONESHOT, data=str(FIXTURES / "heldout.txt"))
    assert caught.value.fix == "Make a BF16 checkpoint first: mquant dequantize."


def test_a_job_is_made_from_the_files_of_its_scales_too(tmp_path: Path) -> None:
    src = tmp_path / "src"
    synth(src, FAMILIES["minimax_m2"], precision=Precision.FP8_BLOCK, max_shard_bytes=8192)
    units = [unit for shard in plan_of(src).shards for unit in shard.units if unit.scheme]
    tensors = opened(src).tensors
    for unit in units:
        names = [info.name for action in unit.actions for info in action.read]
        assert any(name.endswith("_scale_inv") for name in names)
        assert unit.files == {tensors[n].shard for n in names if n in tensors}
    assert any(len(unit.files) > len(unit.actions) for unit in units)


def test_a_parent_in_fp8_repairs_a_checkpoint(original: Path, tmp_path: Path) -> None:
    right = quantize_nvfp4(original, tmp_path / "right")
    bad = mutated(right, tmp_path, edit=without(KEY))
    repaired = repair(diagnose(Folder(bad), Folder(original), FAMILIES), tmp_path / "mended").out
    assert differences(repaired, right, set(opened(right).tensors)) == []


# --- layouts that are refused


def test_integers_of_no_declared_group_stay_refused(nvfp4: Path, tmp_path: Path) -> None:
    src = stored_as(nvfp4, tmp_path, INT4, fp8_channel)
    assert refused(src) == 'bad is already quantized (config.json says "compressed-tensors").'
    (refusal,) = bf16_plan(src).refusals
    assert refusal.fix == "Start from the BF16 checkpoint that the source was made from."


def test_an_unquantized_checkpoint_is_refused() -> None:
    assert refused(TRAINED) == "tiny-minimax-m2 has no quantized weights."


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("weight_scale", {"drop": True}, f"{KEY} has no weight_scale beside "),
        ("weight_global_scale", {"drop": True}, f"{KEY} has no weight_global_scale beside "),
        (
            "weight_scale",
            {"dtype": "U8"},
            f"{KEY}.weight_scale is U8 [64, 16], but must be F8_E4M3 [64, 16] for codes",
        ),
        (
            "weight_scale",
            {"shape": (128, 8)},
            f"{KEY}.weight_scale is F8_E4M3 [128, 8], but must be F8_E4M3 [64, 16] for codes",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    nvfp4: Path, tmp_path: Path, suffix: str, change: Mapping[str, Any], message: str
) -> None:
    name = f"{KEY}.{suffix}"

    def edit(rows: list[Row]) -> list[Row] | None:
        if "drop" in change:
            return without(name)(rows)
        return [
            (n, change.get("dtype", d), change.get("shape", s), raw)
            if n == name
            else (n, d, s, raw)
            for n, d, s, raw in rows
        ]

    assert refused(mutated(nvfp4, tmp_path, edit=edit)).startswith(message)


def test_many_broken_parts_are_one_sentence(original: Path, tmp_path: Path) -> None:
    src = mutated(
        original,
        tmp_path,
        edit=lambda rows: [r for r in rows if ".w1.weight_scale_inv" not in r[0]],
    )
    assert refused(src) == (
        "model.layers.0.block_sparse_moe.experts.0.w1 has no weight_scale_inv beside weight "
        "(and 5 more modules like it)."
    )
    with pytest.raises(Refused, match="has no weight_scale_inv"):
        quantize(plan_of(src), tmp_path / "out")


@pytest.mark.parametrize("block", [None, [128], [0, 128], "128x128", [64, 64]])
def test_fp8_needs_its_block_size(original: Path, tmp_path: Path, block: object) -> None:
    config = read_json(original / "config.json")["quantization_config"]
    config["weight_block_size"] = block
    src = mutated(original, tmp_path, config={"quantization_config": config})
    message = plan_of(src).refusals[0].message
    if block == [64, 64]:
        assert "weight_scale_inv is F32 [" in message
    else:
        assert message == 'bad is already quantized (config.json says "fp8").'
