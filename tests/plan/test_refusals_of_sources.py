"""`mquant.plan` refuses an incomplete, inconsistent or quantized source, by name and with a fix."""

import pytest

from checkpoint.two_shards import weight_map
from make import adding, renamed, without, write_index
from mquant.checkpoint import INDEX_NAME
from mquant.errors import Refused
from mquant.family_files import load_families
from mquant.findings import Finding
from plan.planning import ATTENTION, MOE, Make, first_refusal, planned, refusal, swapped

# --- tensors that are unknown or missing


def test_a_family_mquant_does_not_know_is_refused(make: Make) -> None:
    src = make(config={"model_type": "unheard_of"})

    with pytest.raises(Refused) as caught:
        planned(src)
    assert caught.value.message == (
        'Refused: config.json says model_type "unheard_of", a family mquant does not know.'
    )
    assert caught.value.fix == (
        f"Known are {', '.join(load_families())}; a family is one YAML file, given with "
        "--family FILE: see docs/adding-a-family.md."
    )


def test_unknown_tensors_are_named_and_counted(make: Make) -> None:
    strangers = [f"model.layers.0.mlp.{name}.weight" for name in "abcd"]

    assert refusal(make(edit=adding(*strangers))) == Finding(
        "tensor-unknown",
        "error",
        strangers[0],
        f"MiniMax-M2 has no such tensor as {strangers[0]}, {strangers[1]}, {strangers[2]} and "
        "1 more (4 tensors).",
        "If the tensor belongs to the model, add its name to configs/minimax_m2.yaml (role `other` "
        "copies it); if not, remove the tensor from the checkpoint.",
    )


@pytest.mark.parametrize(
    ("missing", "present"),
    [
        (f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.q_proj.weight"),
        (f"{ATTENTION}.q_proj.weight", f"{ATTENTION}.k_proj.weight"),
        (f"{MOE}.experts.2.w3.weight", f"{MOE}.experts.2.w1.weight"),
        (f"{MOE}.experts.2.w1.weight", f"{MOE}.experts.2.w3.weight"),
    ],
)
def test_a_fused_set_with_a_missing_member_is_refused(
    make: Make, missing: str, present: str
) -> None:
    assert refusal(make(edit=without(missing))) == Finding(
        "fused-set-incomplete",
        "error",
        missing,
        f"The shards hold {present} without {missing}; loaders make one matrix of these tensors, "
        "with one scale.",
        "Download the missing shards.",
    )


def test_a_missing_tensor_is_named(make: Make) -> None:
    assert refusal(make(edit=without("model.norm"))) == Finding(
        "tensor-missing",
        "error",
        "model.norm.weight",
        "The checkpoint lacks model.norm.weight (1 tensor).",
        "Download the missing shards.",
    )


@pytest.mark.parametrize(
    "missing",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        f"{MOE}.gate.weight",
        f"{MOE}.e_score_correction_bias",
        f"{MOE}.experts.2.w2.weight",
        f"{ATTENTION}.o_proj.weight",
        f"{ATTENTION}.q_norm.weight",
    ],
)
def test_every_missing_tensor_is_refused(make: Make, missing: str) -> None:
    finding = refusal(make(edit=without(missing)))

    assert (finding.rule, finding.where) == ("tensor-missing", missing)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_missing_layer_is_refused(make: Make, layer: int) -> None:
    name = f"model.layers.{layer}"

    finding = refusal(make(edit=without(f"{name}.")))

    assert finding.rule == "tensor-missing"
    assert finding.message == (
        f"The checkpoint lacks {name}.input_layernorm.weight, "
        f"{name}.post_attention_layernorm.weight, {name}.self_attn.q_proj.weight and 10 more "
        "(13 tensors)."
    )


def test_a_layer_without_experts_is_refused(make: Make) -> None:
    finding = refusal(make(edit=without(f"{MOE}.experts.")))

    assert (finding.rule, finding.where) == ("tensor-missing", f"{MOE}.experts.0.w1.weight")


# --- counts


def test_fewer_experts_than_config_says_are_refused(make: Make) -> None:
    assert refusal(make(edit=without(f"{MOE}.experts.3."))) == Finding(
        "experts-disagree",
        "error",
        "layer 1",
        "Layer 1 has 3 experts, but config.json says num_local_experts 4.",
        "Set num_local_experts to what the shards hold, or get the right shards.",
    )


def test_a_config_of_the_unpruned_model_is_refused_by_experts_router_and_bias(make: Make) -> None:
    experts, bias, router = planned(make(config={"num_local_experts": 6})).refusals

    assert experts.message == (
        "Layer 0 has 4 experts, but config.json says num_local_experts 6 "
        "(and 1 more layer like it)."
    )
    assert bias.message == (
        "model.layers.0.block_sparse_moe.e_score_correction_bias is [4], but config.json implies "
        "[6] (num_local_experts), and 1 more like it."
    )
    assert router.message == (
        "model.layers.0.block_sparse_moe.gate.weight is [4, 64], but config.json implies [6, 64] "
        "(num_local_experts, hidden_size), and 1 more like it."
    )


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("gate.weight", (5, 64), "is [5, 64], but config.json implies [4, 64] "
         "(num_local_experts, hidden_size)."),
        ("e_score_correction_bias", (5,), "is [5], but config.json implies [4] "
         "(num_local_experts)."),
    ],
)  # fmt: skip
def test_a_router_or_bias_for_another_number_of_experts_is_refused(
    make: Make, name: str, shape: tuple[int, ...], sentence: str
) -> None:
    assert refusal(make(edit=swapped(f"{MOE}.{name}", "F32", shape))) == Finding(
        "shape-disagrees",
        "error",
        f"{MOE}.{name}",
        f"{MOE}.{name} {sentence}",
        "Take config.json and shards from the same checkpoint.",
    )


GAP_FIX = "Number the experts without gaps, as pruning tools do, or get the missing shards."


def test_a_gap_in_expert_numbers_is_refused(make: Make) -> None:
    edit = without(f"{MOE}.experts.1.")

    assert refusal(make(edit=edit, config={"num_local_experts": 4})) == Finding(
        "expert-gap", "error", "layer 1", "Layer 1 has no expert 1 of 0 to 3.", GAP_FIX
    )


def test_gaps_in_many_layers_are_counted(make: Make) -> None:
    finding = first_refusal(make(layers=3, edit=without(".experts.0.", ".experts.2.")))

    assert finding.message == (
        "Layer 0 has no expert 0 and 1 more of 0 to 3 (and 2 more layers like it)."
    )


def test_a_huge_expert_number_takes_no_memory(make: Make) -> None:
    src = make(edit=lambda rows: renamed(rows, f"{MOE}.experts.3.", f"{MOE}.experts.999999999."))

    assert refusal(src).message == "Layer 1 has no expert 3 and 999,999,995 more of 0 to 999999999."


def test_a_layer_that_config_does_not_count_is_refused(make: Make) -> None:
    assert refusal(make(config={"num_hidden_layers": 1})) == Finding(
        "layers-disagree",
        "error",
        "layer 1",
        "The shards hold layer 1 (the first is 0), but config.json says num_hidden_layers 1.",
        "Set num_hidden_layers to what the shards hold, or get the right shards.",
    )


def test_a_single_tensor_beyond_the_last_layer_is_refused(make: Make) -> None:
    extra = adding("model.layers.999999999.input_layernorm.weight", shape=(64,))

    assert refusal(make(edit=extra)).where == "layer 999999999"


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("num_hidden_layers", 10**9, "says num_hidden_layers 1000000000, which cannot be"),
        ("num_hidden_layers", 10**300, f"says num_hidden_layers 1{'0' * 39}, which cannot be"),
        ("num_hidden_layers", -1, "says num_hidden_layers -1, which cannot be"),
        ("num_hidden_layers", 2.0, "says num_hidden_layers 2.0, which cannot be"),
        ("num_hidden_layers", ..., "has no num_hidden_layers"),
        ("num_local_experts", True, "says num_local_experts true, which cannot be"),
        ("num_local_experts", None, "says num_local_experts null, which cannot be"),
        ("num_local_experts", "\x1b[2J", r'says num_local_experts "\u001b[2J", which cannot be'),
        ("hidden_size", [64], "says hidden_size [64], which cannot be"),
        ("head_dim", ..., "has no head_dim"),
        ("vocab_size", 2**60, "says vocab_size 1152921504606846976, which cannot be"),
    ],
)
def test_an_impossible_config_key_is_refused_at_once(
    make: Make, key: str, value: object, sentence: str
) -> None:
    assert refusal(make(config={key: value})) == Finding(
        "config-key-unusable",
        "error",
        "config.json",
        f"config.json {sentence}.",
        "Take config.json from the model's repo.",
    )


def test_every_tensor_of_missing_layers_is_counted(make: Make) -> None:
    finding = refusal(make(config={"num_hidden_layers": 47}))

    assert finding.rule == "tensor-missing"
    assert finding.message.endswith(" and 582 more (585 tensors).")


# --- a source that is already quantized

DEQUANTIZE = "Start from the BF16 checkpoint that the source was made from."


def test_fp8_that_is_not_in_blocks_is_refused_by_its_config(make: Make) -> None:
    scale = f"{ATTENTION}.q_proj.weight_scale"
    src = make(
        edit=adding(scale, dtype="F32", shape=(1,)),
        config={"quantization_config": {"quant_method": "fbgemm_fp8"}},
    )

    assert refusal(src) == Finding(
        "source-quantized",
        "error",
        scale,
        'src is already quantized (config.json says "fbgemm_fp8").',
        DEQUANTIZE,
    )


@pytest.mark.parametrize("config", [{"bits": 4}, "fp8", [1], {"quant_method": None}])
def test_any_quantization_config_is_refused(make: Make, config: object) -> None:
    assert refusal(make(config={"quantization_config": config})) == Finding(
        "source-quantized",
        "error",
        "config.json",
        "src is already quantized (config.json has a quantization_config).",
        DEQUANTIZE,
    )


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "qweight", "g_idx"])
def test_tensors_of_a_quantized_checkpoint_are_refused_without_a_config(
    make: Make, suffix: str
) -> None:
    name = f"{MOE}.experts.0.w1.{suffix}"

    finding = refusal(make(edit=adding(name)))

    assert (finding.where, finding.message) == (
        name,
        f"src is already quantized (it holds {name}).",
    )


@pytest.mark.parametrize("config", [None, {}, ...])
def test_an_empty_quantization_config_is_ignored(make: Make, config: object) -> None:
    assert planned(make(config={"quantization_config": config})).findings == ()


# --- index against headers


def test_a_tensor_only_the_index_knows_is_refused(make: Make) -> None:
    src = make()
    write_index(src, {**weight_map(src), "ghost": "model-00001-of-00002.safetensors"})

    assert refusal(src) == Finding(
        "index-without-tensor",
        "error",
        "ghost",
        f"{INDEX_NAME} lists 1 tensor (ghost), which no shard holds.",
        f"Get the shards and {INDEX_NAME} again, from one revision.",
    )


def test_a_tensor_only_a_header_knows_is_refused(make: Make) -> None:
    src = make()
    index = weight_map(src)
    del index["lm_head.weight"]
    write_index(src, index)

    assert refusal(src) == Finding(
        "tensor-not-in-index",
        "error",
        "lm_head.weight",
        f"The shards hold 1 tensor (lm_head.weight) that {INDEX_NAME} lacks.",
        f"Get the shards and {INDEX_NAME} again, from one revision.",
    )


def test_a_missing_shard_is_the_first_refusal(make: Make) -> None:
    src = make()
    (src / "model-00002-of-00002.safetensors").unlink()

    finding = first_refusal(src)

    assert finding.rule == "shard-missing"
    assert finding.fix == "Download the missing shards."


def test_a_refusal_in_one_sentence_names_the_first_and_counts_the_others(make: Make) -> None:
    src = make(config={"num_local_experts": 6})

    refused = Refused(planned(src).refusals)

    assert refused.message == (
        "Refused: Layer 0 has 4 experts, but config.json says num_local_experts 6 "
        "(and 1 more layer like it). There are 3 findings."
    )
    assert refused.fix == "Set num_local_experts to what the shards hold, or get the right shards."
    assert refused.exit_code == 1
