"""vLLM's larger, multimodal model around a text model: names, config.json, towers."""

from typing import Any

import pytest

from mquant.family_files import load_families
from mquant.loader_model.vllm.load import Outcome
from mquant.loader_model.vllm.predict import predict_of
from mquant.loader_model.vllm.tensors import Loaded
from mquant.schemes import NVFP4A16
from mquant.synth import Precision, Sizes, make_config, make_tensors

FAMILY = load_families()["qwen3_5_moe"]
OUTER = "model.language_model."
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
}
BLOCK = "model.visual.blocks.0"
TOWER = {
    "model.visual.patch_embed.proj.weight": (32, 3, 2, 4, 4),
    "model.visual.patch_embed.proj.bias": (32,),
    "model.visual.pos_embed.weight": (16, 32),
    "model.visual.merger.norm.weight": (32,),
    "model.visual.merger.norm.bias": (32,),
    "model.visual.merger.linear_fc1.weight": (128, 128),
    "model.visual.merger.linear_fc1.bias": (128,),
    "model.visual.merger.linear_fc2.weight": (128, 128),
    "model.visual.merger.linear_fc2.bias": (128,),
    f"{BLOCK}.norm1.weight": (32,),
    f"{BLOCK}.norm1.bias": (32,),
    f"{BLOCK}.norm2.weight": (32,),
    f"{BLOCK}.norm2.bias": (32,),
    f"{BLOCK}.attn.qkv.weight": (96, 32),
    f"{BLOCK}.attn.qkv.bias": (96,),
    f"{BLOCK}.attn.proj.weight": (32, 32),
    f"{BLOCK}.attn.proj.bias": (32,),
    f"{BLOCK}.mlp.linear_fc1.weight": (48, 32),
    f"{BLOCK}.mlp.linear_fc1.bias": (48,),
    f"{BLOCK}.mlp.linear_fc2.weight": (32, 48),
    f"{BLOCK}.mlp.linear_fc2.bias": (32,),
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def text_config(**changes: Any) -> dict[str, Any]:
    return {**FAMILY.synth.config, **FAMILY.synth.tiny, **changes}


def larger_config(**changes: Any) -> dict[str, Any]:
    inner = text_config()
    del inner["architectures"]
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": inner,
        "vision_config": VISION,
        **changes,
    }


def text_tensors(prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    """Return the shapes of a text model's tensors, with a prefix for `model.`."""
    config, shapes = text_config(), {}
    for row in (row for row in FAMILY.tensors if not row.prefix):
        for layer in range(config["num_hidden_layers"] if "{layer}" in row.name else 1):
            if not FAMILY.has_block(row.block, layer, config):
                continue
            for expert in range(config["num_experts"] if "{expert}" in row.name else 1):
                shape = FAMILY.shape(row, config, layer)
                assert shape
                name = row.format(layer, expert)
                shapes[name.replace("model.", prefix, 1) if name[0] == "m" else name] = shape
    return shapes


def outcome(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Outcome:
    return predict_of(
        config, FAMILY, (Loaded(name, "BF16", shape) for name, shape in shapes.items())
    )


def refusal(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> str:
    refused = outcome(config, shapes).refused
    assert refused
    return " ".join(refused)


def test_one_file_serves_the_text_model_and_the_larger_one() -> None:
    assert outcome(text_config(), text_tensors()).loads
    assert outcome(larger_config(), {**text_tensors(OUTER), **TOWER}).loads


def test_a_text_model_may_have_the_names_of_the_larger_one() -> None:
    assert outcome(text_config(), text_tensors(OUTER)).loads


def test_the_larger_model_needs_its_tower() -> None:
    missing = outcome(larger_config(), text_tensors(OUTER)).unset
    assert ("visual.blocks.0.attn.qkv.weight", 96 * 32) in missing


def test_multi_token_prediction_is_passed_over() -> None:
    shapes = {"mtp.fc.weight": (128, 256), "mtp.layers.0.mlp.gate.weight": (8, 128)}
    assert outcome(text_config(), {**text_tensors(), **shapes}).loads
    assert outcome(larger_config(), {**text_tensors(OUTER), **TOWER, **shapes}).loads


def test_the_larger_model_takes_the_text_models_keys_from_the_table() -> None:
    config = larger_config(hidden_size=64, num_hidden_layers="many")
    assert outcome(config, {**text_tensors(OUTER), **TOWER}).loads
    config["text_config"] = text_config(num_hidden_layers="4")
    assert "says num_hidden_layers '4'" in refusal(config, {})


def test_the_larger_model_is_not_built_of_a_text_models_config() -> None:
    config = text_config(architectures=["Qwen3_5MoeForConditionalGeneration"])
    assert "a text model's model_type" in refusal(config, {})


@pytest.mark.parametrize("place", ["outside", "text_config"])
def test_the_quantization_config_may_be_in_the_table(place: str) -> None:
    config = larger_config()
    (config if place == "outside" else config["text_config"])["quantization_config"] = FP8
    assert outcome(config, {**text_tensors(OUTER), **TOWER}).unset


def test_names_in_the_quantization_config_are_renamed_as_tensors_are() -> None:
    def ignoring(*ignored: str) -> dict[str, Any]:
        return larger_config(quantization_config={**FP8, "ignored_layers": list(ignored)})

    names = {name.rpartition(".")[0] for name in (*text_tensors(OUTER), *TOWER)}
    experts = {f"{OUTER}layers.{layer}.mlp.experts" for layer in range(4)}
    tensors = {**text_tensors(OUTER), **TOWER}
    assert outcome(ignoring(*names, *experts), tensors).loads
    assert not outcome(ignoring(*(names - {f"{BLOCK}.attn.proj"}), *experts), tensors).loads


def test_vllm_gives_a_tower_every_config_but_that_of_a_method_that_spares_it() -> None:
    family = load_families()["kimi_k25"]
    config = make_config(family, Sizes(), Precision.BF16, tiny=True)

    def unset(**quantization: Any) -> bool:
        """Whether vLLM creates other parameters than a weight for the tower or the projector."""
        found = predict_of({**config, "quantization_config": quantization}, family, ()).unset
        names = [name for name, _ in found if not name.startswith("language_model.")]
        return any(not name.endswith((".weight", ".bias")) for name in names)

    groups = {"group_0": {**NVFP4A16.config_group, "targets": ["Linear"]}}
    packed = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}
    ignored = ["vision_tower*", "mm_projector*"]
    exported = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignored}
    assert unset(**{**exported, "ignore": ignored[:1]})
    assert not unset(**exported)
    assert not unset(**packed)


def test_synth_writes_every_tensor_of_a_tower() -> None:
    for name in ("gemma3", "kimi_k25", "qwen3_vl", "qwen3_vl_moe"):
        family = load_families()[name]
        config = make_config(family, Sizes(layers=3), Precision.BF16, tiny=True)
        tensors = make_tensors(family, config, Precision.BF16)
        loaded = [Loaded(each.name, each.dtype, each.shape) for each in tensors]
        assert predict_of(config, family, loaded).loads


def test_a_text_models_class_does_not_find_keys_in_a_table() -> None:
    assert "text_config" in refusal(larger_config(architectures=["MixtralForCausalLM"]), {})
