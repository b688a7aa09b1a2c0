"""A source in MXFP4 becomes NVFP4 with equal weights, as compressed-tensors decompresses both."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme

import mquant.checkpoint.spool as spool_module
import mx_sources
from fakehub import FakeHub, hub
from judges import hashes, opened, read_json
from make import without
from mquant.checkpoint import Folder, open_checkpoint
from mquant.checkpoint.hub import HubRepo
from mquant.errors import Refused, SourceError
from mquant.events import Event, Note
from mquant.family_files import load_families
from mquant.family_rows import Role
from mquant.loader_model.modules import ModuleView, read_modules
from mquant.plan import make_plan
from mquant.recipe import find_recipe
from mquant.repair.diagnose import diagnose
from mquant.repair.repair import repair
from mquant.runs.casts import count_casts, exact
from mquant.runs.quantize import quantize
from mquant.runs.shares import finish_shares
from mquant.synth import Precision, synth
from mquant.verify.judge import Depth, verify
from mquant.weights.stored_weight import weight_of
from mutate import mutated
from mx_sources import Scales, Shift, in_mxfp4
from run import plan_of, quantize_nvfp4, shares_of

__all__ = ["hub"]

pytestmark = pytest.mark.upstream

W1 = "model.layers.1.block_sparse_moe.experts.2.w1"
W3 = "model.layers.1.block_sparse_moe.experts.2.w3"
W2 = "model.layers.1.block_sparse_moe.experts.2.w2"


def shifted(changes: dict[str, Callable[[Scales], None]]) -> Shift:
    """Return a shift that changes the scales of some modules in place."""

    def shift(module: str, scales: Scales) -> Scales:
        scales = scales.copy()
        if module in changes:
            changes[module](scales)
        return scales

    return shift


def source(folder: Path, **changes: Callable[[Scales], None]) -> Path:
    """Write a source in MXFP4, with the scales of w1, w2 or w3 of one expert changed."""
    modules = {"w1": W1, "w2": W2, "w3": W3}
    named = {modules[name]: change for name, change in changes.items()}
    return mx_sources.source(folder, in_mxfp4(shift=shifted(named)))


def first_row(value: int) -> Callable[[Scales], None]:
    """Return a change that gives the blocks of the first row a scale, and all others 2^-7."""

    def change(scales: Scales) -> None:
        scales[:] = 120
        scales[0] = value

    return change


def weights(folder: Path, preset: str, name: str) -> dict[str, npt.NDArray[np.float32]]:
    """Return the experts' weights as compressed-tensors' own compressor decompresses them."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(name)
    tensors, result = mx_sources.tensors(folder), {}
    for key, packed in tensors.items():
        module, _, suffix = key.rpartition(".")
        if suffix == "weight_packed" and mx_sources.is_expert(module):
            state = {"weight_packed": packed}
            for part in ("weight_scale", "weight_global_scale"):
                if f"{module}.{part}" in tensors:
                    state[part] = tensors[f"{module}.{part}"]
            weight = compressor.decompress(state, scheme)["weight"].to(torch.float32)
            result[module] = weight.numpy()
    return result


def of_source(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    return weights(folder, "MXFP4A16", "mxfp4-pack-quantized")


def of_output(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    return weights(folder, "NVFP4A16", "nvfp4-pack-quantized")


def unequal(src: Path, out: Path) -> dict[str, int]:
    """Return how many blocks of 16 of each expert's weight are not equal in all weights."""
    before, after = of_source(src), of_output(out)
    assert before.keys() == after.keys()
    counts = {
        module: int((before[module] != after[module]).reshape(-1, 16).any(axis=1).sum())
        for module in before
    }
    return {module: count for module, count in counts.items() if count}


def test_every_weight_is_equal_and_the_run_says_so(tmp_path: Path) -> None:
    src, events = source(tmp_path), list[Event]()
    result = quantize(plan_of(src), tmp_path / "out", emit=events.append)
    assert len(of_source(src)) == 90
    assert unequal(src, result.out) == {}
    cast = {"blocks": 92160, "lossless": 92160, "requantized": {}, "unsafe_for_marlin": []}
    assert read_json(result.out / "mquant.json")["cast"] == cast == result.cast
    assert Note("info", "MXFP4 cast to NVFP4, lossless: 92,160 of 92,160 blocks.") in events


def test_codes_are_those_of_the_source_and_a_fused_set_shares_a_global_scale(
    tmp_path: Path,
) -> None:
    src = source(tmp_path)
    made, before = (
        mx_sources.tensors(quantize_nvfp4(src, tmp_path / "out")),
        mx_sources.tensors(src),
    )
    for module in of_source(src):
        assert torch.equal(made[f"{module}.weight_packed"], before[f"{module}.weight_packed"])
    scales = [made[f"{module}.weight_global_scale"] for module in (W1, W3)]
    assert torch.equal(*scales)
    assert torch.frexp(scales[0]).mantissa.item() == 0.5


def test_the_output_passes_verify_against_its_source(tmp_path: Path) -> None:
    src = source(tmp_path, w1=first_row(97), w2=first_row(104))
    out = quantize_nvfp4(src, tmp_path / "out")
    report = verify(Folder(out), load_families(), Depth.FULL, Folder(src))
    assert [f for f in report.findings if f.severity == "error"] == []


@pytest.mark.parametrize(
    ("scale", "requantized", "unsafe"), [(106, 0, False), (105, 0, True), (103, 0, True)]
)
def test_a_set_of_up_to_17_octaves_is_lossless(
    tmp_path: Path, scale: int, requantized: int, unsafe: bool
) -> None:
    src = source(tmp_path, w1=first_row(scale), w3=first_row(120))
    result = quantize(plan_of(src), tmp_path / "out")
    assert unequal(src, result.out) == {}
    assert result.cast is not None
    assert result.cast["requantized"] == {}
    assert result.cast["unsafe_for_marlin"] == ([W1] if unsafe else [])


def test_blocks_beyond_17_octaves_are_counted_and_named(tmp_path: Path) -> None:
    src, events = source(tmp_path, w1=first_row(120), w3=first_row(97)), list[Event]()
    result = quantize(plan_of(src), tmp_path / "out", emit=events.append)
    assert result.cast is not None
    (count,) = result.cast["requantized"].values()
    assert result.cast["requantized"] == {W3: count}
    assert result.cast["lossless"] == 92160 - count
    assert 0 < unequal(src, result.out)[W3] <= count <= 16
    assert unequal(src, result.out).keys() == {W3}
    assert result.cast["unsafe_for_marlin"] == [W1]
    notes = [event.message for event in events if isinstance(event, Note)]
    assert (
        f"{count} blocks of {W3} are rounded again: the scales of the fused set span more than 17 "
        "octaves." in notes
    )
    assert f"1 fused set ({W1}) spans more than 14 octaves: it is unsafe for FP4 Marlin." in notes


def test_exact_refuses_a_plan_that_would_round_a_block_again(tmp_path: Path) -> None:
    src = source(tmp_path, w3=first_row(97))
    plan = exact(plan_of(src))
    (refusal,) = plan.refusals
    assert (refusal.rule, refusal.where) == ("cast-not-exact", W3)
    assert refusal.message.endswith("span more than 17 octaves, and --exact was given.")
    with pytest.raises(Refused):
        quantize(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exact_lets_a_lossless_plan_pass(tmp_path: Path) -> None:
    plan = exact(plan_of(source(tmp_path, w1=first_row(104), w3=first_row(120))))
    assert plan.refusals == ()
    messages = {finding.rule: finding.message for finding in plan.findings}
    assert messages["cast-lossless"] == "MXFP4 becomes NVFP4, lossless: 92,160 of 92,160 blocks."
    assert "cast-unsafe" in messages


def test_exact_refuses_mxfp4_that_becomes_another_format(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{name: x, suffix: X, roles: {expert: FP8_DYNAMIC}}")
    (refusal,) = exact(plan_of(source(tmp_path), str(recipe))).refusals
    assert refusal.message.startswith("90 weights in MXFP4 (")


@pytest.mark.parametrize("check", [quantize, lambda plan, _out: exact(plan)])
def test_a_scale_that_is_nan_is_refused(tmp_path: Path, check: Callable[..., Any]) -> None:
    plan = plan_of(source(tmp_path, w2=first_row(255)))
    with pytest.raises(SourceError) as error:
        check(plan, tmp_path / "out")
    assert error.value.message == (
        f"{W2}.weight_scale holds 2 scales that are NaN (E8M0 255): {W2} cannot be cast."
    )


@pytest.mark.parametrize("check", [quantize, lambda plan, _out: exact(plan)])
def test_numbers_that_are_infinite_are_refused(tmp_path: Path, check: Callable[..., Any]) -> None:
    plan = plan_of(source(tmp_path, w2=first_row(254)))
    with pytest.raises(SourceError, match=r"values that are infinite: it cannot be cast\.$"):
        check(plan, tmp_path / "out")


def test_searched_scales_change_no_byte_of_a_cast_set(tmp_path: Path) -> None:
    src = source(tmp_path)
    plain = mx_sources.tensors(quantize_nvfp4(src, tmp_path / "plain"))
    searched = mx_sources.tensors(quantize(plan_of(src, "nvfp4-opt"), tmp_path / "opt").out)
    assert all(
        torch.equal(plain[name].view(torch.uint8), searched[name].view(torch.uint8))
        for name in plain
        if mx_sources.is_expert(name)
    )


def test_shares_make_the_same_files(tmp_path: Path) -> None:
    src = source(tmp_path, w1=first_row(97))
    whole = quantize_nvfp4(src, tmp_path / "whole", shard_bytes=500_000)
    for number in (2, 1):
        shares_of(src, tmp_path / "shares", 2, 500_000).make(number)
    finish_shares(tmp_path / "shares")
    assert hashes(tmp_path / "shares") == hashes(whole)


def test_a_run_with_a_scratch_makes_the_same_files(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "PIECE", 300_000)
    hub.add("org/mxfp4", source(tmp_path, w1=first_row(97)))
    plan = make_plan(
        open_checkpoint(HubRepo("org/mxfp4")),
        find_recipe("nvfp4"),
        load_families(),
        max_shard_bytes=500_000,
    )
    scratched = quantize(plan, tmp_path / "scratched", scratch=3_000_000)
    whole = quantize(plan, tmp_path / "whole")
    assert hashes(scratched.out) == hashes(whole.out)
    assert scratched.cast == whole.cast
    assert scratched.cast


def test_scales_on_a_hub_are_read_many_at_once(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs a round trip, so a machine with one core waits for 16 of them at a time."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    src = source(tmp_path)
    hub.add("org/mxfp4", src)
    repo = HubRepo("org/mxfp4")
    plan = make_plan(open_checkpoint(repo), find_recipe("nvfp4"), load_families())
    read, reading, enough = repo.read, itertools.count(1), threading.Event()

    def waiting(path: str, start: int = 0, end: int | None = None) -> bytes:
        if next(reading) == 16:
            enough.set()
        enough.wait(timeout=5)  # until 16 are in here
        assert enough.is_set()
        return read(path, start, end)

    monkeypatch.setattr(repo, "read", waiting)
    assert count_casts(plan, repo) == count_casts(plan_of(src), Folder(src))


def test_a_repair_makes_a_cast_expert_again(tmp_path: Path) -> None:
    src = source(tmp_path)
    good = quantize_nvfp4(src, tmp_path / "good")
    bad = mutated(good, tmp_path / "bad-folder", edit=without(f"{W1}.weight_scale"))
    repair(diagnose(Folder(bad), Folder(src), load_families()), tmp_path / "repaired")
    assert unequal(src, tmp_path / "repaired") == {}


def test_a_finished_run_tells_its_cast_again(tmp_path: Path) -> None:
    plan = plan_of(source(tmp_path))
    first = quantize(plan, tmp_path / "out")
    again = quantize(plan, tmp_path / "out")
    assert not again.fresh
    assert again.cast == first.cast


def test_a_fused_set_that_is_only_partly_in_mxfp4_is_quantized(tmp_path: Path) -> None:
    src = mx_sources.source(tmp_path, in_mxfp4(lambda module: module != W1 and "experts" in module))
    plan = plan_of(src)
    kinds = {action.module: action.kind for action in plan.actions if action.scheme}
    assert (kinds[W1], kinds[W3], kinds[W2]) == ("quantize", "quantize", "cast")
    quantize(plan, tmp_path / "out")
    assert unequal_modules(src, tmp_path / "out") <= {W3}


def unequal_modules(src: Path, out: Path) -> set[str]:
    before, after = of_source(src), of_output(out)
    return {module for module in before if (before[module] != after[module]).any()}


def test_the_memory_of_a_cast_is_a_fraction_of_the_weights(tmp_path: Path) -> None:
    plan = plan_of(source(tmp_path))
    unit = next(unit for unit in plan.units if unit.cast)
    assert unit.buffer_bytes * 32 == unit.weight_bytes // 2 * 19
    assert opened(tmp_path / "bad").nbytes == plan.source_bytes


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("kimi_k3", Precision.MXFP4),
        ("deepseek_v4", Precision.MXFP4_FP8),
        ("gpt_oss", Precision.MXFP4_BLOCKS),
    ],
)
def test_the_experts_of_releases_are_equal(
    tmp_path: Path, family: str, precision: Precision
) -> None:
    """gpt-oss has biases of experts, which vLLM does not take in NVFP4."""
    families = load_families()
    src = synth(tmp_path / "src", families[family], precision=precision).path
    checkpoint = open_checkpoint(Folder(src))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{name: x, suffix: X, roles: {expert: NVFP4A16}}")
    plan = make_plan(checkpoint, find_recipe(str(recipe)), families, allow_unsafe=True)
    cast = [action.module for action in plan.actions if action.cast]
    assert len(cast) == len([a for a in plan.actions if a.role is Role.EXPERT and a.scheme])
    result = quantize(plan, tmp_path / "out")
    assert result.cast is not None
    assert result.cast["lossless"] == result.cast["blocks"] > 0
    made, before = (
        read_modules(open_checkpoint(Folder(path)), families) for path in (result.out, src)
    )
    for module in cast:
        values, expected = (judged(view, module) for view in (made, before))
        assert np.array_equal(values, expected)


def judged(view: ModuleView, module: str) -> npt.NDArray[np.float32]:
    """Return a weight as the judge's decoder reads it."""
    weight = weight_of(view, view.modules[module])
    assert weight is not None
    return weight.rows(0, weight.shape[0]).values
