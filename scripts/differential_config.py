"""Mutations of config.json and of its quantization_config."""

from copy import deepcopy
from random import Random
from typing import Any, Final

from differential_draft import Draft, Unfit, by_method, mutation, pick
from mquant.family_rows import Role

CT, MODELOPT, FP8 = "compressed-tensors", "modelopt", "fp8"
_quantized = by_method(CT, MODELOPT, FP8)
_of_ct, _of_modelopt, _of_fp8 = by_method(CT), by_method(MODELOPT), by_method(FP8)
_LISTS: Final = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
_COUNTS: Final = ("layers", "experts", "heads", "kv_heads", "top_k", "hidden", "intermediate")
# Keys that loaders read, with values that change what a loader builds or refuses.
_SWITCHES: Final[dict[str, tuple[Any, ...]]] = {
    "attention_bias": (True, False),
    "qkv_bias": (True, False),
    "mlp_bias": (True, False),
    "bias": (True, False),
    "use_routing_bias": (True, False),
    "use_qk_norm": (True, False),
    "tie_word_embeddings": (True, False),
    "decoder_sparse_step": (1, 2, 3),
    "mlp_only_layers": ([], [0], [0, 1], [7]),
    "first_k_dense_replace": (0, 1, 2),
    "moe_layer_freq": (1, 2),
    "n_shared_experts": (0, 1, 2, None),
    "q_lora_rank": (None, 64, 128),
    "norm_topk_prob": (True, False),
    "scoring_func": ("softmax", "sigmoid", "tanh"),
    "topk_method": ("noaux_tc", "greedy", "group_limited_greedy"),
    "n_group": (1, 2, 3),
    "num_nextn_predict_layers": (0, 1, 2),
    "num_mtp_modules": (0, 1, 3),
    "rotary_dim": (16, 32, 64),
    "head_dim": (32, 64, 128),
    "hidden_act": ("silu", "gelu", "swiglu"),
    "shared_intermediate_size": (0, 128),
    "sliding_window": (None, 1024),
}


# ------------------------------------------------------------------------ keys of config.json


@mutation("config.json lacks a key", weight=3)
def _drop_key(draft: Draft, random: Random) -> str:
    keys = [(draft.config, key) for key in draft.config if key != "quantization_config"]
    if draft.text is not draft.config:  # the tables of the text model and of the tower too
        tables = [
            part
            for name, part in draft.config.items()
            if isinstance(part, dict) and name != "quantization_config"
        ]
        keys += [(table, key) for table in tables for key in table]
    table, key = pick(random, keys)
    del table[key]
    return str(key)


@mutation("config.json has another count", weight=3)
def _count(draft: Draft, random: Random) -> str:
    config = draft.family.config
    keys = [getattr(config, name) for name in _COUNTS] + [config.vocabulary]
    keys += ["moe_intermediate_size", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim"]
    key = pick(random, (key for key in keys if key and isinstance(draft.text.get(key), int)))
    old = draft.text[key]
    new = pick(random, {old + 1, max(old - 1, 0), old * 2, old // 2} - {old})
    draft.text[key] = new
    return f"{key}: {old} -> {new}"


@mutation("a switch of config.json is flipped", weight=4)
def _switch(draft: Draft, random: Random) -> str:
    known = [key for key in _SWITCHES if key in draft.text]
    key = pick(random, known if random.random() < 0.7 else _SWITCHES)
    old = draft.text.get(key)
    new = pick(random, (value for value in _SWITCHES[key] if value != old))
    draft.text[key] = new
    return f"{key}: {old} -> {new}"


_ALIASES: Final = (
    ("num_experts", "num_local_experts"),
    ("num_local_experts", "num_experts"),
    ("n_routed_experts", "num_local_experts"),
    ("n_routed_experts", "num_experts"),
    ("num_experts_per_tok", "top_k"),
    ("moe_intermediate_size", "expert_intermediate_size"),
    ("num_hidden_layers", "n_layers"),
    ("hidden_size", "n_embd"),
)


@mutation("a key of config.json goes by an alias")
def _alias(draft: Draft, random: Random) -> str:
    old, new = pick(random, (pair for pair in _ALIASES if pair[0] in draft.text))
    draft.text[new] = draft.text.pop(old)
    return f"{old} -> {new}"


@mutation("config.json has an alias beside a key")
def _both_aliases(draft: Draft, random: Random) -> str:
    old, new = pick(random, (pair for pair in _ALIASES if draft.text.get(pair[0])))
    value = draft.text[old]
    draft.text[new] = pick(random, (value, value * 2, 256))
    return f"{new}: {draft.text[new]} beside {old}: {value}"


@mutation("config.json as transformers 5 saves it", good=True, weight=2)
def _transformers_5(draft: Draft, random: Random) -> None:
    config = draft.text
    if "rope_theta" not in config:
        raise Unfit
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    config["rope_parameters"] = {**scaling, "rope_theta": config.pop("rope_theta")}
    if "torch_dtype" in config:
        config["dtype"] = config.pop("torch_dtype")
    config["transformers_version"] = "5.17.0"


@mutation("torch_dtype is called dtype", good=True)
def _dtype(draft: Draft, _: Random) -> None:
    if "torch_dtype" not in draft.config:
        raise Unfit
    draft.config["dtype"] = draft.config.pop("torch_dtype")


@mutation("config.json has another dtype")
def _other_dtype(draft: Draft, random: Random) -> str:
    key = "dtype" if "dtype" in draft.config else "torch_dtype"
    draft.config[key] = pick(random, ("float16", "float32", "float8_e4m3fn", "auto", None, "int8"))
    return f"{key}: {draft.config[key]}"


@mutation("other architectures")
def _architectures(draft: Draft, random: Random) -> str:
    own = draft.family.synth.config["architectures"][0]
    bare = own.replace("ForCausalLM", "Model")
    others = [
        [bare],
        [],
        [own, bare],
        [own.replace("Causal", "SequenceClassification").replace("LM", "")],
        ["LlamaForCausalLM"],
        ["MixtralForCausalLM"],
        ["NoSuchForCausalLM"],
    ]
    draft.config["architectures"] = pick(random, (a for a in others if a != [own]))
    return str(draft.config["architectures"])


@mutation("another model_type")
def _model_type(draft: Draft, random: Random) -> str:
    types = ("llama", "qwen3", "qwen3_moe", "mixtral", "minimax", "deepseek_v2", "no_such_model")
    draft.config["model_type"] = pick(random, types)
    return str(draft.config["model_type"])


@mutation("config.json has a key that nobody reads", good=True)
def _unread(draft: Draft, random: Random) -> str:
    key = pick(random, ("x_note", "unsloth_fixed", "pad_token_id", "_name_or_path", "use_mtp"))
    draft.config[key] = {"pad_token_id": 0, "use_mtp": False}.get(key, "note")
    return key


@mutation("a number that shapes do not follow", good=True)
def _number(draft: Draft, random: Random) -> str:
    changes = {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "routed_scaling_factor": 1.0,
        "router_aux_loss_coef": 0.0,
        "initializer_range": 0.01,
    }
    key = pick(random, (key for key in changes if key in draft.text))
    draft.text[key] = changes[key]
    return key


@mutation("the model's keys lie in text_config")
def _nested(draft: Draft, random: Random) -> str:
    which = pick(random, ("all keys", "quantization_config"))
    config = draft.config
    if which == "quantization_config":
        config["text_config"] = {"quantization_config": deepcopy(draft.quant)}
        del config["quantization_config"]
        return which
    outer = {"architectures", "model_type", "quantization_config"}
    config["text_config"] = {key: config.pop(key) for key in list(config) if key not in outer}
    return which


# ------------------------------------------------------------- where the quantization_config is


@mutation("quantization_config is called compression_config", good=True, fits=_quantized)
def _compression_config(draft: Draft, _: Random) -> None:
    draft.config["compression_config"] = deepcopy(draft.quant)
    del draft.config["quantization_config"]


@mutation("quantization_config is missing", fits=_quantized)
def _no_config(draft: Draft, _: Random) -> None:
    del draft.config["quantization_config"]


@mutation("only hf_quant_config.json says the quantization", fits=_of_modelopt)
def _own_file(draft: Draft, random: Random) -> str:
    table = draft.config.pop("quantization_config")
    keep = ("quant_algo", "kv_cache_quant_algo", "group_size", "quantized_layers")
    inner = {key: table[key] for key in keep if key in table}
    inner["exclude_modules"] = table.get("ignore", [])
    inner.setdefault("kv_cache_quant_algo", None)
    producer = {"name": "modelopt", "version": "0.41.0"}
    draft.files["hf_quant_config.json"] = {"producer": producer, "quantization": inner}
    return str(table.get("quant_algo"))


@mutation("ModelOpt's quantization_config is nested", good=True, fits=_of_modelopt)
def _nested_modelopt(draft: Draft, _: Random) -> None:
    table = draft.config.pop("quantization_config")
    keep = ("quant_algo", "kv_cache_quant_algo", "group_size", "quantized_layers")
    inner = {key: table[key] for key in keep if key in table}
    inner["exclude_modules"] = table.get("ignore", [])
    draft.config["quantization_config"] = {
        "producer": table.get("producer", {"name": "modelopt"}),
        "quant_method": "modelopt",
        "quantization": inner,
    }


@mutation("another method", fits=_quantized, weight=2)
def _method(draft: Draft, random: Random) -> str:
    names = (
        *("fp8", "compressed-tensors", "compressed_tensors", "modelopt", "modelopt_fp4"),
        *("gptq", "awq", "nvfp4", "FP8", "bitsandbytes", "modelopt_mixed", None, "mxfp4"),
    )
    table = draft.quant
    table["quant_method"] = pick(random, (n for n in names if n != table.get("quant_method")))
    return str(table["quant_method"])


@mutation("the original's FP8 config is kept", fits=_quantized)
def _original_config(draft: Draft, _: Random) -> None:
    if draft.method == FP8:
        raise Unfit
    draft.config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }


@mutation("a plain checkpoint declares a quantization", fits=by_method(""))
def _declared(draft: Draft, random: Random) -> str:
    made: tuple[dict[str, Any], ...] = (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []},
        {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": ["lm_head"]},
        {},
    )
    draft.config["quantization_config"] = deepcopy(pick(random, made))
    return str(draft.config["quantization_config"])


# --------------------------------------------------------------- keys of quantization_config


@mutation("quantization_config lacks a key", fits=_quantized, weight=2)
def _drop_quant_key(draft: Draft, random: Random) -> str:
    key = pick(random, draft.quant)
    del draft.quant[key]
    return key


@mutation("quantization_config has an unknown key", fits=_quantized)
def _unknown_key(draft: Draft, random: Random) -> str:
    where = pick(random, ("top", "group", "weights") if draft.method == CT else ("top",))
    groups = draft.groups if where != "top" else {}
    table: object = draft.quant if where == "top" else pick(random, groups.values())
    if where == "weights" and isinstance(table, dict):
        table = table.get("weights")
    if not isinstance(table, dict):
        raise Unfit
    key = pick(random, ("a_newer_key", "bits", "desc_act", "packed_modules"))
    table[key] = pick(random, (None, 4, {}))
    return f"{where}: {key}"


@mutation("sparsity_config", fits=_of_ct)
def _sparsity(draft: Draft, random: Random) -> str:
    made: tuple[dict[str, Any], ...] = (
        {},
        {"format": "dense", "targets": [], "ignore": []},
        {
            "format": "dense",
            "global_sparsity": 0.1,
            "ignore": ["lm_head"],
            "registry_requires_subclass": False,
            "sparsity_structure": "unstructured",
            "targets": ["Linear"],
        },
        {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]},
    )
    draft.quant["sparsity_config"] = deepcopy(pick(random, made))
    return str(draft.quant["sparsity_config"])[:60]


@mutation("another format", fits=_of_ct, weight=2)
def _format(draft: Draft, random: Random) -> str:
    names = (
        *("nvfp4-pack-quantized", "pack-quantized", "float-quantized", "int-quantized"),
        *("naive-quantized", "mixed-precision", "dense", "no-such-format", None),
    )
    tables = [draft.quant, *draft.groups.values()]
    table = pick(random, tables)
    table["format"] = pick(random, (name for name in names if name != table.get("format")))
    where = "config" if table is draft.quant else "a group"
    return f"{where}: {table['format']}"


@mutation("another quant_algo", fits=_of_modelopt, weight=2)
def _algorithm(draft: Draft, random: Random) -> str:
    names = (
        *("FP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION", "NVFP4_AWQ", "W4A8_AWQ"),
        *("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "fp8", "", None),
    )
    table = draft.quant
    table["quant_algo"] = pick(random, (n for n in names if n != table.get("quant_algo")))
    return str(table["quant_algo"])


@mutation("MIXED_PRECISION's layers change", fits=_of_modelopt, weight=2)
def _quantized_layers(draft: Draft, random: Random) -> str:
    layers = draft.quant.get("quantized_layers")
    if not isinstance(layers, dict) or not layers:
        raise Unfit
    change = pick(random, ("lacks one", "lacks all of a kind", "hub's names", "another algorithm"))
    name = pick(random, layers)
    if change == "lacks one":
        del layers[name]
    elif change == "lacks all of a kind":
        end = name.rpartition(".")[2]
        for other in [other for other in layers if other.endswith(f".{end}")]:
            del layers[other]
    elif change == "hub's names":
        fresh = {n.replace("mlp.experts", "block_sparse_moe.experts"): v for n, v in layers.items()}
        draft.quant["quantized_layers"] = fresh
    else:
        old = layers[name]["quant_algo"]
        layers[name] = {"quant_algo": "FP8" if old == "NVFP4" else "NVFP4"}
    return f"{change}: {name}"


@mutation("another weight_block_size", fits=_of_fp8, weight=2)
def _block_size(draft: Draft, random: Random) -> str:
    sizes = ([128, 128], [64, 64], [1, 128], [128], [256, 256], [128, 64], None, [0, 0], 128)
    table = draft.quant
    new = pick(random, (size for size in sizes if size != table.get("weight_block_size")))
    table["weight_block_size"] = deepcopy(new)
    return str(new)


@mutation("another activation_scheme", fits=_of_fp8)
def _activation_scheme(draft: Draft, random: Random) -> str:
    table = draft.quant
    names = ("dynamic", "static", "none", None)
    table["activation_scheme"] = pick(
        random, (name for name in names if name != table.get("activation_scheme"))
    )
    return str(table["activation_scheme"])


@mutation("keys without meaning for loading are dropped", good=True, fits=_quantized)
def _drop_harmless(draft: Draft, random: Random) -> str:
    keys = ("global_compression_ratio", "quantization_status", "version", "fmt", "transform_config")
    key = pick(random, (key for key in keys if key in draft.quant))
    del draft.quant[key]
    return key


def router_modules(draft: Draft) -> list[str]:
    """Return the routers. Raises Unfit if the family has none."""
    routers = draft.modules(Role.ROUTER)
    if not routers:
        raise Unfit
    return routers


__all__ = ["router_modules"]
