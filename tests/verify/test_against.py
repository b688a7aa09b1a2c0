"""`verify` with a parent finds every tensor, config key and side file that differs unduly."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges import opened, read_json
from make import NUMPY, Edit, Row, adding, make_checkpoint, without, write_json
from mquant.errors import SourceError
from mquant.family_files import load_families
from mquant.findings import RULES
from mquant.loader_model.modules import read_modules
from mquant.output import RECORD
from mquant.verify.against_parent_files import MOST_BYTES
from mquant.verify.judge import Depth
from mquant.weights.stored_weight import weight_of
from mutate import changed, forget_digests, judged, mutated, setting
from run import TRAINED, quantize_nvfp4

pytestmark = pytest.mark.upstream

LAYER = "model.layers.0."
QUERY = f"{LAYER}self_attn.q_proj"
MOE = f"{LAYER}block_sparse_moe"
GATE = f"{MOE}.gate.weight"


def test_mquants_own_output_is_clean_at_every_depth(good: Path, parent: Path) -> None:
    for depth in Depth:
        assert judged(good, parent, depth) == {}


def full(bad: Path, parent: Path) -> dict[str, str]:
    return judged(bad, parent, Depth.FULL)


def to_bf16(rows: list[Row]) -> None:
    """Cast a router to BF16, as `save_pretrained` casts it."""
    (number,) = (n for n, row in enumerate(rows) if row[0] == GATE)
    _, _, shape, raw = rows[number]
    rows[number] = (GATE, "BF16", shape, np.frombuffer(raw, "<u2")[1::2].tobytes())


def swapped(one: str, other: str) -> Edit:
    """Return an edit that swaps the names of two modules."""

    def edit(rows: list[Row]) -> list[Row]:
        names = {one: other, other: one}
        return [
            (f"{names.get(module, module)}.{suffix}", *row[1:])
            for row in rows
            for module, _, suffix in [row[0].rpartition(".")]
        ]

    return edit


def swap_nibbles(values: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> Any:
    return (values >> 4) | (values << 4)


@pytest.mark.parametrize(
    ("edit", "rule", "words"),
    [
        (changed(GATE, data=setting(0, 0x55)), "kept-tensor-differs", "not bit-equal"),
        (to_bf16, "kept-tensor-differs", f"{GATE} is BF16 [4, 64]; the parent's is F32"),
        (without("lm_head"), "parent-tensor-missing", "lm_head.weight of the parent is missing"),
        (without(".e_score"), "parent-tensor-missing", "e_score_correction_bias of the parent"),
        (adding("model.extra.weight"), "parent-lacks-tensor", "no model.extra"),
        (adding("lm_head.bias"), "parent-lacks-tensor", "no lm_head.bias"),
        (
            changed(f"{QUERY}.weight_packed", data=swap_nibbles),
            "weight-beyond-bound",
            f"{QUERY} is further from the parent than NVFP4 explains",
        ),
        (
            changed(f"{QUERY}.weight_packed", data=setting(5, 0x77)),
            "weight-beyond-bound",
            "(row 0, column 1",
        ),
        (
            changed(f"{QUERY}.weight_scale", data=setting(6, 0x7E)),
            "weight-beyond-bound",
            "(row 1, column ",
        ),
        (
            changed(f"{QUERY}.weight_global_scale", data=setting(2, 0xFF)),
            "weight-beyond-bound",
            QUERY,
        ),
        (
            swapped(f"{LAYER}self_attn.k_proj", f"{LAYER}self_attn.v_proj"),
            "weight-beyond-bound",
            "k_proj is further",
        ),
    ],
)
def test_a_tensor_that_differs_from_the_parents_is_found(
    good: Path, parent: Path, tmp_path: Path, edit: Edit, rule: str, words: str
) -> None:
    assert words in full(mutated(good, tmp_path, edit=edit), parent)[rule]


def test_swapped_experts_are_found_by_a_sample(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", layers=8)
    good = quantize_nvfp4(src, tmp_path / "out")
    experts = [f"model.layers.{{}}.block_sparse_moe.experts.{n}.w2" for n in range(4)]

    def edit(rows: list[Row]) -> list[Row]:
        for layer in range(8):
            for one, other in ((0, 1), (2, 3)):
                swap = swapped(experts[one].format(layer), experts[other].format(layer))
                rows = swap(rows) or rows
        return rows

    findings = judged(mutated(good, tmp_path, edit=edit), src)
    assert "and 7 more like it" in findings["weight-beyond-bound"]


def test_halved_precision_everywhere_is_a_high_error(
    good: Path, parent: Path, tmp_path: Path
) -> None:
    """Every code is one step nearer to 0: no element is out of bounds, but the sum is too large."""

    def smaller(values: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> Any:
        low, high = values & 15, values >> 4
        low, high = (n - ((n & 7) > 1) for n in (low, high))
        return (low | (high << 4)).astype(np.uint8)

    edit = changed(f"{QUERY}.weight_packed", data=smaller)
    findings = full(mutated(good, tmp_path, edit=edit), parent)
    assert set(findings) <= {"weight-error-high", "weight-beyond-bound"}
    assert findings


@pytest.mark.parametrize(
    ("config", "rule", "words"),
    [
        ({"rope_theta": ...}, "config-key-lost", "lost rope_theta"),
        ({"rope_theta": 1}, "config-key-differs", "in rope_theta"),
    ],
)
def test_a_config_key_that_differs_from_the_parents_is_found(
    good: Path, parent: Path, tmp_path: Path, config: Any, rule: str, words: str
) -> None:
    assert words in judged(mutated(good, tmp_path, config=config), parent)[rule]


def test_stamps_of_writers_may_differ(good: Path, parent: Path, tmp_path: Path) -> None:
    bad = mutated(good, tmp_path, config={"transformers_version": "5.17.0", "torch_dtype": ...})
    assert judged(bad, parent) == {}


def test_missing_and_changed_side_files_are_found(trained: Path, tmp_path: Path) -> None:
    assert judged(trained, TRAINED) == {}
    bad = forget_digests(Path(shutil.copytree(trained, tmp_path / "bad")))
    for name in ("tokenizer.json", "modeling_minimax_m2.py", "LICENSE"):
        (bad / name).unlink()
    with (bad / "generation_config.json").open("a") as file:
        file.write(" ")
    assert judged(bad) == {}  # without a parent, no side file is missed
    findings = judged(bad, TRAINED)
    assert "parent's modeling_minimax_m2.py, tokenizer.json." in findings["side-file-missing"]
    assert "generation_config.json" in findings["side-file-differs"]
    assert "LICENSE" in findings["licence-missing"]


def test_a_side_file_that_no_model_has_is_not_compared(trained: Path, tmp_path: Path) -> None:
    huge = forget_digests(Path(shutil.copytree(trained, tmp_path / "huge")))
    os.truncate(huge / "tokenizer.json", MOST_BYTES + 1)
    with pytest.raises(
        SourceError, match=r"tokenizer\.json of huge has 1,000,000,001 bytes; mquant"
    ):
        judged(huge, huge)


FED = ("q_proj", "k_proj", "v_proj", "gate", "w1", "w3")


def _scale(rows: list[Row]) -> None:
    """Scale a model as AWQ does, with factors that BF16 holds exactly."""
    factors = np.float32(2) ** (np.arange(64) % 5 - 2)
    for number, (name, dtype, shape, raw) in enumerate(rows):
        module = name.split(".")[-2]
        values = np.frombuffer(raw, NUMPY[dtype])
        if module in ("input_layernorm", "post_attention_layernorm"):
            values = values / factors.astype(values.dtype)
        elif module in FED:
            values = (values.reshape(shape) * factors.astype(values.dtype)).reshape(-1)
        rows[number] = (name, dtype, shape, values.tobytes())


@pytest.fixture(scope="module")
def by_awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a quantized checkpoint of the parent after AWQ, with a mquant.json that names AWQ."""
    folder = tmp_path_factory.mktemp("awq")
    out = quantize_nvfp4(make_checkpoint(folder / "src", edit=_scale), folder / "out")
    record = read_json(out / RECORD)
    record["recipe"]["smoothing"] = "awq"
    write_json(out / RECORD, record)
    return out


def test_tensors_that_awq_scaled_are_compared_by_the_norms_factors(
    by_awq: Path, parent: Path
) -> None:
    assert full(by_awq, parent) == {}
    # Both norms of two layers, and w2 and w3 of eight experts, whose factors are in no norm.
    assert judged(by_awq, parent, Depth.FULL, ("info",))["scaled-not-compared"] == (
        f"{LAYER}block_sparse_moe.experts.0.w2 was scaled by AWQ: not compared (and 19 more like "
        "it)."
    )


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (changed(f"{QUERY}.weight_packed", data=swap_nibbles), "weight-beyond-bound"),
        (swapped(f"{MOE}.experts.0.w1", f"{MOE}.experts.1.w1"), "weight-beyond-bound"),
        (changed(GATE, data=setting(3, 0x55)), "weight-beyond-bound"),
        (to_bf16, "kept-tensor-differs"),
        (changed(f"{LAYER}self_attn.q_norm.weight", data=setting(1, 0)), "kept-tensor-differs"),
        (
            changed(f"{LAYER}input_layernorm.weight", data=lambda values: values[::-1].copy()),
            "weight-beyond-bound",
        ),
    ],
)
def test_differences_that_awq_does_not_explain_are_found(
    by_awq: Path, parent: Path, tmp_path: Path, edit: Edit, rule: str
) -> None:
    assert rule in full(mutated(by_awq, tmp_path, edit=edit), parent)


def test_a_norm_of_0_in_both_checkpoints_has_no_factors(
    by_awq: Path, parent: Path, tmp_path: Path
) -> None:
    zero = changed(f"{LAYER}input_layernorm.weight", data=setting(slice(0, 2), 0))
    child = mutated(by_awq, tmp_path / "child", edit=zero)
    zero_parent = mutated(parent, tmp_path / "parent", edit=zero)

    assert full(child, zero_parent) == {}
    message = judged(child, zero_parent, Depth.FULL, ("info",))["scaled-not-compared"]
    assert message.endswith("(and 22 more like it).")  # q, k and v, too


def test_without_the_record_tensors_that_awq_scaled_differ_from_the_parents(
    by_awq: Path, parent: Path, tmp_path: Path
) -> None:
    bad = mutated(by_awq, tmp_path)
    (bad / RECORD).unlink()
    assert full(bad, parent).keys() == {"kept-tensor-differs", "weight-beyond-bound"}


def test_another_model_as_the_parent_is_found(good: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=7)
    findings = judged(good, other)
    assert {"kept-tensor-differs", "weight-beyond-bound"} <= set(findings)


def test_a_chat_template_may_be_in_the_tokenizer_config(trained: Path, tmp_path: Path) -> None:
    bad = forget_digests(Path(shutil.copytree(trained, tmp_path / "bad")))
    (bad / "chat_template.jinja").unlink()
    assert "side-file-missing" in judged(bad, TRAINED)
    table = read_json(bad / "tokenizer_config.json")
    write_json(bad / "tokenizer_config.json", {**table, "chat_template": "{{ messages }}"})
    assert set(judged(bad, TRAINED)) == {"side-file-differs"}


def test_every_rule_against_the_parent_is_tested() -> None:
    text = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    declared = [rule.id for rule in RULES.values() if rule.needs == "against"]
    assert [rule for rule in declared if f'"{rule}"' not in text] == []


def test_decoded_rows_equal_compressed_tensors(trained: Path) -> None:
    import torch
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
    from safetensors.torch import load_file

    scheme: QuantizationScheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    tensors = {n: t for s in trained.glob("*.safetensors") for n, t in load_file(s).items()}
    view = read_modules(opened(trained), load_families())
    for name in (QUERY, f"{LAYER}block_sparse_moe.experts.3.w2"):
        parts = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{name}.")}
        expected = NVFP4PackedCompressor.decompress(parts, scheme)["weight"].to(torch.float32)
        weight = weight_of(view, view.modules[name])
        assert weight is not None
        values = weight.rows(0, weight.shape[0]).values
        # Upstream's values are rounded to BF16.
        np.testing.assert_allclose(values, expected.numpy(), rtol=2**-7, atol=0)
        np.testing.assert_array_equal(weight.rows(3, 9).values, values[3:9])
