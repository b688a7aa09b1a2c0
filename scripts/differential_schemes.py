"""Mutations of schemes and their tensors: integers, zero points, orders, inputs, targets."""

from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any, Final

from differential_draft import Draft, Unfit, by_method, mutation, pick
from differential_formats import args
from differential_layouts import packed
from mquant.family_rows import Role
from mquant.schemes import FP8_DYNAMIC, NVFP4, NVFP4A16, W4A16

_quantized = by_method("compressed-tensors", "modelopt", "fp8")
_of_ct, _of_fp8 = by_method("compressed-tensors"), by_method("fp8")


def _packed(draft: Draft) -> list[str]:
    """Return the modules in packed integers. Raises Unfit if there are none."""
    modules = [name for name in draft.quantized() if f"{name}.weight_shape" in draft.tensors]
    if not modules:
        raise Unfit
    return modules


def _weights(draft: Draft) -> list[dict[str, Any]]:
    return [g["weights"] for g in draft.groups.values() if isinstance(g.get("weights"), dict)]


def _inputs(draft: Draft, module: str) -> int:
    return draft.plain[f"{module}.weight"][1][-1]


@mutation("an order of activations is stored", fits=_of_ct, weight=3)
def _stored_order(draft: Draft, random: Random) -> str:
    modules = _packed(draft)
    name = pick(random, ("weight_g_idx", "g_idx"))
    some = modules if random.random() < 0.6 else [pick(random, modules)]
    for module in some:
        size = _inputs(draft, module) if random.random() < 0.9 else 1
        draft.tensors[f"{module}.{name}"] = ("I32", (size,))
    return f"{name} ({len(some)} of {len(modules)})"


@mutation("an order of activations is declared", fits=_of_ct, weight=2)
def _declared_order(draft: Draft, random: Random) -> str:
    _packed(draft)
    order = pick(random, ("group", "weight", "static", "dynamic", None, "GROUP", False, True))
    for weights in _weights(draft):
        weights["actorder"] = order
    return str(order)


@mutation("zero points are stored or not", fits=_of_ct, weight=3)
def _zero_points(draft: Draft, _: Random) -> str:
    modules = _packed(draft)
    if f"{modules[0]}.weight_zero_point" in draft.tensors:
        for module in modules:
            draft.tensors.pop(f"{module}.weight_zero_point", None)
        return "removed"
    for module in modules:
        rows, groups = draft.tensors[f"{module}.weight_scale"][1]
        draft.tensors[f"{module}.weight_zero_point"] = ("I32", (-(-rows // 8), groups))
    return "added"


@mutation("zero points have another dtype and shape", fits=_of_ct)
def _plain_zero_points(draft: Draft, random: Random) -> str:
    modules = _packed(draft)
    dtype = pick(random, ("I8", "I32", "BF16", "I64"))
    for module in modules:
        draft.tensors[f"{module}.weight_zero_point"] = (
            dtype,
            draft.tensors[f"{module}.weight_scale"][1],
        )
    return dtype


@mutation("integers are symmetric or not, with their tensors", good=True, fits=_of_ct, weight=2)
def _symmetry(draft: Draft, random: Random) -> str:
    modules = _packed(draft)
    table = pick(random, _weights(draft))
    if len(draft.groups) > 1 or table.get("num_bits") != 4 or table.get("actorder"):
        raise Unfit
    table["symmetric"] = not table.get("symmetric")
    layout = packed(4, table.get("group_size"), symmetric=table["symmetric"])
    for module in modules:
        draft.store(module, layout)
    return f"symmetric: {table['symmetric']}"


@mutation("integers have other bits or groups, with their tensors", fits=_of_ct, weight=4)
def _integers(draft: Draft, random: Random) -> str:
    modules = _packed(draft)
    if len(draft.groups) > 1:
        raise Unfit
    table = pick(random, _weights(draft))
    bits = pick(random, (2, 4, 8, 8, 16))
    size = pick(random, (16, 32, 48, 64, 96, 128, 256, 512, None, -1))
    symmetric = random.random() < 0.6
    table |= {
        "num_bits": bits,
        "group_size": size,
        "strategy": "channel" if size in (None, -1) else "group",
        "symmetric": symmetric,
        "actorder": None,
    }
    layout = packed(bits, None if size == -1 else size, symmetric=symmetric)
    for module in modules:
        draft.store(module, layout)
    return f"{bits} bits, groups of {size}, symmetric {symmetric}"


@mutation("input activations are static or dynamic", fits=_of_ct, weight=2)
def _static(draft: Draft, random: Random) -> str:
    groups = [g for g in draft.groups.values() if g.get("input_activations")]
    inputs = pick(random, groups)["input_activations"]
    inputs["dynamic"] = pick(random, [v for v in (True, False, "local") if v != inputs["dynamic"]])
    with_scales = random.random() < 0.5
    scales = [n for n in draft.tensors if n.endswith((".input_scale", ".input_global_scale"))]
    if with_scales and not scales:
        for module in draft.quantized():
            draft.tensors[f"{module}.input_scale"] = pick(random, (("BF16", (1,)), ("F32", ())))
    elif not with_scales:
        for name in scales:
            del draft.tensors[name]
    return f"dynamic {inputs['dynamic']}, {'with' if with_scales else 'without'} scales"


@mutation("blocks have another shape, with their scales", fits=_quantized, weight=3)
def _blocks(draft: Draft, random: Random) -> str:
    high, wide = pick(random, ((64, 64), (128, 64), (64, 128), (32, 32), (1, 128), (256, 256)))
    names = [n for n in draft.tensors if n.endswith(".weight_scale_inv")]
    if draft.method == "fp8":
        draft.quant["weight_block_size"] = [high, wide]
    else:
        tables = [table for table in _weights(draft) if table.get("strategy") == "block"]
        for table in tables:
            table["block_structure"] = [high, wide]
        names = (
            [
                n
                for n in draft.tensors
                if n.endswith(".weight_scale") and n.removesuffix(".weight_scale") in draft.layouts
            ]
            if tables
            else []
        )
    for name in names:
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight not in draft.plain:
            raise Unfit  # another mutation renamed the module
        rows, columns = draft.plain[weight][1]
        dtype, _ = draft.tensors[name]
        draft.tensors[name] = (dtype, (-(-rows // high), -(-columns // wide)))
    if not names:
        raise Unfit
    return f"{high} x {wide}"


_TARGETS: Final[tuple[Callable[[str], str], ...]] = (
    lambda last: "Linear",
    lambda last: last,
    lambda last: f"re:{last}",
    lambda last: f"re:.*{last}",
    lambda last: rf"re:.*\.{last}$",
    lambda last: f"re:^{last}",
    lambda last: f"re:model.*{last}",
    lambda last: f"re:^model.layers.0.*{last}$",
    lambda last: f"re:(?i).*{last.upper()}$",
    lambda last: "re:.*(q|k|v|qkv|o)_proj",
    lambda last: "re:.*experts.*",
    lambda last: "re:[",
    lambda last: "re:",
    lambda last: "RowParallelLinear",
    lambda last: "QKVParallelLinear",
    lambda last: "FusedMoE",
    lambda last: "Attention",
)


@mutation("two groups overlap", fits=_of_ct, weight=4)
def _overlap(draft: Draft, random: Random) -> str:
    own = pick(random, draft.groups.values())
    last = pick(random, draft.quantized()).rpartition(".")[2]
    other = deepcopy(
        pick(random, (own, *(dict(s.config_group) for s in (FP8_DYNAMIC, NVFP4A16, W4A16, NVFP4))))
    )
    other["targets"] = [pick(random, _TARGETS)(last)]
    groups = list(draft.groups.items())
    groups.insert(random.randrange(len(groups) + 1), ("group_y", other))
    draft.quant["config_groups"] = dict(groups)
    order = list(draft.quant["config_groups"])
    return f"{other['targets']} {other.get('format')} in {order}"


@mutation("targets name the same modules otherwise", fits=_of_ct, weight=3)
def _same_targets(draft: Draft, random: Random) -> str:
    group = pick(random, draft.groups.values())
    lasts = sorted({name.rpartition(".")[2] for name in draft.quantized()})
    how = pick(random, ("exact", "vLLM's names", "regexes", "unanchored", "one regex", "fused"))
    names = draft.quantized()
    lists = {
        "exact": names,
        "vLLM's names": [draft.family.in_vllm_name(name) for name in names],
        "regexes": [rf"re:.*\.{last}$" for last in lasts],
        "unanchored": [f"re:{last}" for last in lasts],
        "one regex": [rf"re:.*\.({'|'.join(lasts)})$"],
        "fused": [r"re:.*qkv_proj$", r"re:.*gate_up_proj$", *(rf"re:.*\.{n}$" for n in lasts)],
    }
    group["targets"] = list(dict.fromkeys(lists[how]))
    return how


@mutation("ignore has an unanchored regex", fits=_of_ct, weight=3)
def _unanchored(draft: Draft, random: Random) -> str:
    name = pick(random, (*draft.quantized(), *draft.modules(Role.ROUTER, Role.HEAD)))
    head, _, last = name.rpartition(".")
    entry = pick(
        random,
        (
            f"re:{last}",
            f"re:.{last}",
            f"re:{head}",
            f"re:{name}",
            f"re:{name}$",
            "re:model",
            "re:l",
            "re:[",
            "re:",
            "re:.*gate",
            "re:gate",
            f"re:.*{last[:3]}",
            f"re: .*{last}",
            "re:.*mlp.gate",
        ),
    )
    draft.quant["ignore"] = [*draft.quant.get("ignore", []), entry]
    return entry


@mutation("transform_config", fits=_of_ct)
def _transforms(draft: Draft, random: Random) -> str:
    scheme = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}
    located = {"targets": [r"re:.*o_proj$"], "location": "weight_input", "ignore": []}
    online = {"type": "hadamard", "head_dim": 64, "apply": [located]}
    tables: tuple[Any, ...] = (
        *({}, None, {"config_groups": {}}, {"config_groups": {"R1": scheme}}, {"R1": scheme}),
        *({"config_groups": {"R2": online}}, {"config_groups": None}, [], {"note": 1}),
    )
    draft.quant["transform_config"] = deepcopy(pick(random, tables))
    return str(draft.quant["transform_config"])[:70]


@mutation("the KV cache has another form", fits=_of_ct, weight=3)
def _cache(draft: Draft, random: Random) -> str:
    strategies = ("tensor", "tensor", "attn_head", "channel", "token", "head", None)
    scheme = args(
        num_bits=pick(random, (8, 8, 8, 4, 16)),
        type=pick(random, ("float", "float", "int")),
        strategy=pick(random, strategies),
        dynamic=pick(random, (False, False, True, "local")),
        symmetric=random.random() < 0.8,
    )
    draft.quant["kv_cache_scheme"] = scheme
    kinds = (
        "",
        "",
        "self_attn.{}_scale",
        "self_attn.{}_proj.output_scale",
        "self_attn.attn.{}_scale",
        "self_attn.{}_zero_point",
        "self_attn.kv_scale",
    )
    where = pick(random, kinds)
    shape = pick(random, ((1,), (), (2,), (4, 1)))
    for layer in range(draft.text.get("num_hidden_layers", 0)) if where else ():
        for part in "kv":
            draft.tensors[f"model.layers.{layer}.{where.format(part)}"] = ("F32", shape)
    return f"{where} {shape} {[scheme[k] for k in ('num_bits', 'type', 'strategy', 'dynamic')]}"


@mutation("KV-cache scales without a scheme", fits=_quantized, weight=2)
def _cache_scales(draft: Draft, random: Random) -> str:
    where = pick(
        random,
        (
            "self_attn.{}_scale",
            "self_attn.{}_proj.{}_scale",
            "self_attn.{}_proj.output_scale",
            "self_attn.attn.{}_scale",
            "self_attn.kv_scale",
            "self_attn.{}_zero_point",
            "self_attn.q_scale",
        ),
    )
    dtype = pick(random, ("F32", "BF16", "F16", "F8_E4M3"))
    shape = pick(random, ((1,), (), (2,)))
    for layer in range(draft.text.get("num_hidden_layers", 0)):
        for part in "kv":
            name = f"model.layers.{layer}.{where.format(part, part)}"
            draft.tensors.setdefault(name, (dtype, shape))
    return f"{where} {dtype} {shape}"
