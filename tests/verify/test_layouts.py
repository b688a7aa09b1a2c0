"""`verify` judges upstream's FP8 and packed integers, and ModelOpt's NVFP4, like its own layout."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from family_cases import DEEP
from judges import data, model_free_ptq, one_shard, opened, read_json
from make import Edit, Row, make_row, without, write_json, write_shard
from mquant.checkpoint import CONFIG_NAME
from mquant.family import Family
from mquant.family_files import load_families
from mquant.loader_model.modules import MODELOPT_NAME, read_modules
from mquant.synth import Precision, Sizes, synth
from mquant.verify.ignore_report import IgnoreReport, check_ignore
from mquant.verify.judge import Depth
from mutate import changed, judged, mutated, scalar, setting
from run import quantize_nvfp4

pytestmark = pytest.mark.upstream

KEY = "model.layers.1.self_attn.k_proj"
EXPERT = "model.layers.1.block_sparse_moe.experts.1.w1"
GATE = "model.layers.1.block_sparse_moe.gate"
KEPT = ["lm_head", "model.embed_tokens"]
ROUTERS = r"re:.*block_sparse_moe\.gate$"
LOADS = "nothing in ignore stops vLLM 0.32 from loading this checkpoint."
UNTOLD = "whether vLLM 0.32 loads this checkpoint is not known."

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def resized(family: Family, **sizes: int) -> Family:
    """Return a family whose tiny model has other sizes, if the family has such keys."""
    tiny = family.synth.tiny
    fresh = {key: size for key, size in sizes.items() if key in tiny}
    return family.model_copy(
        update={"synth": family.synth.model_copy(update={"tiny": {**tiny, **fresh}})}
    )


class Built:
    """Parents and the checkpoints that upstream writes from the parents; each is written once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parent = cache(self._parent)
        self.upstream = cache(self._upstream)
        self.modelopt = cache(self._modelopt)

    def _parent(self, family: str) -> Path:
        # 256 is a multiple of the groups and blocks of 128, as are two heads of 64.
        src = self.folder / f"{family}-synth"
        sizes = Sizes(hidden=256, intermediate=256)
        synth(src, resized(load_families()[family], head_dim=64), sizes=sizes)
        return one_shard(src, self.folder / family)

    def _upstream(self, family: str, scheme: str) -> Path:
        out = self.folder / f"{family}-{scheme}"
        kept = [*KEPT, ROUTERS] if family == "minimax_m2" else KEPT
        return model_free_ptq(self.parent(family), out, kept, scheme)

    def _modelopt(self, family: str) -> Path:
        """Write the same numbers in ModelOpt's layout, with ModelOpt's quantization config."""
        src, out = self._as_modelopt(family)
        table = read_json(src / CONFIG_NAME)
        del table["quantization_config"]
        write_json(out / CONFIG_NAME, table)
        quantization = {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": ["lm_head", *(["*.gate"] if family == "minimax_m2" else [])],
        }
        producer = {"name": "modelopt", "version": "0.39.0"}
        write_json(out / MODELOPT_NAME, {"producer": producer, "quantization": quantization})
        return out

    def _as_modelopt(self, family: str) -> tuple[Path, Path]:
        src, out = self.upstream(family, "NVFP4A16"), self.folder / f"{family}-modelopt"
        out.mkdir()
        checkpoint, rows = opened(src), list[Row]()
        for info in checkpoint.tensors.values():
            module, _, suffix = info.name.rpartition(".")
            raw = data(checkpoint, info.name)
            if suffix == "weight_packed":
                rows.append((f"{module}.weight", info.dtype, info.shape, raw))
            elif suffix == "weight_global_scale":
                factor = 1 / np.frombuffer(raw, np.float32)
                rows.append((f"{module}.weight_scale_2", "F32", (), factor.tobytes()))
                rows.append((f"{module}.input_scale", "F32", (), np.float32(0.01).tobytes()))
            else:
                rows.append((info.name, info.dtype, info.shape, raw))
        write_shard(out / "model.safetensors", rows)
        return src, out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("layouts"))


def judge_ignore(folder: Path) -> IgnoreReport:
    return check_ignore(read_modules(opened(folder), load_families()))


def dropped(name: str) -> Edit:
    """Return an edit that drops the tensor of exactly this name."""
    return lambda rows: [row for row in rows if row[0] != name]


def halved(name: str, shape: tuple[int, ...]) -> Edit:
    """Return an edit that keeps the first half of a tensor's bytes."""
    return changed(name, shape=shape, data=lambda raw: raw[: len(raw) // 2])


def rolled(values: Bytes) -> Bytes:
    return np.roll(values, len(values) // 2)


# --- good checkpoints


@pytest.mark.parametrize("family", sorted({*load_families()} - {"gpt_oss"}))
def test_mquants_output_of_every_family_is_clean(family: str, tmp_path: Path) -> None:
    shipped = load_families()[family]
    synth(tmp_path / "src", shipped)
    out = quantize_nvfp4(tmp_path / "src", tmp_path / "out")
    assert judged(out, tmp_path / "src", Depth.FULL) == {}
    report = judge_ignore(out)
    assert report.verdict.endswith(LOADS if shipped.vllm else UNTOLD)
    assert report.findings == ()


@pytest.mark.parametrize("family", ["llama", "qwen3", "minimax_m2"])
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "W4A16", "W8A16"])
def test_upstreams_output_is_clean(built: Built, family: str, scheme: str) -> None:
    out = built.upstream(family, scheme)
    assert judged(out, built.parent(family), Depth.FULL) == {}
    report = judge_ignore(out)
    assert (report.verdict.endswith(LOADS), report.findings) == (True, ())


@pytest.mark.parametrize("family", ["llama", "minimax_m2"])
def test_modelopts_layout_is_clean(built: Built, family: str) -> None:
    out = built.modelopt(family)
    assert judged(out, built.parent(family), Depth.FULL) == {}
    report = judge_ignore(out)
    assert (report.verdict.endswith(LOADS), report.findings) == (True, ())
    assert report.method == "modelopt"


def test_modelopts_config_may_be_in_config_json(built: Built, tmp_path: Path) -> None:
    table = read_json(built.modelopt("llama") / MODELOPT_NAME)["quantization"]
    table["ignore"] = table.pop("exclude_modules")  # the key there
    config = {"quantization_config": {"quant_method": "modelopt", **table}}
    out = mutated(built.modelopt("llama"), tmp_path, config=config)
    (out / MODELOPT_NAME).unlink()
    assert judged(out, built.parent("llama"), Depth.FULL) == {}
    assert judge_ignore(out).findings == ()


@pytest.mark.parametrize("family", DEEP)
def test_fp8_in_blocks_is_clean(family: str, tmp_path: Path) -> None:
    synth(tmp_path / "out", load_families()[family], precision=Precision.FP8_BLOCK)
    assert judged(tmp_path / "out", depth=Depth.NUMBERS) == {}


# --- ModelOpt, broken


@pytest.mark.parametrize(
    ("edit", "rule", "words"),
    [
        (dropped(f"{KEY}.weight"), "part-missing", "has no weight."),
        (dropped(f"{KEY}.weight_scale"), "part-missing", "has no weight_scale."),
        (dropped(f"{KEY}.weight_scale_2"), "part-missing", "has no weight_scale_2."),
        (without("weight_scale_2"), "part-missing", "and 13 more like it"),
        (dropped(f"{KEY}.input_scale"), "activation-scales-missing", f"{KEY} has no input_scale"),
        (changed(f"{KEY}.weight_scale", dtype="U8"), "part-dtype", "is U8; ModelOpt NVFP4 has"),
        (changed(f"{KEY}.weight_scale_2", shape=(1, 1)), "part-shape", "needs [1] or []"),
        (changed(f"{KEY}.weight_scale", shape=(64, 32)), "part-shape", "needs [128, 16]"),
        (halved(f"{KEY}.weight", (64, 128)), "shape-disagrees", "implies [128, 256]"),
        (changed(f"{KEY}.weight_scale_2", data=scalar(0)), "global-scale-invalid", "is 0"),
        (changed(f"{KEY}.weight_scale_2", data=scalar(1)), "global-scale-differs", KEY),
        (changed(f"{KEY}.input_scale", data=scalar(-1)), "global-scale-invalid", "is -1"),
        (changed(f"{KEY}.weight_scale", data=setting(3, 0x7F)), "scale-not-finite", KEY),
        (changed(f"{KEY}.weight_scale", data=setting(3, 0)), "scale-zero", "over a block"),
    ],
)
def test_a_broken_modelopt_tensor_is_found(
    built: Built, tmp_path: Path, edit: Edit, rule: str, words: str
) -> None:
    bad = mutated(built.modelopt("llama"), tmp_path, edit=edit)
    assert words in judged(bad, depth=Depth.NUMBERS)[rule]


def test_a_router_that_modelopt_quantized_is_found(built: Built, tmp_path: Path) -> None:
    def edit(rows: list[Row]) -> list[Row]:
        kept = [row for row in rows if row[0] != f"{GATE}.weight"]
        return [
            *kept,
            make_row(f"{GATE}.weight", "U8", (8, 128)),
            make_row(f"{GATE}.weight_scale", "F8_E4M3", (8, 16)),
            make_row(f"{GATE}.weight_scale_2", "F32", ()),
            make_row(f"{GATE}.input_scale", "F32", ()),
        ]

    report = judge_ignore(mutated(built.modelopt("minimax_m2"), tmp_path, edit=edit))
    assert (
        report.verdict
        == "1 of 2 routers are quantized: vLLM 0.32 will refuse to load this checkpoint."
    )
    suffixes = ("input_scale", "weight", "weight_scale", "weight_scale_2")
    assert [(name, parts) for name, _, parts in report.quantized] == [(GATE, suffixes)]


# --- packed integers, broken


@pytest.mark.parametrize(
    ("edit", "rule", "words"),
    [
        (dropped(f"{EXPERT}.weight_packed"), "part-missing", "has no weight_packed"),
        (dropped(f"{EXPERT}.weight_scale"), "part-missing", "has no weight_scale"),
        (dropped(f"{EXPERT}.weight_shape"), "part-missing", "has no weight_shape"),
        (without(f"{EXPERT}."), "fused-set-incomplete", f"without {EXPERT}.weight"),
        (changed(f"{EXPERT}.weight_scale", dtype="I16"), "part-dtype", "is I16; packed integers"),
        (changed(f"{EXPERT}.weight_scale", shape=(128, 4)), "part-shape", "needs [256, 2]"),
        (halved(f"{EXPERT}.weight_packed", (256, 16)), "shape-disagrees", "implies [256, 256]"),
        (changed(f"{EXPERT}.weight_shape", data=setting(0, 9)), "packed-shape-differs", "is [265,"),
        (changed(f"{EXPERT}.weight_scale", data=setting(slice(2), 0)), "scale-zero", EXPERT),
        (
            changed(f"{EXPERT}.weight_scale", data=setting(slice(2), 255)),
            "scale-not-finite",
            EXPERT,
        ),
        (changed(f"{EXPERT}.weight_packed", data=rolled), "weight-beyond-bound", EXPERT),
    ],
)
def test_a_broken_tensor_of_packed_integers_is_found(
    built: Built, tmp_path: Path, edit: Edit, rule: str, words: str
) -> None:
    bad = mutated(built.upstream("minimax_m2", "W4A16"), tmp_path, edit=edit)
    assert words in judged(bad, built.parent("minimax_m2"), Depth.FULL)[rule]


def weights(built: Built, scheme: str, **keys: object) -> dict[str, Any]:
    """Return the quantization_config of the upstream llama, with other `weights`."""
    table = read_json(built.upstream("llama", scheme) / CONFIG_NAME)["quantization_config"]
    ((name, group),) = table["config_groups"].items()
    group = {**group, "weights": {**group["weights"], **keys}}
    return {"quantization_config": {**table, "config_groups": {name: group}}}


@pytest.mark.parametrize(
    ("scheme", "keys", "rule", "words"),
    [
        ("W4A16", {"group_size": 64}, "part-shape", "needs [256, 4]"),
        ("W4A16", {"num_bits": 8}, "shape-disagrees", "config.json implies"),
        ("W4A16", {"symmetric": False}, "part-missing", "has no weight_zero_point"),
        ("W4A16", {"type": "float"}, "weights-misdeclared", "say type float, but"),
        ("FP8_DYNAMIC", {"num_bits": 4}, "weights-misdeclared", "say num_bits 4, but"),
        ("FP8_DYNAMIC", {"strategy": "tensor"}, "part-shape", "needs [1] or []"),
        ("NVFP4A16", {"group_size": 32}, "weights-misdeclared", "say group_size 32, but"),
    ],
)
def test_a_config_json_that_contradicts_the_tensors_is_found(
    built: Built, tmp_path: Path, scheme: str, keys: dict[str, object], rule: str, words: str
) -> None:
    config = weights(built, scheme, **keys)
    assert words in judged(mutated(built.upstream("llama", scheme), tmp_path, config=config))[rule]


@pytest.mark.parametrize("scheme", ["NVFP4A16", "W4A16", "FP8_DYNAMIC"])
def test_a_missing_quantization_config_is_found(built: Built, tmp_path: Path, scheme: str) -> None:
    bad = mutated(built.upstream("llama", scheme), tmp_path, config={"quantization_config": ...})
    assert set(judged(bad, built.parent("llama"), Depth.FULL)) >= {"quantization-undeclared"}


def test_groups_of_packed_integers_may_differ(built: Built, tmp_path: Path) -> None:
    """Of two groups vLLM takes the one with the module's name before the one with its class."""
    wide = opened(built.upstream("llama", "W8A16"))

    def from_wide(row: Row) -> Row:
        info = wide.tensors[row[0]]
        return info.name, info.dtype, info.shape, data(wide, info.name)

    def edit(rows: list[Row]) -> list[Row]:
        return [from_wide(row) if ".down_proj." in row[0] else row for row in rows]

    config = weights(built, "W4A16")
    groups = config["quantization_config"]["config_groups"]
    other = {**groups["W4A16"], "targets": ["re:.*down_proj"]}
    groups["more"] = {**other, "weights": {**other["weights"], "num_bits": 8}}
    good = mutated(built.upstream("llama", "W4A16"), tmp_path, edit=edit, config=config)
    assert judged(good) == {}
    bad = mutated(built.upstream("llama", "W4A16"), tmp_path / "bad", config=config)
    assert "down_proj" in judged(bad)["vllm-refuses"]


# --- FP8, broken


@pytest.mark.parametrize(
    ("edit", "rule", "words"),
    [
        (dropped(f"{KEY}.weight"), "part-missing", "has no weight."),
        (dropped(f"{KEY}.weight_scale"), "part-missing", "has no weight_scale"),
        (halved(f"{KEY}.weight_scale", (64, 1)), "part-shape", "needs [128, 1] or [128]"),
        (halved(f"{KEY}.weight", (64, 256)), "shape-disagrees", "implies [128, 256]"),
        (changed(f"{KEY}.weight", data=setting(0, 0x7F)), "value-not-finite", f"{KEY}.weight"),
        (changed(f"{KEY}.weight_scale", data=setting(slice(2), 0)), "scale-zero", KEY),
        (changed(f"{KEY}.weight", data=rolled), "weight-beyond-bound", KEY),
    ],
)
def test_a_broken_fp8_tensor_is_found(
    built: Built, tmp_path: Path, edit: Edit, rule: str, words: str
) -> None:
    bad = mutated(built.upstream("llama", "FP8_DYNAMIC"), tmp_path, edit=edit)
    assert words in judged(bad, built.parent("llama"), Depth.FULL)[rule]


# --- layouts that are not judged


def as_gptq(rows: list[Row]) -> list[Row]:
    """Return the tensors under GPTQ's names."""
    renamed = {".weight_scale": ".scales", "_proj.weight": "_proj.qweight"}

    def own(name: str) -> str:
        end = next((end for end in renamed if name.endswith(end)), "")
        return name.removesuffix(end) + renamed.get(end, "")

    return [(own(name), *rest) for name, *rest in rows]  # type: ignore[misc]


def test_unknown_layouts_are_not_judged(built: Built, tmp_path: Path) -> None:
    src = mutated(built.upstream("llama", "W8A8"), tmp_path, edit=as_gptq)
    findings = judged(src, built.parent("llama"), Depth.FULL)
    assert set(findings) == {"layout-not-judged", "weight-not-compared", "vllm-refuses"}
    assert "neither parts nor numbers were judged" in findings["layout-not-judged"]
    assert "and 13 more like it" in findings["weight-not-compared"]


@pytest.mark.parametrize("scheme", ["MXFP4A16", "MXFP8", "W4A16_ASYM", "W8A16", "W8A8"])
def test_what_llmcompressor_writes_is_close_to_the_parent(built: Built, scheme: str) -> None:
    assert judged(built.upstream("llama", scheme), built.parent("llama"), Depth.FULL) == {}


def test_zero_points_have_the_shape_of_the_integers(built: Built, tmp_path: Path) -> None:
    out = built.upstream("llama", "W4A16_ASYM")
    edit = halved(f"{KEY}.weight_zero_point", (8, 2))
    findings = judged(mutated(out, tmp_path, edit=edit))
    assert "needs [16, 2] or [128, 2]" in findings["part-shape"]


def test_a_global_scale_of_zero_is_beyond_every_bound(built: Built, tmp_path: Path) -> None:
    edit = changed(f"{KEY}.weight_global_scale", data=scalar(0))
    bad = mutated(built.upstream("llama", "NVFP4A16"), tmp_path, edit=edit)
    findings = judged(bad, built.parent("llama"), Depth.FULL)
    assert {"global-scale-invalid", "weight-beyond-bound"} <= set(findings)


def test_missing_architectures_are_found(built: Built, tmp_path: Path) -> None:
    """Without the key, vLLM builds the model without a head; of Llama vLLM builds the same."""
    config = {"architectures": ...}
    bad = mutated(built.parent("minimax_m2"), tmp_path, config=config)
    assert "no architectures" in judged(bad)["config-key-missing"]
    assert judged(mutated(built.parent("llama"), tmp_path / "llama", config=config)) == {}
