"""Mutations of tensors."""

from random import Random
from typing import Final

from differential_draft import Draft, Header, Unfit, by_method, mutation, pick
from differential_formats import LINEAR, args
from mquant.family_rows import Role

_quantized = by_method("compressed-tensors", "modelopt", "fp8")
_SCALES: Final = ("scale", "scale_inv", "scale_2", "zero_point", "g_idx", "weight_shape", "packed")
_CASTS: Final = {
    "F32": ("BF16", "F16", "F64"),
    "BF16": ("F32", "F16", "F8_E4M3"),
    "F16": ("F32", "BF16"),
    "U8": ("F8_E4M3", "I8", "BF16"),
    "F8_E4M3": ("U8", "BF16", "F8_E5M2", "I8"),
    "I32": ("I64", "F32", "U32"),
    "I64": ("I32", "F32"),
}


def _any(draft: Draft, random: Random) -> str:
    """Return a tensor: half the time one of a quantized module, scales as often as codes."""
    parts = [name for name in draft.tensors if name.rpartition(".")[0] in draft.layouts]
    kind = random.random()
    if parts and kind < 0.6:
        end = pick(random, sorted({name.rpartition(".")[2] for name in parts}))
        return pick(random, (name for name in parts if name.endswith(f".{end}")))
    others = [name for name in draft.tensors if name.rpartition(".")[0] not in draft.layouts]
    return pick(random, others if kind < 0.9 else draft.tensors)


def _alike(draft: Draft, name: str, random: Random) -> list[str]:
    """Return a tensor alone, or all tensors with the same last part beside the same kind."""
    if random.random() < 0.5:
        return [name]
    module, _, last = name.rpartition(".")
    end = f".{module.rpartition('.')[2]}.{last}"
    return [other for other in draft.tensors if other.endswith(end)]


def _rename(draft: Draft, names: dict[str, str]) -> None:
    """Rename tensors where they stand."""
    if not names or not set(names.values()).isdisjoint(draft.tensors.keys() - names.keys()):
        raise Unfit
    draft.tensors = {names.get(name, name): header for name, header in draft.tensors.items()}


# -------------------------------------------------------------------------- dropped and added


@mutation("a tensor is missing", weight=3)
def _drop(draft: Draft, random: Random) -> str:
    name = _any(draft, random)
    del draft.tensors[name]
    return name


@mutation("all tensors of a kind are missing", weight=2)
def _drop_kind(draft: Draft, random: Random) -> str:
    name = _any(draft, random)
    last = name.rpartition(".")[2]
    module = name.rpartition(".")[0].rpartition(".")[2]
    if random.random() < 0.5 and last != "weight":
        end = f".{last}"
    else:
        end = f".{module}.{last}" if "." in name else name
    for other in [other for other in draft.tensors if other.endswith(end)]:
        del draft.tensors[other]
    return f"*{end}"


@mutation("a module is missing")
def _drop_module(draft: Draft, random: Random) -> str:
    module = pick(random, sorted({name.rpartition(".")[0] for name in draft.tensors}))
    for name in draft.of(module):
        del draft.tensors[name]
    return module


@mutation("a tensor that no model has", weight=2)
def _unknown(draft: Draft, random: Random) -> str:
    module = pick(random, sorted({name.rpartition(".")[0] for name in draft.tensors}))
    name = pick(
        random,
        (
            f"{module}.scales",
            f"{module}.note",
            "model.note.weight",
            "model.layers.0.note.weight",
            "note",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.rotary_emb.inv_freq",
            f"{module}.input_scale",
            f"{module}.weight_scale",
            f"{module}.output_scale",
        ),
    )
    if name in draft.tensors:
        raise Unfit
    draft.tensors[name] = pick(random, (("F32", ()), ("F32", (1,)), ("BF16", (16, 16))))
    return f"{name} {draft.tensors[name]}"


@mutation("a bias more", weight=2)
def _bias(draft: Draft, random: Random) -> str:
    module = pick(random, draft.modules(*LINEAR, Role.ROUTER, Role.HEAD, Role.NORM))
    if f"{module}.bias" in draft.tensors:
        raise Unfit
    draft.tensors[f"{module}.bias"] = ("BF16", draft.plain[f"{module}.weight"][1][:1])
    return f"{module}.bias"


def _copied(draft: Draft, old: str, new: str) -> None:
    fresh = {name.replace(old, new): h for name, h in draft.tensors.items() if old in name}
    if not fresh:
        raise Unfit
    draft.tensors |= fresh


@mutation("a layer more on disk")
def _layer(draft: Draft, random: Random) -> str:
    count = draft.text.get(draft.family.config.layers)
    if not isinstance(count, int) or count < 1:
        raise Unfit
    number = count + random.choice((0, 0, 5))
    _copied(draft, f".layers.{count - 1}.", f".layers.{number}.")
    return f"layer {number}"


@mutation("an expert more on disk")
def _expert(draft: Draft, random: Random) -> str:
    last = draft.experts - 1
    _copied(draft, f".experts.{last}.", f".experts.{last + 1}.")
    return f"expert {last + 1}"


@mutation("an expert less on disk and in config.json")
def _pruned(draft: Draft, random: Random) -> str:
    key = draft.family.config.experts
    if not key or not isinstance(draft.text.get(key), int):
        raise Unfit
    count = draft.text[key]
    gates = random.random() < 0.7
    draft.text[key] = count - 1
    for name in [name for name in draft.tensors if f".experts.{count - 1}." in name]:
        del draft.tensors[name]
        draft.layouts.pop(name.rpartition(".")[0], None)
    for name, (dtype, shape) in list(draft.tensors.items()):
        router = draft.role(name) in (Role.ROUTER, Role.ROUTING_BIAS)
        if gates and router and shape[:1] == (count,):
            draft.tensors[name] = (dtype, (count - 1, *shape[1:]))
    return f"{count} -> {count - 1}, {'with' if gates else 'without'} the router's rows"


def _layers(draft: Draft) -> int:
    """Return the number of layers. Raises Unfit if config.json has lost the number."""
    count = draft.family.settings(draft.config).get(draft.family.config.layers)
    if not isinstance(count, int):
        raise Unfit
    return count


@mutation("MiniMax's MTP layers are there", good=True, fits=lambda d: d.family.name == "minimax_m2")
def _mtp(draft: Draft, random: Random) -> str:
    count, old = _layers(draft), ".layers.0."
    draft.config["num_mtp_modules"] = 1
    for name in [name for name in draft.plain if old in name]:
        draft.tensors[name.replace(old, f".layers.{count}.")] = draft.plain[name]
    for part, shape in (("enorm", (256,)), ("hnorm", (256,)), ("eh_proj", (256, 512))):
        draft.tensors[f"model.layers.{count}.{part}.weight"] = ("BF16", shape)
    return f"layer {count}"


@mutation("KV-cache scales and their scheme", good=True, fits=_quantized, weight=3)
def _kv(draft: Draft, random: Random) -> str:
    if draft.family.name == "deepseek_v3":
        raise Unfit
    shape = pick(random, ((1,), ()))
    count = _layers(draft)
    where = pick(random, ("{}_scale", "{}_proj.{}_scale"))
    keys = [name for name in draft.modules(Role.ATTENTION) if name.endswith(".k_proj")]
    usual = [f"model.layers.{layer}.self_attn" for layer in range(count)]
    for module in [name.removesuffix(".k_proj") for name in keys] or usual:
        for part in "kv":
            draft.tensors[f"{module}.{where.format(part, part)}"] = ("F32", shape)
    if draft.method == "compressed-tensors":
        draft.quant["kv_cache_scheme"] = args()
    elif draft.method == "modelopt":
        draft.quant["kv_cache_quant_algo"] = "FP8"
    return f"{where} {shape}"


# --------------------------------------------------------------------------- renamed and cast


_NAMES: Final = (
    (".weight_packed", ".weight"),
    (".weight", ".weight_packed"),
    (".weight_scale", ".weight_scale_inv"),
    (".weight_scale_inv", ".weight_scale"),
    (".weight_scale", ".scale"),
    (".weight_global_scale", ".weight_scale_2"),
    (".weight_scale_2", ".weight_global_scale"),
    (".weight_scale_2", ".weight_scale2"),
    (".input_global_scale", ".input_scale"),
    (".input_scale", ".input_global_scale"),
    (".weight_packed", ".qweight"),
    (".weight_zero_point", ".qzeros"),
    (".weight_shape", ".shape"),
)
_PARTS: Final = (
    ((".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj.")),
    ((".gate_proj.", ".w1."), (".down_proj.", ".w2."), (".up_proj.", ".w3.")),
    ((".block_sparse_moe.", ".mlp."),),
    ((".mlp.", ".block_sparse_moe."),),
    (("model.layers.", "layers."),),
    (("model.", "model.language_model."),),
    (("model.", "language_model.model."),),
    (("lm_head.", "model.lm_head."),),
    (("model.embed_tokens.", "model.tok_embeddings."),),
    ((".q_proj.", ".query_proj."),),
    ((".gate.e_score_correction_bias", ".e_score_correction_bias"),),
    ((".e_score_correction_bias", ".gate.e_score_correction_bias"),),
    ((".shared_experts.", ".shared_expert."),),
    ((".q_norm.", ".q_layernorm."), (".k_norm.", ".k_layernorm.")),
)


@mutation("tensors' last parts are renamed", fits=_quantized, weight=2)
def _ends(draft: Draft, random: Random) -> str:
    old, new = pick(
        random, ((a, b) for a, b in _NAMES if any(n.endswith(a) for n in draft.tensors))
    )
    names = [n for n in draft.tensors if n.endswith(old) and n.rpartition(".")[0] in draft.layouts]
    some = [pick(random, names)] if random.random() < 0.3 else names
    _rename(draft, {name: name.removesuffix(old) + new for name in some})
    return f"{old} -> {new} ({len(some)} of {len(names)})"


@mutation("modules are renamed", weight=2)
def _modules(draft: Draft, random: Random) -> str:
    pairs = pick(random, (p for p in _PARTS if any(p[0][0] in n for n in draft.tensors)))
    only = pick(random, ("", "", "experts.", ".layers.0."))
    names = {}
    for name in draft.tensors:
        fresh = name
        for old, new in pairs if only in name else ():
            fresh = fresh.replace(old, new, 1)
        if fresh != name:
            names[name] = fresh
    _rename(draft, names)
    return f"{pairs[0][0]} -> {pairs[0][1]}{f' where {only}' if only else ''}"


@mutation("tensors have another dtype", weight=3)
def _cast(draft: Draft, random: Random) -> str:
    name = _any(draft, random)
    dtype, _ = draft.tensors[name]
    new = pick(random, _CASTS.get(dtype, ()))
    names = _alike(draft, name, random)
    for other in names:
        if draft.tensors[other][0] == dtype:
            draft.tensors[other] = (new, draft.tensors[other][1])
    return f"{name} and alike ({len(names)}): {dtype} -> {new}"


@mutation("floats of plain tensors have another width", good=True, weight=2)
def _width(draft: Draft, random: Random) -> str:
    plain = [n for n in draft.tensors if n.rpartition(".")[0] not in draft.layouts]
    name = pick(random, (n for n in plain if draft.tensors[n][0] in ("BF16", "F32")))
    new = {"BF16": "F32", "F32": "BF16"}[draft.tensors[name][0]]
    draft.tensors[name] = (new, draft.tensors[name][1])
    return f"{name} -> {new}"


def _shapes(header: Header) -> list[tuple[str, tuple[int, ...]]]:
    """Return other shapes of a tensor, by the kind of change."""
    _, shape = header
    made: list[tuple[str, tuple[int, ...]]] = [("one dimension more", (*shape, 1))]
    if not shape:
        made += [("[] -> [1]", (1,)), ("[] -> [2]", (2,))]
    elif shape == (1,):
        made += [("[1] -> []", ()), ("[1] -> [2]", (2,)), ("[1] -> [1, 1]", (1, 1))]
    else:
        made += [
            ("squeezed", tuple(n for n in shape if n != 1)),
            ("transposed", shape[::-1]),
            ("padded", (shape[0] + 8, *shape[1:])),
            ("doubled", (*shape[:-1], shape[-1] * 2)),
            ("halved", (max(shape[0] // 2, 1), *shape[1:])),
            ("flat", (_size(shape),)),
            ("one element", (1,) * len(shape)),
            ("a scalar", ()),
            ("the first column", (*shape[:-1], 1)),
        ]
    return [(how, new) for how, new in made if new != shape]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


@mutation("tensors have another shape", weight=4)
def _reshape(draft: Draft, random: Random) -> str:
    name = _any(draft, random)
    shape = draft.tensors[name][1]
    how, _ = pick(random, _shapes(draft.tensors[name]))
    names = [n for n in _alike(draft, name, random) if len(draft.tensors[n][1]) == len(shape)]
    for other in names:
        dtype, _ = draft.tensors[other]
        draft.tensors[other] = (dtype, dict(_shapes(draft.tensors[other])).get(how, shape))
    return f"{name} and alike ({len(names)}): {how} of {list(shape)}"


# --------------------------------------------------------------- modules stored as others are


@mutation("a router, the head or the embeddings are quantized", fits=_quantized, weight=3)
def _quantize(draft: Draft, random: Random) -> str:
    role = pick(random, (Role.ROUTER, Role.HEAD, Role.EMBEDDING))
    modules = draft.modules(role)
    layout = draft.layouts[pick(random, draft.layouts)]
    one = pick(random, modules)
    some = modules if random.random() < 0.7 else [one]
    for module in some:
        draft.store(module, layout)
    table = draft.quant
    how = pick(random, ("still ignored", "not ignored", "not ignored", "targeted"))
    keys = [key for key, value in table.items() if isinstance(value, list)]
    for key in keys if how != "still ignored" else ():
        table[key] = [entry for entry in table[key] if entry not in some]
    if how == "targeted":
        group = pick(random, draft.groups.values())
        last = some[0].rpartition(".")[2]
        group["targets"] = [*group["targets"], pick(random, (rf"re:.*{last}$", some[0]))]
    return f"{some[0]} ({len(some)}), {how}"


@mutation("a quantized module is plain", fits=_quantized, weight=2)
def _unquantize(draft: Draft, random: Random) -> str:
    module = pick(random, draft.layouts)
    some = [module]
    if random.random() < 0.5:
        end = f".{module.rpartition('.')[2]}"
        some = [name for name in draft.layouts if name.endswith(end)]
    for name in some:
        draft.keep(name)
    return f"{module} ({len(some)})"
