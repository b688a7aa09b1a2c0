"""Mutations of parts: dtypes and suffixes of every kind of tensor, experts, layers and the head."""

from random import Random
from typing import Final

from differential_draft import Draft, Unfit, by_method, mutation, pick
from mquant.family_rows import Role

_quantized = by_method("compressed-tensors", "modelopt", "fp8")
_DTYPES: Final = ("BF16", "F16", "F32", "U8", "F8_E4M3", "F8_E8M0", "I32", "I8", "F64", "BOOL")


def _parts(draft: Draft) -> list[str]:
    """Return the last parts of quantized modules' tensors."""
    inside = (name.rpartition(".") for name in draft.tensors)
    return sorted({last for module, _, last in inside if module in draft.layouts})


@mutation("a part has another dtype everywhere", fits=_quantized, weight=5)
def _cast(draft: Draft, random: Random) -> str:
    part = pick(random, _parts(draft))
    roles = pick(random, ((), (), (Role.EXPERT,), (Role.ATTENTION,)))
    names = [n for module in draft.quantized(*roles) if (n := f"{module}.{part}") in draft.tensors]
    old = draft.tensors[pick(random, names)][0]
    new = pick(random, (dtype for dtype in _DTYPES if dtype != old))
    for name in names:
        draft.tensors[name] = (new, draft.tensors[name][1])
    return f"{part} ({len(names)}): {old} -> {new}"


_ENDS: Final = (
    *("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "scale"),
    *("weight_global_scale", "input_scale", "input_global_scale", "qweight", "scales", "qzeros"),
    *("weight_zero_point", "weight_shape", "activation_scale", "g_idx", "weight_g_idx"),
)


@mutation("a part has another part's name", fits=_quantized, weight=3)
def _swap(draft: Draft, random: Random) -> str:
    old = pick(random, _parts(draft))
    new = pick(random, (end for end in _ENDS if end != old))
    roles = pick(random, ((), (), (Role.EXPERT,), (Role.ATTENTION,)))
    names = {f"{module}.{old}": f"{module}.{new}" for module in draft.quantized(*roles)}
    names = {a: b for a, b in names.items() if a in draft.tensors}
    if not names or not draft.tensors.keys().isdisjoint(names.values()):
        raise Unfit
    draft.tensors = {names.get(name, name): header for name, header in draft.tensors.items()}
    return f"{old} -> {new} ({len(names)})"


@mutation("a part is stored twice, under two names", fits=_quantized, weight=2)
def _both(draft: Draft, random: Random) -> str:
    old = pick(random, _parts(draft))
    new = pick(random, (end for end in _ENDS if end != old))
    for module in draft.quantized():
        if header := draft.tensors.get(f"{module}.{old}"):
            draft.tensors.setdefault(f"{module}.{new}", header)
    return f"{old} and {new}"


@mutation("experts of config.json are not those on disk", weight=2)
def _count(draft: Draft, random: Random) -> str:
    count = draft.experts
    key = draft.family.config.experts
    new = pick(random, (count - 1, count + 1, count // 2, count * 2, 1))
    draft.text[key or ""] = new
    for name, (dtype, shape) in list(draft.tensors.items()):
        router = draft.role(name) in (Role.ROUTER, Role.ROUTING_BIAS)
        if router and shape[:1] == (count,):
            draft.tensors[name] = (dtype, (new, *shape[1:]))
    return f"{count} -> {new}, routers follow"


@mutation("one expert is lost or of another layout", fits=_quantized, weight=2)
def _one_expert(draft: Draft, random: Random) -> str:
    number = random.randrange(draft.experts)
    inside = f".layers.{random.choice((0, 1))}."
    end = f".experts.{number}."
    names = [name for name in draft.quantized() if end in name and inside in name]
    if not names:
        raise Unfit
    plain = random.random() < 0.5
    for name in names:
        draft.keep(name) if plain else draft.strip(name)
    return f"{names[0]}, {'plain' if plain else 'lost'}"


@mutation("the head and whether it is tied", weight=3)
def _head(draft: Draft, random: Random) -> str:
    tied, stored = random.random() < 0.6, random.random() < 0.6
    config, text = draft.config, draft.text
    table = config if text is config else pick(random, (config, text))
    table["tie_word_embeddings"] = tied
    if random.random() < 0.15:
        del table["tie_word_embeddings"]
    shape = draft.plain[f"{draft.modules(Role.EMBEDDING)[0]}.weight"]
    head = next(iter(draft.modules(Role.HEAD)), "lm_head")
    draft.strip(head)
    if stored:
        rows = shape[1][0] + pick(random, (0, 0, 0, 64, -1))
        draft.tensors[f"{head}.weight"] = (shape[0], (rows, *shape[1][1:]))
    return f"tied {tied}, {'stored' if stored else 'not stored'}"


@mutation("layers of config.json are not those on disk")
def _layers(draft: Draft, random: Random) -> str:
    key = draft.family.config.layers
    count = draft.text.get(key)
    if not isinstance(count, int):
        raise Unfit
    draft.text[key] = count + random.choice((-1, 1, 2))
    return f"{count} -> {draft.text[key]}"


@mutation("the quantization config lies elsewhere", fits=_quantized, weight=3)
def _elsewhere(draft: Draft, random: Random) -> str:
    table = draft.quant
    other = {**table, "ignore": [], "modules_to_not_convert": []}
    where = pick(
        random,
        (
            "text_config",
            "text_config beside",
            "text_config with all",
            "compression_config other",
            "compression_config null",
            "llm_config",
            "text_config.compression_config",
        ),
    )
    config = draft.config
    if where == "text_config":
        config["text_config"] = {"quantization_config": config.pop("quantization_config")}
    elif where == "text_config beside":
        config["text_config"] = {"quantization_config": other}
    elif where == "text_config with all":
        config["text_config"] = {k: v for k, v in config.items() if k != "architectures"}
        del config["quantization_config"]
    elif where == "compression_config other":
        config["compression_config"] = other
    elif where == "compression_config null":
        config["compression_config"] = config.pop("quantization_config")
        config["quantization_config"] = None
    elif where == "llm_config":
        config["llm_config"] = {"quantization_config": config.pop("quantization_config")}
    else:
        config["text_config"] = {"compression_config": config.pop("quantization_config")}
    return where
