"""Mutations of ModelOpt's lists, of its file of its own, and of its KV cache."""

from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any, Final

from differential_draft import Draft, Unfit, by_method, mutation, pick
from mquant.family_rows import Role

FILE: Final = "hf_quant_config.json"
_of_modelopt = by_method("modelopt")
_KEPT: Final = ("quant_algo", "kv_cache_quant_algo", "group_size", "quantized_layers")
_ALGOS: Final = ("FP8", "NVFP4", "W4A16_NVFP4", "FP8_PB_WO", "MXFP8", "MIXED_PRECISION", None)


def nested(table: dict[str, Any]) -> dict[str, Any]:
    """Return a flat config of ModelOpt as hf_quant_config.json has it."""
    inner: dict[str, Any] = {key: deepcopy(table[key]) for key in _KEPT if key in table}
    inner["exclude_modules"] = list(table.get("ignore", []))
    inner.setdefault("kv_cache_quant_algo", None)
    return {"producer": {"name": "modelopt", "version": "0.41.0"}, "quantization": inner}


@mutation("hf_quant_config.json disagrees with config.json", fits=_of_modelopt, weight=4)
def _disagrees(draft: Draft, random: Random) -> str:
    own = nested(draft.quant)
    inner = own["quantization"]
    change = pick(
        random, ("algo", "excludes nothing", "excludes all", "group size", "flat", "cache")
    )
    if change == "algo":
        inner["quant_algo"] = pick(random, (a for a in _ALGOS if a != inner.get("quant_algo")))
        change = f"algo {inner['quant_algo']}"
    elif change == "group size":
        inner["group_size"] = pick(random, (32, 128, None))
    elif change == "cache":
        inner["kv_cache_quant_algo"] = pick(random, ("FP8", "NVFP4", "INT8"))
    elif change == "flat":
        own = {**inner, "quant_method": "modelopt"}
    else:
        inner["exclude_modules"] = ["*"] if change == "excludes all" else []
    draft.files[FILE] = own
    where = pick(random, ("beside", "config.json nested", "config.json without algo", "alone"))
    if where == "config.json nested":
        draft.config["quantization_config"] = {"quant_method": "modelopt", **nested(draft.quant)}
    elif where == "config.json without algo":
        draft.quant.pop("quant_algo", None)
    elif where == "alone":
        del draft.config["quantization_config"]
    return f"{change}, {where}"


def _list(draft: Draft) -> tuple[dict[str, Any], str]:
    inner = draft.quant.get("quantization", draft.quant)
    for key in ("ignore", "exclude_modules"):
        if isinstance(inner, dict) and isinstance(inner.get(key), list):
            return inner, key
    raise Unfit


@mutation("routers are excluded by a wildcard", good=True, fits=_of_modelopt, weight=2)
def _router_wildcard(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    routers = set(draft.modules(Role.ROUTER))
    kept = [entry for entry in table[key] if entry not in routers]
    if len(kept) == len(table[key]):
        raise Unfit
    entry = pick(random, ("*.gate", "*mlp.gate", "*block_sparse_moe.gate", "model.layers.*.gate"))
    if draft.family.in_vllm_name(min(routers)).endswith("mlp.gate") == ("sparse" in entry):
        entry = "*.gate"
    table[key] = [*kept, entry]
    return entry


@mutation("exclude_modules has a wildcard", fits=_of_modelopt, weight=4)
def _wildcard(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    module = pick(random, draft.quantized())
    head, _, last = module.rpartition(".")
    entry: str = pick(
        random,
        (
            *("*gate*", "model.layers.0*", "model.layers.0.*", "model.layers.0", "model.layers"),
            *("*self_attn*", "self_attn*", "model.layers.?.self_attn*", "*[qk]_proj", "*", "?"),
            *("*.mlp", "*mlp*", "*mlp.experts*", "*experts", "*experts.0*", "lm_head*", "model*"),
            *(f"{head}*", f"{head}.*", f"*{last}", f"{head}.[!q]*", f"*.{last}*", f"{module}?"),
            *("*block_sparse_moe*", "*shared_experts*", "*qkv_proj", "*gate_up_proj", "*mlp.gate"),
        ),
    )
    table[key] = [*table[key], entry] if random.random() < 0.7 else [entry, "lm_head"]
    return f"{entry} of {len(table[key])}"


@mutation("modules that a wildcard excludes are plain", fits=_of_modelopt, weight=3)
def _plain_wildcard(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    some: dict[str, Callable[[str], bool]] = {
        "model.layers.0*": lambda name: name.startswith("model.layers.0"),
        "model.layers.0.*": lambda name: name.startswith("model.layers.0."),
        "*self_attn*": lambda name: "self_attn" in name,
        "*.self_attn": lambda name: "self_attn" in name,
        "*experts*": lambda name: "experts" in name,
        "*o_proj": lambda name: name.endswith("o_proj"),
        "*[qkv]_proj": lambda name: name.endswith(("q_proj", "k_proj", "v_proj")),
        "*mlp*": lambda name: ".mlp." in name or ".block_sparse_moe." in name,
    }
    entry = pick(random, some)
    modules = [name for name in draft.quantized() if some[entry](name)]
    if not modules or len(modules) == len(draft.layouts):
        raise Unfit
    for module in modules:
        draft.keep(module)
    table[key].append(entry)
    return f"{entry} ({len(modules)})"


@mutation("ModelOpt's KV cache has another form", fits=_of_modelopt, weight=2)
def _cache(draft: Draft, random: Random) -> str:
    key = pick(random, ("kv_cache_scheme", "kv_cache_quant_algo"))
    float8 = {"dynamic": False, "num_bits": 8, "type": "float"}
    values: tuple[Any, ...] = (
        *(
            float8,
            {**float8, "num_bits": 4},
            {**float8, "type": "int"},
            {**float8, "dynamic": True},
        ),
        *({}, "FP8", "fp8", "NVFP4", "INT8", "", None, 8, []),
    )
    draft.quant[key] = deepcopy(pick(random, (v for v in values if v != draft.quant.get(key))))
    return f"{key}: {draft.quant[key]}"


@mutation("ModelOpt's config_groups say another thing", fits=_of_modelopt)
def _groups(draft: Draft, random: Random) -> str:
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    groups: tuple[Any, ...] = (
        {},
        {"group_0": {"targets": ["Linear"], "weights": weights}},
        {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": weights}},
        {"group_0": {"weights": {**weights, "group_size": 32}}},
        {"group_0": None},
        [],
    )
    draft.quant["config_groups"] = pick(random, groups)
    if random.random() < 0.3:
        draft.quant.pop("group_size", None)
    return str(draft.quant["config_groups"])[:80]


@mutation(
    "the file of a quantization config is beside another method's",
    fits=by_method("compressed-tensors", "fp8", ""),
    weight=2,
)
def _stray_file(draft: Draft, random: Random) -> str:
    algo = pick(random, ("NVFP4", "FP8", "MIXED_PRECISION", None, "INT4_AWQ"))
    inner: dict[str, Any] = {
        "quant_algo": algo,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }
    if algo == "NVFP4":
        inner["group_size"] = 16
    producer = pick(random, ({"name": "modelopt"}, {"name": "other"}, {}))
    draft.files[FILE] = {"producer": producer, "quantization": inner}
    return f"{algo} by {producer}"
