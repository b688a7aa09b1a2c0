"""The loader of models that look every name up in one table: what vLLM 0.32 does on the way."""

import pytest

from mquant.family_files import load_families
from mquant.loader_model.vllm.load import Outcome, load
from mquant.loader_model.vllm.methods.choose import read_method
from mquant.loader_model.vllm.model import build
from mquant.loader_model.vllm.tensors import Loaded
from mquant.loader_rows import Settings
from mquant.synth import Precision, Sizes, make_config, make_tensors

FAMILIES = load_families()
FAMILY = FAMILIES["deepseek_v32"]
CONFIG = make_config(FAMILY, Sizes(), Precision.BF16, tiny=True)
KEY = "model.layers.1.self_attn.indexer.wk.weight"


def loaded(key: list[Loaded]) -> Outcome:
    """Return what vLLM does with a tiny checkpoint whose key of one indexer is given."""
    assert FAMILY.vllm
    rows, settings = FAMILY.vllm, Settings(FAMILY.vllm, CONFIG)
    made = make_tensors(FAMILY, CONFIG, Precision.BF16)
    tensors = [Loaded(each.name, each.dtype, each.shape) for each in made if each.name != KEY]
    return load(lambda: build(rows, settings, None), [*tensors, *key])


def test_an_indexers_key_in_fp8_is_dequantized_beside_a_plain_one() -> None:
    weight, scale = Loaded(KEY, "F8_E4M3", (32, 128)), Loaded(f"{KEY}_scale_inv", "F32", (1, 1))

    assert loaded([Loaded(KEY, "BF16", (32, 128))]).loads
    assert loaded([weight, scale]).loads
    assert loaded([scale, weight]).loads


def test_an_indexers_key_in_fp8_without_scales_stays_unset() -> None:
    outcome = loaded([Loaded(KEY, "F8_E4M3", (32, 128))])

    assert [name for name, _ in outcome.unset] == [
        "model.layers.1.self_attn.indexer.wk_weights_proj.weight"
    ]


def stacked(name: str = "", shape: tuple[int, ...] = ()) -> Outcome:
    """Return what vLLM does with a tiny Granite 4.0, whose tensor of a name has another shape."""
    family = FAMILIES["granitemoehybrid"]
    config = make_config(family, Sizes(), Precision.BF16, tiny=True)
    assert family.vllm
    rows, settings = family.vllm, Settings(family.vllm, config)
    tensors = [
        Loaded(each.name, each.dtype, shape if each.name == name else each.shape)
        for each in make_tensors(family, config, Precision.BF16)
    ]
    return load(lambda: build(rows, settings, None), tensors)


def test_tensors_of_all_experts_beside_the_experts_are_loaded() -> None:
    up, down = (f"model.layers.0.block_sparse_moe.{x}put_linear.weight" for x in ("in", "out"))

    assert stacked().loads
    assert stacked(up, (7, 128, 128)).unset  # the last of eight experts
    assert stacked(up, (9, 128, 128)).refused
    assert stacked(down, (8, 128, 128)).refused
    assert stacked(down, (128, 64)).unknown


def test_a_loader_that_finds_only_some_parameters_of_experts_refuses_others() -> None:
    family = FAMILIES["granitemoehybrid"]
    assert family.vllm
    rows = family.vllm.model_copy(update={"expert_parts": ("input_scale",)})
    config = make_config(family, Sizes(), Precision.BF16, tiny=True)
    name = "model.layers.0.block_sparse_moe.experts.0.up_proj.weight"
    outcome = load(lambda: build(rows, Settings(rows, config), None), [Loaded(name, "BF16", ())])

    assert outcome.refused and outcome.refused[0] == name


@pytest.mark.parametrize("part", ["note", "experts.0.note", "experts.8.up_proj.weight"])
def test_a_loader_that_skips_unknown_names_drops_what_others_refuse(part: str) -> None:
    family = load_families()["step3p5"]
    config = make_config(family, Sizes(), Precision.BF16, tiny=True)
    assert family.vllm
    rows, settings = family.vllm, Settings(family.vllm, config)
    made = make_tensors(family, config, Precision.BF16)
    extra = Loaded(f"model.layers.1.moe.{part}", "BF16", (8,))
    tensors = [*(Loaded(each.name, each.dtype, each.shape) for each in made), extra]

    assert load(lambda: build(rows, settings, None), tensors).dropped == (extra.name,)


def renamed(family: str, old: str, new: str) -> Outcome:
    """Return what vLLM does with a tiny checkpoint of a family, parts of whose names differ."""
    own = FAMILIES[family]
    assert own.vllm
    rows, config = own.vllm, make_config(own, Sizes(), Precision.BF16, tiny=True)
    made = make_tensors(own, config, Precision.BF16)
    tensors = [Loaded(each.name.replace(old, new), each.dtype, each.shape) for each in made]
    return load(lambda: build(rows, Settings(rows, config), None), tensors)


def test_the_head_below_the_text_model_is_not_the_head() -> None:
    assert renamed("deepseek_v32", "lm_head.", "model.lm_head.").refused


def test_a_loader_may_pass_over_every_name_that_the_model_lacks() -> None:
    outcome = renamed("mimo_v2_flash", ".o_proj.", ".out_proj.")

    assert outcome.dropped[0] == "model.layers.0.self_attn.out_proj.weight"
    assert outcome.unset[0][0] == "model.layers.0.self_attn.o_proj.weight"
    assert not outcome.refused


def test_a_tensor_of_which_the_rows_do_not_tell_is_not_judged() -> None:
    outcome = renamed("mimo_v2_flash", ".q_proj.", ".qkv_proj.")

    assert outcome.unknown == "the tensor model.layers.0.self_attn.qkv_proj.weight"


@pytest.mark.parametrize("known", [True, False])
def test_a_loader_passes_over_g_idx_if_it_knows_the_quantization_config(known: bool) -> None:
    family = load_families()["jamba"]
    config = make_config(family, Sizes(), Precision.BF16, tiny=True)
    assert family.vllm
    rows = family.vllm.model_copy(update={"outer_quantization": known})
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    method = read_method({"quantization_config": fp8}, None, (4, 2))
    name = "model.layers.0.feed_forward.down_proj.g_idx"
    tensors = [Loaded(name, "I32", (64,))]

    outcome = load(lambda: build(rows, Settings(rows, config), method), tensors)
    assert (outcome.refused is None) is known
