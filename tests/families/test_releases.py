"""Releases in four and eight bits: whole at their real sizes, judged as released, and quantized.

The counts and bytes are those of the releases' own indexes and headers.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from judges import data, opened, read_json
from make import Row
from mquant.checkpoint import Folder
from mquant.errors import Refused
from mquant.family_files import load_families
from mquant.plan import make_bf16_plan
from mquant.runs.convert import convert
from mquant.synth import Precision, Sizes, SynthTensor, make_config, make_tensors, synth
from mquant.verify.judge import Depth, verify
from mutate import mutated
from run import plan_of, quantize_nvfp4

FAMILIES = load_families()
FORMATS = {
    family.name: Precision(next(iter(family.synth.formats)))
    for family in FAMILIES.values()
    if family.synth.formats
}
LOADED = ("deepseek_v32", "glm_moe_dsa", "kimi_k25", "minimax_m3_vl")
"""The families of which it is known what vLLM 0.32 makes of the release."""
# A release's own list names modules by patterns, or not at all.
LISTED = {"ignore-uncovered", "ignore-unmatched"}
PLAIN = {"BF16", "F32", "I64"}
MTP = "mtp.0.ffn.experts"
Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Return a function: name of a family -> its tiny checkpoint in the format of its release."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp(name) / "src"
            made[name] = synth(out, FAMILIES[name], precision=FORMATS[name]).path
        return made[name]

    return get


def dtypes(folder: Path) -> set[str]:
    return {info.dtype for info in opened(folder).tensors.values()}


def whole(name: str) -> list[SynthTensor]:
    """Return the tensors of a release, at the release's sizes."""
    family, precision = FAMILIES[name], FORMATS[name]
    config = make_config(family, Sizes(), precision, tiny=False)
    return list(make_tensors(family, config, precision))


@pytest.mark.parametrize(
    ("name", "tensors", "nbytes"),
    [("deepseek_v4", 69_187, 159_609_485_896), ("gpt_oss", 459, 13_761_264_768)],
)
def test_a_release_has_the_tensors_and_bytes_of_its_index(
    name: str, tensors: int, nbytes: int
) -> None:
    made = whole(name)
    assert (len(made), sum(tensor.nbytes for tensor in made)) == (tensors, nbytes)


def test_deepseek_v4_has_the_dtypes_of_its_release() -> None:
    counts = Counter(tensor.dtype for tensor in whole("deepseek_v4"))
    plain = {"BF16": 433, "F32": 417, "I64": 3}
    assert counts == {**plain, "F8_E4M3": 375, "F8_E8M0": 34_167, "I8": 33_792}


@pytest.mark.parametrize(("name", "terabytes"), [("kimi_k25", 0.595), ("kimi_k3", 1.56)])
def test_a_release_has_the_size_that_its_page_tells(name: str, terabytes: float) -> None:
    assert round(sum(tensor.nbytes for tensor in whole(name)) / 1e12, 3) == terabytes


def test_deepseek_v4_has_all_tensors_of_multi_token_prediction() -> None:
    assert sum(tensor.name.startswith("mtp.0.") for tensor in whole("deepseek_v4")) == 1575


@pytest.mark.parametrize("name", FORMATS)
def test_a_release_is_not_called_broken(tiny: Tiny, name: str) -> None:
    report = verify(Folder(tiny(name)), FAMILIES, Depth.NUMBERS)
    assert {finding.rule for finding in report.findings if finding.severity != "info"} <= LISTED
    assert bool(report.undecided) is (name not in LOADED)


@pytest.mark.parametrize("name", FORMATS)
def test_a_release_becomes_bf16(tiny: Tiny, name: str, tmp_path: Path) -> None:
    checkpoint = opened(tiny(name))
    out = convert(make_bf16_plan(checkpoint, FAMILIES), tmp_path / "out", "dequantize").out
    report = verify(Folder(out), FAMILIES, Depth.FULL, Folder(tiny(name)))
    assert dtypes(out) <= PLAIN
    assert "quantization_config" not in str(read_json(out / "config.json"))
    assert not report.count("error")


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"gpt_oss"}))
def test_a_release_becomes_nvfp4(tiny: Tiny, name: str, tmp_path: Path) -> None:
    out = quantize_nvfp4(tiny(name), tmp_path / "out")
    report = verify(Folder(out), FAMILIES, Depth.FULL, Folder(tiny(name)))
    assert dtypes(out) == {"U8", "F8_E4M3", "F32", "BF16"} | (
        {"I64"} if name == "deepseek_v4" else set()
    )
    assert report.count("error") == report.count("warning") == 0


def test_no_plan_quantizes_the_experts_of_gpt_oss(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="vLLM takes no bias of such experts"):
        quantize_nvfp4(tiny("gpt_oss"), tmp_path / "out")


@pytest.mark.parametrize("weight", ["w1", "w2", "w3"])
def test_experts_of_multi_token_prediction_are_cast_with_their_codes(
    tiny: Tiny, weight: str, tmp_path: Path
) -> None:
    src = tiny("deepseek_v4")
    out = opened(quantize_nvfp4(src, tmp_path / "out"))
    codes = data(opened(src), f"{MTP}.7.{weight}.weight")
    assert data(out, f"{MTP}.7.{weight}.weight_packed") == codes


def test_what_is_kept_of_multi_token_prediction_is_ignored_under_vllms_names(tiny: Tiny) -> None:
    plan = plan_of(tiny("deepseek_v4"))
    kept = ("attn.wo_a", "e_proj", "ffn.gate", "h_proj")
    # vLLM's draft model numbers its layers on from the last of the three layers.
    assert {f"model.layers.3.{module}" for module in kept} <= {*plan.ignore}
    assert {f"mtp.0.{module}" for module in kept} <= {*plan.ignore}


def test_a_copy_without_multi_token_prediction_is_whole(tiny: Tiny, tmp_path: Path) -> None:
    def without(rows: list[Row]) -> list[Row]:
        return [row for row in rows if not row[0].startswith("mtp.")]

    bare = mutated(tiny("deepseek_v4"), tmp_path, edit=without)
    assert not plan_of(bare).refusals


def test_a_lost_expert_of_multi_token_prediction_is_found(tiny: Tiny, tmp_path: Path) -> None:
    def without(rows: list[Row]) -> list[Row]:
        return [row for row in rows if not row[0].startswith(f"{MTP}.3.")]

    torn = mutated(tiny("deepseek_v4"), tmp_path, edit=without)
    assert [finding.rule for finding in plan_of(torn).refusals] == ["expert-gap"]
