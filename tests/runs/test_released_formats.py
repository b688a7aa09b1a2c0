"""Checkpoints in the formats of releases become the BF16 that the releases' own code makes.

Codes are random, and scales take every value: the smallest and the largest of E8M0 too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges import data, hashes, opened, read_json
from make import Row
from mquant.checkpoint import Folder, reader_of
from mquant.errors import SourceError
from mquant.loader_model.modules import read_modules
from mquant.measure.comparison import compare
from mquant.synth import Precision, synth
from mquant.verify.judge import Depth, verify
from mquant.weights.matrix import Scratch, matrix_of
from mutate import changed, mutated, setting
from released import (
    CASES,
    FAMILIES,
    bf16_plan,
    dequantized,
    hard,
    loaded,
    source,
    stored,
    transformers,
    words,
)

PRECISIONS = pytest.mark.parametrize("precision", CASES, ids=str)
GPT_OSS = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.upstream
@PRECISIONS
def test_every_weight_is_what_upstream_makes_of_it(tmp_path: Path, precision: Precision) -> None:
    src = mutated(source(tmp_path / "src", precision), tmp_path, edit=hard)
    ours, theirs = loaded(dequantized(src, tmp_path / "ours")), CASES[precision][1](src)
    weights = {info.held.by.name if info.held else info.name for info, _ in stored(src)}
    assert weights and weights <= theirs.keys()
    assert [n for n in weights if not (words(ours[n]) == words(theirs[n])).all()] == []


def without_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json without sizes, which blocks must divide."""
    return {
        key: without_sizes(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if "size" not in key and "dim" not in key
    }


@PRECISIONS
def test_the_result_has_the_tensors_and_the_config_of_a_bf16_checkpoint(
    tmp_path: Path, precision: Precision
) -> None:
    family = FAMILIES[CASES[precision][0]]
    src = source(tmp_path / "src", precision)
    plain = opened(synth(tmp_path / "plain", family).path)
    out = opened(dequantized(src, tmp_path / "out"))
    assert without_sizes(out.config) == without_sizes(plain.config)
    dtypes = [{info.name: info.dtype for info in each.tensors.values()} for each in (out, plain)]
    assert dtypes[0] == dtypes[1]


@PRECISIONS
def test_memory_holds_rows_not_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    src = mutated(source(tmp_path / "src", precision), tmp_path, edit=hard)
    whole = hashes(dequantized(src, tmp_path / "whole"))
    monkeypatch.setattr("mquant.engines.stream.PIECE", 640)
    assert hashes(dequantized(src, tmp_path / "rows")) == whole


@PRECISIONS
def test_the_judge_s_decoder_agrees_with_the_engines(tmp_path: Path, precision: Precision) -> None:
    """The two decoders share no code."""
    src = source(tmp_path / "src", precision)
    out = dequantized(src, tmp_path / "out")
    report = verify(Folder(out), FAMILIES, Depth.FULL, Folder(src))
    assert [f for f in report.findings if f.severity == "error"] == []
    assert not {"weight-not-compared", "part-shape"} & {f.rule for f in report.findings}
    difference = compare(Folder(out), Folder(src), FAMILIES)
    # BF16 has 8 bits: a rounded number is off by 2^-8 of itself at most.
    assert all(each.error <= each.power * 2.0**-16 for each in difference.tensors)


@PRECISIONS
def test_rows_are_read_one_by_one_as_all_together(tmp_path: Path, precision: Precision) -> None:
    view = read_modules(opened(source(tmp_path / "src", precision)), FAMILIES)
    reader, scratch = reader_of(view.checkpoint.source), Scratch()
    for module in view.quantized[:8]:
        matrix = matrix_of(view, module, reader)
        assert matrix is not None
        rows, columns = matrix.shape
        whole, row = (np.empty((n, columns), np.float32) for n in (rows, 1))
        matrix.read(0, rows, whole, scratch)
        for number in range(0, rows, 7):
            matrix.read(number, number + 1, row, scratch)
            assert (row[0] == whole[number]).all()


def scales_in(dtype: str) -> Callable[[list[Row]], list[Row]]:
    """Return an edit that writes the scales of blocks in another dtype, with random values."""

    def edit(rows: list[Row]) -> list[Row]:
        made, random = list[Row](), np.random.default_rng(3)
        for name, old, shape, raw in rows:
            if name.endswith("_scale_inv"):
                count = int(np.prod(shape))
                scales = random.integers(0, 255, count, np.uint8)
                if dtype == "BF16":  # 2^-31 to 2^33: the products are normal numbers
                    scales = random.integers(0x3000, 0x5000, count, np.uint16)
                made.append((name, dtype, shape, scales.tobytes()))
            else:
                made.append((name, old, shape, raw))
        return made

    return edit


@pytest.mark.upstream
@pytest.mark.parametrize("dtype", ["BF16", "F8_E8M0", "U8"])
def test_scales_of_fp8_blocks_may_be_bf16_and_powers_of_two(tmp_path: Path, dtype: str) -> None:
    plain = synth(tmp_path / "src", FAMILIES["minimax_m2"], precision=Precision.FP8_BLOCK).path
    config = read_json(plain / "config.json")
    if dtype != "BF16":
        config["quantization_config"]["scale_fmt"] = "ue8m0"
    src = mutated(plain, tmp_path, edit=scales_in(dtype), config=config)
    ours, theirs = loaded(dequantized(src, tmp_path / "ours")), transformers(src)
    assert [n for n in theirs if not (words(ours[n]) == words(theirs[n])).all()] == []
    report = verify(Folder(tmp_path / "ours"), FAMILIES, Depth.FULL, Folder(src))
    assert not {"weight-not-compared", "weight-beyond-bound"} & {f.rule for f in report.findings}


@pytest.mark.upstream
@pytest.mark.parametrize("table", [{"quant_algo": "FP8"}, {"quant_method": "fp8"}], ids=str)
def test_fp8_with_a_scale_for_each_weight_and_for_its_input(
    tmp_path: Path, table: dict[str, str]
) -> None:
    """ModelOpt's layout, whose config.json may lack quant_method, and AutoFP8's."""

    def per_tensor(rows: list[Row]) -> list[Row]:
        one, made = np.float32(0.003).tobytes(), list[Row]()
        for name, dtype, shape, raw in rows:
            if name.endswith(".weight_scale"):
                inputs = name.replace("weight_scale", "input_scale")
                made += [(name, "F32", (), one), (inputs, "F32", (), one)]
            else:
                made.append((name, dtype, shape, raw))
        return made

    plain = source(tmp_path / "src", Precision.FP8_CHANNEL)
    config = {"quantization_config": table}
    src = mutated(plain, tmp_path, edit=per_tensor, config=config)
    assert all(weight.input for _, weight in stored(src))
    ours, theirs = loaded(dequantized(src, tmp_path / "ours")), transformers(src)
    assert [n for n in theirs if not (words(ours[n]) == words(theirs[n])).all()] == []
    assert not any(name.endswith("_scale") for name in ours)


def test_fp8_in_groups_is_what_config_json_declares(tmp_path: Path) -> None:
    plain = source(tmp_path / "src", Precision.FP8_CHANNEL)

    def grouped(rows: list[Row]) -> list[Row]:
        tensors = {row[0]: row for row in rows}
        return [
            (name, dtype, (shape[0], tensors[name[: -len("_scale")]][2][1] // 64), raw * 2)
            if name.endswith("up_proj.weight_scale")
            else (name, dtype, shape, raw)
            for name, dtype, shape, raw in rows
        ]

    config = read_json(plain / "config.json")
    groups = config["quantization_config"]["config_groups"]
    weights = {**groups["group_0"]["weights"], "strategy": "group", "group_size": 64}
    groups["group_1"] = {**groups["group_0"], "weights": weights}
    src = mutated(plain, tmp_path, edit=grouped, config=config)
    blocks = {weight.block for info, weight in stored(src) if "up_proj" in info.name}
    assert blocks == {(1, 64)}
    assert dequantized(src, tmp_path / "out")


def test_experts_of_multi_token_prediction_change_with_the_others(tmp_path: Path) -> None:
    src = source(tmp_path / "src", Precision.MXFP4_FP8)
    out = opened(dequantized(src, tmp_path / "out"))
    made = {name: info for name, info in out.tensors.items() if name.startswith("mtp.0.ffn.exp")}
    assert len(made) == 8 * 3
    assert {info.dtype for info in made.values()} == {"BF16"}
    rules = {f.rule for f in verify(Folder(src), FAMILIES).findings if f.severity == "error"}
    assert rules == set()


# --- what is wrong is said


@pytest.mark.parametrize(
    ("precision", "scale"),
    [
        (Precision.MXFP4, "model.layers.0.mlp.experts.0.up_proj.weight_scale"),
        (Precision.MXFP4_BLOCKS, f"{GPT_OSS}_scales"),
        (Precision.MXFP4_FP8, "layers.0.attn.wkv.scale"),
    ],
    ids=str,
)
def test_the_nan_of_e8m0_is_refused(tmp_path: Path, precision: Precision, scale: str) -> None:
    src = source(tmp_path / "src", precision)
    bad = mutated(src, tmp_path, edit=changed(scale, data=setting(3, 255)))
    with pytest.raises(SourceError) as caught:
        dequantized(bad, tmp_path / "out")
    sentence = " holds a scale that is 255, which is NaN in E8M0: the weights are unknown."
    assert caught.value.message.startswith(scale)
    assert caught.value.message.endswith(sentence)
    report = verify(Folder(bad), FAMILIES, Depth.NUMBERS)
    assert "scale-not-finite" in {finding.rule for finding in report.findings}


def test_scales_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    src = source(tmp_path / "src", Precision.MXFP4_BLOCKS)
    half = changed(f"{GPT_OSS}_scales", shape=(8, 128, 1), data=lambda raw: raw[: 8 * 128])
    (refusal,) = bf16_plan(mutated(src, tmp_path, edit=half)).refusals
    words = "must be U8 or F8_E8M0 [128, 2] for codes [128, 32] (and 7 more modules like it)."
    assert refusal.message.endswith(words)


def test_codes_of_all_experts_need_scales_of_all_experts(tmp_path: Path) -> None:
    def apart(rows: list[Row]) -> list[Row]:
        name = "model.layers.0.mlp.experts.{}.down_proj.scales"
        scales = [(name.format(n), "U8", (128, 2), b"\x78" * 256) for n in range(8)]
        return [*(row for row in rows if row[0] != f"{GPT_OSS}_scales"), *scales]

    src = source(tmp_path / "src", Precision.MXFP4_BLOCKS)
    refusals = bf16_plan(mutated(src, tmp_path, edit=apart)).refusals
    assert any("both in a tensor of all experts, or neither" in r.message for r in refusals)


def test_experts_in_codes_and_in_bf16_are_refused(tmp_path: Path) -> None:
    def twice(rows: list[Row]) -> list[Row]:
        return [*rows, (GPT_OSS, "BF16", (8, 64, 128), bytes(8 * 64 * 128 * 2))]

    src = source(tmp_path / "src", Precision.MXFP4_BLOCKS)
    (refusal,) = bf16_plan(mutated(src, tmp_path, edit=twice)).refusals
    assert refusal.rule == "source-quantized"


def test_the_quantization_of_the_text_model_is_left_out(tmp_path: Path) -> None:
    src = synth(tmp_path / "src", FAMILIES["kimi_k25"], precision=Precision.INT4).path
    assert "quantization_config" in read_json(src / "config.json")["text_config"]
    config = read_json(dequantized(src, tmp_path / "out") / "config.json")
    assert "quantization_config" not in {**config, **config["text_config"]}
    assert data(opened(tmp_path / "out"), "language_model.lm_head.weight")
