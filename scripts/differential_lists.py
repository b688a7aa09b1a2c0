"""Mutations of ignore lists, config groups and their arguments."""

from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any, Final

from differential_draft import Draft, Unfit, by_method, mutation, pick
from differential_formats import args
from mquant.family_rows import Role
from mquant.schemes import FP8_DYNAMIC, NVFP4, NVFP4A16, W4A16

_LISTS: Final = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
_quantized = by_method("compressed-tensors", "modelopt", "fp8")
_of_ct = by_method("compressed-tensors")


def _list(draft: Draft) -> tuple[dict[str, Any], str]:
    """Return the table and the key of the ignore list. Raises Unfit if there is none."""
    inner = draft.quant.get("quantization")
    for table in (draft.quant, inner if isinstance(inner, dict) else {}):
        for key in _LISTS:
            if isinstance(table.get(key), list):
                return table, key
    raise Unfit


# ------------------------------------------------------------------------------ ignore lists


@mutation("the ignore list is under another method's key", fits=_quantized, weight=2)
def _other_key(draft: Draft, random: Random) -> str:
    table, old = _list(draft)
    new = pick(random, (key for key in _LISTS if key != old))
    table[new] = table.pop(old)
    return f"{old} -> {new}"


@mutation("an ignore entry is dropped", fits=_quantized, weight=3)
def _drop_entry(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    entry = pick(random, table[key])
    table[key] = [other for other in table[key] if other != entry]
    return str(entry)


@mutation("the ignore list is empty", fits=_quantized)
def _no_entries(draft: Draft, _: Random) -> None:
    table, key = _list(draft)
    table[key] = []


@mutation("the ignore list is in another order", good=True, fits=_quantized)
def _shuffled(draft: Draft, random: Random) -> None:
    table, key = _list(draft)
    random.shuffle(table[key])


@mutation("an ignore entry that matches nothing", good=True, fits=_quantized)
def _no_match(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    regexes = ("re:.*vision_tower.*", "re:^mtp\\..*") if draft.method != "fp8" else ()
    entry: str = pick(random, ("model.visual", "model.layers.99.mlp.gate", *regexes))
    table[key].append(entry)
    return entry


@mutation("an ignore entry that covers quantized modules", fits=_quantized, weight=3)
def _too_wide(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    module = pick(random, draft.quantized())
    last = module.rpartition(".")[2]
    expert = module.partition(".experts.")[0] + ".experts"
    entry = pick(
        random,
        [
            module,
            draft.family.in_vllm_name(module),
            f"re:.*{last}$",
            rf"re:.*{last}",
            last,
            f"*{last}*",
            f"{module}*",
            "re:.*self_attn.*",
            "self_attn",
            r"re:.*experts\..*",
            r"re:.*layers\.0\..*",
            "model.layers.0.",
            "re:.*",
            *([expert, draft.family.in_vllm_name(f"{expert}.0")] if ".experts." in module else []),
        ],
    )
    table[key].append(entry)
    return entry


@mutation("a regex of the ignore list is anchored wrongly", fits=_of_ct)
def _anchored(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    old = pick(random, table[key])
    name = old.removeprefix("re:").replace("\\", "").strip("^$.*")
    last = name.rpartition(".")[2]
    new = pick(random, (f"re:{last}$", f"re:{last}", f"re:^{last}$", f"re:.*{last}$", f".*{last}"))
    table[key] = [new if entry == old else entry for entry in table[key]]
    return f"{old} -> {new}"


@mutation("the ignore list names modules otherwise", fits=_quantized, weight=2)
def _renamed(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    how = pick(random, ("vLLM's names", "transformers' names", "last parts", "model. dropped"))
    changes: dict[str, Callable[[str], str]] = {
        "vLLM's names": lambda name: name.replace("block_sparse_moe", "mlp"),
        "transformers' names": draft.family.in_memory_name,
        "last parts": lambda name: name.rpartition(".")[2],
        "model. dropped": lambda name: name.removeprefix("model."),
    }
    change = changes[how]
    fresh = list(dict.fromkeys(change(entry) for entry in table[key]))
    if fresh == table[key]:
        raise Unfit
    table[key] = fresh
    return how


@mutation("the ignore list has one regex for all routers", good=True, fits=_of_ct)
def _router_regex(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    routers = set(draft.modules(Role.ROUTER))
    kept = [entry for entry in table[key] if entry not in routers]
    if len(kept) == len(table[key]):
        raise Unfit
    entry = pick(random, (r"re:.*\.gate$", "re:.*gate$", r"re:model\.layers\.\d+\.\w+\.gate$"))
    table[key] = [entry, *kept]
    return entry


_FUSED: Final = (
    ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
    ("self_attn.fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
)


@mutation("attention is plain and ignored", good=True, fits=_quantized, weight=4)
def _plain_attention(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    modules = draft.quantized(Role.ATTENTION)
    if len(modules) == len(draft.layouts) or not modules:
        raise Unfit
    for module in modules:
        draft.keep(module)
    if isinstance(layers := draft.quant.get("quantized_layers"), dict):
        for module in modules:
            layers.pop(module, None)
    if draft.method != "compressed-tensors" or random.random() < 0.5:
        table[key] += modules
        return "exact names"
    entry = pick(random, (r"re:.*self_attn\..*", "re:.*self_attn.*", r"re:.*\.self_attn\.\w+$"))
    table[key].append(entry)
    return entry


@mutation("a fused set is plain and ignored by its fused name", fits=_quantized, weight=2)
def _fused_name(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    fused, parts = pick(random, _FUSED)
    ends = tuple(f"{fused.rpartition('.')[0]}.{part}" for part in parts)
    modules = [name for name in draft.quantized() if name.endswith(ends)]
    if not modules:
        raise Unfit
    for module in modules:
        draft.keep(module)
    heads = list(dict.fromkeys(name.rpartition(".")[0] for name in modules))
    last = fused.rpartition(".")[2]
    entries = [f"{head}.{last}" for head in heads]
    if draft.method == "compressed-tensors" and random.random() < 0.5:
        entries = [rf"re:.*{fused.replace('.', chr(92) + '.')}$"]
    table[key] += entries
    return entries[0]


@mutation("one of a fused set is ignored", fits=_quantized, weight=2)
def _one_of_fused(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    ends = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3", "q_a_proj")
    module = pick(random, (name for name in draft.quantized() if name.endswith(ends)))
    if random.random() < 0.5:
        draft.keep(module)
    table[key].append(module)
    return f"{module}{'' if module in draft.layouts else ' (plain)'}"


@mutation("a layer is plain and ignored", good=True, fits=_quantized, weight=2)
def _plain_layer(draft: Draft, random: Random) -> str:
    table, key = _list(draft)
    layer = pick(random, ("0", "1"))
    modules = [name for name in draft.quantized() if f".layers.{layer}." in name]
    if not modules:
        raise Unfit
    for module in modules:
        draft.keep(module)
        if isinstance(layers := draft.quant.get("quantized_layers"), dict):
            layers.pop(draft.family.in_vllm_name(module), None)
    if draft.method == "compressed-tensors" and random.random() < 0.5:
        table[key].append(rf"re:.*layers\.{layer}\..*")
    else:
        names = [*modules, *map(draft.family.in_vllm_name, modules)]
        table[key] += list(dict.fromkeys(names))
    return f"layer {layer}: {table[key][-1]}"


# ------------------------------------------------------------------------------ config groups


@mutation("a group has other targets", fits=_of_ct, weight=3)
def _targets(draft: Draft, random: Random) -> str:
    group = pick(random, draft.groups.values())
    some = pick(random, draft.quantized())
    lists: tuple[list[str], ...] = (
        ["Linear"],
        ["linear"],
        ["QKVParallelLinear"],
        ["Linear", "FusedMoE"],
        ["Linear", "ParallelLMHead"],
        [],
        [some],
        [draft.family.in_vllm_name(some)],
        [r"re:.*proj$"],
        [r"re:.*self_attn\..*"],
        [r"re:.*experts\..*"],
        [r"re:.*block_sparse_moe\.experts\..*"],
        [r"re:.*mlp\.experts\.\d+\.(w[123]|\w+_proj)$"],
        [r"re:.*(self_attn|mlp)\..*"],
        ["re:.*"],
        ["proj"],
    )
    new = pick(random, (targets for targets in lists if targets != group.get("targets")))
    group["targets"] = list(new)
    return str(new)


@mutation("groups are renamed", good=True, fits=_of_ct)
def _group_names(draft: Draft, random: Random) -> str:
    names = pick(random, (("group_{}", 1), ("config_{}", 0), ("NVFP4_{}", 0)))
    fresh = {names[0].format(n + names[1]): g for n, g in enumerate(draft.groups.values())}
    draft.quant["config_groups"] = fresh
    return next(iter(fresh))


@mutation("groups are in another order", fits=_of_ct)
def _group_order(draft: Draft, random: Random) -> None:
    groups = draft.groups
    if len(groups) < 2:
        raise Unfit
    names = list(groups)
    values = list(groups.values())[::-1]
    draft.quant["config_groups"] = dict(zip(names, values, strict=True))


@mutation("every group targets Linear", fits=_of_ct)
def _all_linear(draft: Draft, _: Random) -> None:
    if len(draft.groups) < 2:
        raise Unfit
    for group in draft.groups.values():
        group["targets"] = ["Linear"]


@mutation("one group more", fits=_of_ct, weight=2)
def _extra_group(draft: Draft, random: Random) -> str:
    scheme = pick(random, (FP8_DYNAMIC, NVFP4, NVFP4A16, W4A16))
    targets = pick(
        random,
        (
            ["Linear"],
            [r"re:.*vision.*"],
            [r"re:.*self_attn\.o_proj$"],
            [r"re:.*layers\.0\..*"],
            [r"re:.*lm_head$"],
            [r"re:.*experts\.0\..*"],
        ),
    )
    fresh = {**deepcopy(scheme.config_group), "targets": list(targets)}
    first = random.random() < 0.5
    groups = draft.groups
    draft.quant["config_groups"] = (
        {"group_x": fresh, **groups} if first else {**groups, "group_x": fresh}
    )
    return f"{scheme.name} for {targets}, {'first' if first else 'last'}"


_ARGUMENTS: Final[dict[str, tuple[Any, ...]]] = {
    "num_bits": (4, 8, 2, 3, 16),
    "type": ("int", "float"),
    "strategy": ("tensor", "channel", "group", "block", "token", "tensor_group", None),
    "group_size": (16, 32, 64, 128, 256, 96, None, -1, 0),
    "symmetric": (True, False),
    "dynamic": (True, False, "local"),
    "actorder": (None, "group", "weight", "static", True),
    "block_structure": (None, [128, 128], [64, 64]),
    "scale_dtype": (None, "torch.float8_e4m3fn", "torch.bfloat16"),
    "observer": (None, "minmax", "mse"),
}


@mutation("an argument of the weights is another", fits=_of_ct, weight=4)
def _argument(draft: Draft, random: Random) -> str:
    return _change_argument(pick(random, draft.groups.values()).get("weights"), random)


@mutation("an argument of the activations is another", fits=_of_ct, weight=2)
def _input_argument(draft: Draft, random: Random) -> str:
    groups = [group for group in draft.groups.values() if group.get("input_activations")]
    return _change_argument(pick(random, groups)["input_activations"], random)


def _change_argument(table: object, random: Random) -> str:
    if not isinstance(table, dict):
        raise Unfit
    key = pick(random, _ARGUMENTS)
    old = table.get(key)
    table[key] = pick(random, (value for value in _ARGUMENTS[key] if value != old))
    return f"{key}: {old} -> {table[key]}"


@mutation("an argument is missing", fits=_of_ct)
def _no_argument(draft: Draft, random: Random) -> str:
    table = pick(random, draft.groups.values()).get("weights")
    if not isinstance(table, dict):
        raise Unfit
    key = pick(random, table)
    del table[key]
    return str(key)


@mutation("the activations' arguments are added or removed", fits=_of_ct, weight=2)
def _activations(draft: Draft, random: Random) -> str:
    group = pick(random, draft.groups.values())
    if group.get("input_activations"):
        group["input_activations"] = None
        return "removed"
    inputs = pick(
        random,
        (
            NVFP4.config_group["input_activations"],
            FP8_DYNAMIC.config_group["input_activations"],
            args(),
            args(type="int", strategy="token", dynamic=True),
        ),
    )
    group["input_activations"] = deepcopy(inputs)
    return f"added: {inputs['num_bits']} bits, {inputs['strategy']}, dynamic {inputs['dynamic']}"


# ----------------------------------------------------------------------------------- KV cache


@mutation("kv_cache_scheme without scales", fits=_of_ct)
def _kv_scheme(draft: Draft, random: Random) -> str:
    scheme = pick(
        random,
        (
            args(),
            args(dynamic=True),
            args(num_bits=4),
            args(type="int"),
            args(strategy="channel"),
            args(symmetric=False),
            {},
        ),
    )
    draft.quant["kv_cache_scheme"] = deepcopy(scheme)
    return str({key: scheme.get(key) for key in ("num_bits", "type", "strategy", "dynamic")})
