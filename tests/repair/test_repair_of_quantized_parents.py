"""Wrong weights are found and mended where the parent is quantized itself, without mquant.json."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from judges import read_json
from make import Row
from mquant.checkpoint import Folder
from mquant.events import Event, Note
from mquant.family_files import load_families
from mquant.output import RECORD
from mquant.repair.diagnose import Diagnosis, diagnose
from mquant.repair.repair import repair
from mquant.runs.quantize import quantize
from mquant.synth import Precision, Sizes, synth
from mquant.verify.judge import Depth
from mutate import Bytes, changed, judged, mutated
from repairs import tensors
from run import plan_of

FAMILIES = load_families()
SIZES = Sizes(layers=2, experts=3, hidden=256, intermediate=128, vocab=256)
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2"
ATTENTION = "model.layers.1.self_attn.o_proj"
KEPT = "{expert: NVFP4A16, attention: source}"
EXPERTS_KEPT = "{expert: source, attention: NVFP4A16}"
CODES = "weight_packed"
Change = Callable[[Bytes], Bytes | None]


def at_random(values: Bytes) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, values.size, np.uint8)


def flip(values: Bytes) -> None:
    values[-1] ^= 1


def made_from(src: Path, folder: Path, roles: str) -> Path:
    """Return a checkpoint made from `src`; without `roles`, a copy of it."""
    if not roles:
        return Path(shutil.copytree(src, folder / "good"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"{{name: mine, suffix: X, roles: {roles}}}")
    return quantize(plan_of(src, str(recipe)), folder / "good").out


def found(bad: Path, src: Path) -> Diagnosis:
    return diagnose(Folder(bad), Folder(src), FAMILIES, Depth.FULL)


@pytest.mark.parametrize(
    ("precision", "roles", "name", "change"),
    [
        pytest.param("mxfp4", "{expert: NVFP4A16}", f"{EXPERT}.{CODES}", at_random, id="cast"),
        pytest.param("int8", "{expert: NVFP4A16}", f"{EXPERT}.{CODES}", at_random, id="anew"),
        pytest.param("mxfp4", EXPERTS_KEPT, f"{EXPERT}.{CODES}", flip, id="kept"),
        pytest.param("mxfp4", EXPERTS_KEPT, f"{ATTENTION}.{CODES}", at_random, id="beside kept"),
        pytest.param("fp8-block", KEPT, f"{ATTENTION}.weight", flip, id="kept under other names"),
        pytest.param("mxfp4", "", f"{EXPERT}.{CODES}", at_random, id="a copy in MXFP4"),
        pytest.param("int8", "", f"{EXPERT}.{CODES}", at_random, id="a copy in INT8"),
    ],
)
def test_wrong_codes_are_found_and_made_again(
    tmp_path: Path, precision: str, roles: str, name: str, change: Change
) -> None:
    src = synth(
        tmp_path / "src", FAMILIES["minimax_m2"], sizes=SIZES, precision=Precision(precision)
    ).path
    good = made_from(src, tmp_path, roles)
    (good / RECORD).unlink(missing_ok=True)
    bad = mutated(good, tmp_path / "b", edit=changed(name, data=change))
    assert judged(bad, src, Depth.FULL, ("error",))

    diagnosis = found(bad, src)
    out = repair(diagnosis, tmp_path / "out").out

    assert {action.module for action in diagnosis.repair_plan.replaced} == {name.rpartition(".")[0]}
    assert tensors(out) == tensors(good)
    assert read_json(out / "config.json") == read_json(good / "config.json")
    assert not found(out, src).needed


def test_all_weights_are_compared_if_one_of_the_sample_is_wrong(tmp_path: Path) -> None:
    src = synth(tmp_path / "src", FAMILIES["minimax_m2"], precision=Precision.MXFP4).path
    good = made_from(src, tmp_path, "{expert: NVFP4A16}")
    modules = {f"model.layers.1.block_sparse_moe.experts.{n}.w2" for n in range(4, 8)}
    bad = good
    for number, module in enumerate(sorted(modules)):
        edit = changed(f"{module}.{CODES}", data=at_random)
        bad = mutated(bad, tmp_path / f"{number}", edit=edit)
    (bad / RECORD).unlink()

    diagnosis = diagnose(Folder(bad), Folder(src), FAMILIES)
    assert {action.module for action in diagnosis.repair_plan.replaced} == modules
    assert tensors(repair(diagnosis, tmp_path / "out").out) == tensors(good)


def test_if_most_weights_differ_the_comparison_does_not_count_and_a_note_says_so(
    tmp_path: Path,
) -> None:
    """Tools such as SmoothQuant change most weights on purpose."""
    src = synth(tmp_path / "src", FAMILIES["minimax_m2"], precision=Precision.MXFP4).path
    good = made_from(src, tmp_path, "{expert: NVFP4A16}")
    (good / RECORD).unlink()

    def edit(rows: list[Row]) -> list[Row]:
        return [
            (n, d, s, raw[::-1] if n.endswith("w2.weight_packed") or "w1.weight_p" in n else raw)
            for n, d, s, raw in rows
        ]

    events: list[Event] = []
    diagnosis = diagnose(
        Folder(mutated(good, tmp_path / "b", edit=edit)), Folder(src), FAMILIES, emit=events.append
    )
    assert not diagnosis.needed
    assert [event.message for event in events if isinstance(event, Note)] == [
        "Most weights differ more from src than rounding explains: they are taken for changed on "
        "purpose, and not repaired."
    ]


def test_an_expert_of_a_copy_of_gpt_oss_costs_the_tensor_of_all_experts(tmp_path: Path) -> None:
    src = synth(tmp_path / "src", FAMILIES["gpt_oss"], precision=Precision.MXFP4_BLOCKS).path
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    good = made_from(src, tmp_path, "")

    def one_expert(values: Bytes) -> None:
        values[: len(values) // 8] = at_random(values[: len(values) // 8])

    bad = mutated(good, tmp_path / "b", edit=changed(name, data=one_expert))
    diagnosis = found(bad, src)
    out = repair(diagnosis, tmp_path / "out").out

    assert name in {action.source.name for action in diagnosis.repair_plan.replaced}
    assert tensors(out) == tensors(good)
    assert read_json(out / "config.json") == read_json(good / "config.json")
