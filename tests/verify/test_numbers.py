"""`verify` at the depth of numbers finds every fault that only the data show."""

from pathlib import Path

import numpy as np
import pytest

from judges import opened
from make import Edit, Row, make_checkpoint, without
from mquant.checkpoint import Folder
from mquant.events import Event, Progress
from mquant.family_files import load_families
from mquant.findings import RULES
from mquant.verify import numbers
from mquant.verify.judge import Depth, verify
from mutate import changed, judged, mutated, scalar, setting
from run import quantize_nvfp4

pytestmark = pytest.mark.upstream

EXPERT = "model.layers.1.block_sparse_moe.experts.2."
SCALE = f"{EXPERT}w2.weight_scale"
GLOBAL = f"{EXPERT}w2.weight_global_scale"
GATE = "model.layers.0.block_sparse_moe.gate.weight"


@pytest.mark.parametrize("depth", [Depth.NUMBERS, Depth.FULL])
def test_mquants_own_output_is_clean(good: Path, depth: Depth) -> None:
    assert judged(good, depth=depth) == {}


def nan(dtype: str) -> Edit:
    name = GATE if dtype == "F32" else "model.norm.weight"
    raw = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    return changed(name, data=setting(slice(0, 4), 0xFF) if dtype == "BF16" else _first(raw))


def _first(raw: "np.ndarray[tuple[int], np.dtype[np.uint8]]"):  # type: ignore[no-untyped-def]
    def change(values: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> None:
        values[:4] = raw

    return change


@pytest.mark.parametrize(
    ("edit", "rule", "words"),
    [
        (nan("F32"), "value-not-finite", f"{GATE} holds NaN"),
        (nan("BF16"), "value-not-finite", "model.norm.weight holds NaN"),
        (changed(SCALE, data=setting(3, 0x7F)), "scale-not-finite", f"{SCALE} holds NaN"),
        (changed(SCALE, data=setting(3, 0xFF)), "scale-not-finite", f"{SCALE} holds NaN"),
        (changed(SCALE, data=setting(3, 0xB8)), "scale-negative", f"{SCALE} holds negative"),
        (changed(SCALE, data=setting(3, 0x00)), "scale-zero", "a block that is not zero (row 1)"),
        (changed(SCALE, data=setting(3, 0x80)), "scale-zero", f"{SCALE} is zero"),
        (changed(GLOBAL, data=scalar(0)), "global-scale-invalid", f"{GLOBAL} is 0"),
        (changed(GLOBAL, data=scalar(-5)), "global-scale-invalid", "is -5"),
        (changed(GLOBAL, data=scalar(float("inf"))), "global-scale-invalid", "is inf"),
        (changed(GLOBAL, data=scalar(float("nan"))), "global-scale-invalid", "is nan"),
        (changed(GLOBAL, data=scalar(1e-4)), "global-scale-inverted", "is 0.0001"),
        (
            changed(GLOBAL.replace("w2", "w3"), data=setting(0, 1)),
            "global-scale-differs",
            "w1.weight_global_scale and",
        ),
    ],
)
def test_an_invalid_number_is_found(
    good: Path, tmp_path: Path, edit: Edit, rule: str, words: str
) -> None:
    bad = mutated(good, tmp_path, edit=edit)
    assert judged(bad) == {}  # headers do not show the fault
    findings = judged(bad, depth=Depth.NUMBERS)
    assert words in findings[rule]
    assert len(findings) == 1


def test_a_global_scale_without_a_reciprocal_is_found(good: Path, tmp_path: Path) -> None:
    bad = mutated(good, tmp_path, edit=changed(GLOBAL, data=scalar(1e-40)))
    findings = judged(bad, depth=Depth.NUMBERS)
    assert findings["global-scale-invalid"].startswith(
        f"{GLOBAL} is 9.99995e-41, whose reciprocal F32 cannot hold"
    )


def test_global_scales_that_are_all_reciprocals_are_an_error(good: Path, tmp_path: Path) -> None:
    def inverted(rows: list[Row]) -> list[Row]:
        return [
            (
                n,
                d,
                s,
                (1 / np.frombuffer(raw, "<f4")).tobytes() if "weight_global_scale" in n else raw,
            )
            for n, d, s, raw in rows
        ]

    findings = judged(mutated(good, tmp_path, edit=inverted), depth=Depth.NUMBERS)
    assert "they look like reciprocals" in findings["global-scales-reciprocal"]


def test_every_numbers_rule_is_tested() -> None:
    text = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    declared = [r for r in RULES.values() if r.needs == "numbers"]
    assert declared
    assert [rule.id for rule in declared if f'"{rule.id}"' not in text] == []


def test_blocks_and_weights_of_zeros_are_clean(tmp_path: Path) -> None:
    zeroed = f"{EXPERT}w2.weight"
    src = make_checkpoint(tmp_path / "a", edit=changed(zeroed, data=setting(slice(None), 0)))
    half = make_checkpoint(tmp_path / "b", edit=changed(zeroed, data=setting(slice(0, 640), 0)))
    for number, parent in enumerate((src, half)):
        out = quantize_nvfp4(parent, tmp_path / f"out-{number}")
        assert judged(out, parent, Depth.FULL) == {}


def test_a_zero_scale_of_a_block_of_zeros_is_clean(good: Path, tmp_path: Path) -> None:
    def edit(rows):  # type: ignore[no-untyped-def]
        changed(SCALE, data=setting(0, 0))(rows)
        changed(f"{EXPERT}w2.weight_packed", data=setting(slice(0, 8), 0x80))(rows)

    assert judged(mutated(good, tmp_path, edit=edit), depth=Depth.NUMBERS) == {}


def test_parts_of_the_wrong_shape_have_only_structural_findings(good: Path, tmp_path: Path) -> None:
    bad = mutated(good, tmp_path, edit=changed(SCALE, shape=(2, 64)))
    assert set(judged(bad, depth=Depth.NUMBERS)) == {"part-shape"}
    bad = mutated(good, tmp_path / "other", edit=without(f"{EXPERT}w2.weight_packed"))
    assert set(judged(bad, depth=Depth.NUMBERS)) == {"part-missing"}


def test_large_tensors_are_read_in_pieces(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbers, "PIECE", 64)
    sizes = []

    class Watched(Folder):
        def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
            if end is not None and start:
                sizes.append(end - start)
            return super().read(path, start, end)

    bad = mutated(good, tmp_path, edit=changed(SCALE, data=setting(60, 0)))
    report = verify(Watched(bad), load_families(), Depth.NUMBERS)
    assert max(sizes) <= 64
    assert [f.message[-9:] for f in report.findings if f.severity != "info"] == ["(row 30)."]


def test_progress_reaches_the_end(good: Path) -> None:
    events: list[Event] = []
    verify(Folder(good), load_families(), Depth.NUMBERS, emit=events.append)
    steps = [event for event in events if isinstance(event, Progress)]
    assert steps[-1] == Progress("verify", opened(good).nbytes, opened(good).nbytes)
