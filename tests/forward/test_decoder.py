"""The decoder computes what transformers computes, for every family with `forward`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from judges import opened, read_json
from make import write_json
from mquant.checkpoint import Folder, reader_of
from mquant.family_files import load_families
from mquant.forward.decoder import Model
from mquant.loader_model.modules import read_modules
from mquant.synth import Precision, Sizes, synth
from mquant.weights.matrix import Workers

WINDOWS = [slice(0, 64), slice(64, 100)]
IDS = np.random.default_rng(0).integers(0, 256, 100)
GAIN = 4
"""What random weights are multiplied by: otherwise attention and routing would be nearly even."""
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
SLIDING = {"sliding_window": 20, "max_position_embeddings": 2048}

CASES: dict[str, dict[str, Any]] = {
    **{name: {} for name, family in load_families().items() if family.forward},
    "minimax_m2": {"rotary_dim": 32},  # transformers 5.17 rotates the whole head in any case
    # transformers cannot tell columns from rows in a square tensor.
    "qwen3_vl_moe": {"moe_intermediate_size": 48},
    # transformers rotates as many numbers as these keys say, which must be qk_rope_head_dim.
    "mistral4": {"qk_nope_head_dim": 16, "head_dim": 32, "qk_head_dim": 32},
    "llama stretched": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama yarn": {"rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 1}},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama tied": {"tie_word_embeddings": True},
    "mistral sliding": SLIDING,
    "mixtral sliding": SLIDING,
    "qwen2 sliding": {**SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3 by type": {
        **SLIDING,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3_moe sliding": {**SLIDING, "use_sliding_window": True},
    "qwen3_moe not normalised": {"norm_topk_prob": False},
    "qwen3_moe dense layers": {"mlp_only_layers": [0]},
    "olmoe normalised": {"norm_topk_prob": True},
    "phi3 partial": {"partial_rotary_factor": 0.5},
    "phi3 long": {
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [2.0 + 0.1 * i for i in range(16)],
            "short_factor": [1.0 + 0.1 * i for i in range(16)],
        },
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 2048,
    },
    "deepseek_v2 groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v2 q_lora": {"q_lora_rank": 24, "routed_scaling_factor": 3.0},
    "deepseek_v3 groups": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7},
    "deepseek_v3 one group": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "deepseek_v3 q_full": {"q_lora_rank": None, "rope_interleave": False},
    "deepseek_v3 sizes": {"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 40},
    "deepseek_v3 yarn": {
        "rope_scaling": {**YARN, "mscale": 0.5, "mscale_all_dim": 0.8, "beta_fast": 8}
    },
    "deepseek_v3 without yarn": {"rope_scaling": None},
    "deepseek_v3 dense": {"first_k_dense_replace": 2, "num_hidden_layers": 3},
    "glm4_moe plain": {"use_qk_norm": False, "attention_bias": False, "norm_topk_prob": False},
    "glm4_moe groups": {"n_group": 2, "topk_group": 1, "partial_rotary_factor": 0.25},
    "glm4_moe_lite groups": {"n_group": 2, "topk_group": 1},
}


def _checkpoint(name: str, folder: Path, **changes: Any) -> Path:
    family = load_families()[name]
    tiny = family.synth.model_copy(update={"tiny": {**family.synth.tiny, **changes}})
    family = family.model_copy(update={"synth": tiny})
    synth(folder, family, sizes=Sizes(), precision=Precision("fp32"), max_shard_bytes=10**9)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    for key, values in tensors.items():
        if "norm" not in key and "embed" not in key:
            tensors[key] = values * GAIN
    save_file(tensors, path, {"format": "pt"})
    return folder


def _states(folder: Path, workers: Workers) -> tuple[Any, list[Any]]:
    source = Folder(folder)
    view = read_modules(opened(folder), load_families())
    model = Model(view, reader_of(source), 64, workers)
    hidden = model.embed(IDS)
    chosen = [model.layer(number, hidden, WINDOWS) for number in range(model.shape.layers)]
    states = model.last_norm(hidden)
    head = model.weight(model.head(), "head")
    return states @ head.T, [ids for ids in chosen if ids is not None]


def _transformers(name: str, folder: Path) -> tuple[Any, list[Any]]:
    """Return transformers' logits, and the experts that its routers choose, sorted."""
    import torch
    import transformers

    if name.startswith("kimi"):
        _as_deepseek_v3(folder)
    kind = getattr(transformers, read_json(folder / "config.json")["architectures"][0])
    whole, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info
    whole.eval()
    chosen: list[Any] = []
    for module in whole.modules():
        if type(module).__name__.endswith(("Router", "Gate")):
            module.register_forward_hook(lambda _module, _in, out: chosen.append(out[2]))
    with torch.inference_mode():
        inputs = [torch.tensor(IDS[window])[None] for window in WINDOWS]
        logits = [whole(input_ids=ids).logits[0].numpy() for ids in inputs]
    count = len(chosen) // len(WINDOWS)
    routed = [torch.cat((chosen[i], chosen[i + count])).numpy() for i in range(count)]
    return np.concatenate(logits), [np.sort(ids, axis=1) for ids in routed]


def _as_deepseek_v3(folder: Path) -> None:
    """Make the text model of Kimi-K2 and K2.5 what transformers knows by another name."""
    config = read_json(folder / "config.json")
    config = {**config.get("text_config", config), "model_type": "deepseek_v3"}
    write_json(folder / "config.json", config)
    (path,) = folder.glob("*.safetensors")
    tensors = {key.removeprefix("language_model."): v for key, v in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    for index in folder.glob("*.index.json"):
        index.unlink()
    path.rename(folder / "model.safetensors")


@pytest.mark.upstream
@pytest.mark.parametrize("case", CASES)
def test_every_family_computes_the_logits_of_transformers(case: str, tmp_path: Path) -> None:
    name = case.split()[0]
    folder = _checkpoint(name, tmp_path / "src", **CASES[case])
    with Workers(2) as workers:
        logits, chosen = _states(folder, workers)
    expected, routed = _transformers(name, folder)
    assert len(chosen) == len(routed)
    for ours, theirs in zip(chosen, routed, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
