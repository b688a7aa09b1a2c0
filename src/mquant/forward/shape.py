"""The numbers of config.json that define a decoder, or the sentence that says what is not known."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from mquant.family import Family
from mquant.family_rows import Forward
from mquant.formulas import holds
from mquant.forward.refuse import refuse
from mquant.forward.rope import Rope, rope_of

_MOST: Final = (1_000, 100_000, 1_000, 10_000, 10_000)
"""The most layers, hidden size, heads, size of a head, and experts."""
_THETA: Final = 10_000.0
_LATENT: Final = "kv_a_proj_with_mqa"
"""The module that only latent attention has."""
_TYPES: Final = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Latent:
    """The sizes of latent attention (https://arxiv.org/abs/2405.04434), in numbers of a head.

    A head's query and key have `plain` numbers and then `rotated` ones; the key's rotated numbers
    are the same in all heads. A head's value has `value` numbers. Keys and values of all heads come
    from `rank` numbers a token.
    """

    plain: int
    rotated: int
    value: int
    rank: int


@dataclass(frozen=True)
class Router:
    """How a token chooses its `top_k` experts.

    The experts are in `groups` of equal size; only those of a token's best `best_groups` are chosen
    from. The weights of the chosen experts add up to 1 if `normalised`, and are then multiplied by
    `factor`.
    """

    top_k: int
    groups: int = 1
    best_groups: int = 1
    normalised: bool = True
    factor: float = 1.0


@dataclass(frozen=True)
class Shape:
    """The numbers of config.json that define a decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    experts: int
    qk_norm: str
    """That of the family's `forward`, or `none` if config.json says so."""
    rope: Rope
    router: Router
    latent: Latent | None
    spans: tuple[int | None, ...]
    """For each layer, how many tokens attention looks back at, itself counted; None: at all."""


class _Config:
    """A config.json with the meaning that a family gives to keys."""

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self.family, self.config = family, config
        self.settings = family.settings(config)

    def number(self, key: str, default: int = 0) -> int:
        """Return a number, or the default that is not 0; refuse a config.json that lacks both."""
        value = self.family.value(key, self.config) if key else None
        if value is None and not default and key:
            refuse(f"config.json does not say {key}")
        return default if value is None else value

    def said(self, key: str) -> Any:
        """Return a value of any type; refuse a config.json that lacks the key."""
        value = self.settings.get(key)
        if value is None:
            refuse(f"config.json does not say {key}")
        return value

    def holds(self, condition: str | None, layer: int | None = None) -> bool:
        """Return whether a condition of the family's file is true."""
        lookup = partial(self.family.value, config=self.config, layer=layer)
        return condition is not None and holds(condition, layer, self.settings, lookup)


def shape_of(family: Family | None, config: Mapping[str, Any], context: int) -> Shape:
    """Return the decoder's numbers in config.json.

    Raises SourceError if config.json describes a model that mquant cannot evaluate with `context`
    tokens, or lacks a number.
    """
    if family is None or family.forward is None:
        name = family.title if family else f"model_type {config.get('model_type')}"
        refuse(f"{name} cannot be evaluated: mquant does not know its forward pass")
    read, keys = _Config(family, config), family.config
    _check(read, family.forward, context)
    hidden, heads = read.number(keys.hidden), read.number(keys.heads)
    latent = _latent(read) if any(row.short == _LATENT for row in family.tensors) else None
    head_dim = latent.rotated if latent else read.number("head_dim", hidden // max(1, heads))
    layers, experts = read.number(keys.layers), read.number(keys.experts)
    numbers = (layers, hidden, heads, head_dim, experts if keys.experts else 1)
    if not all(0 < value <= most for value, most in zip(numbers, _MOST, strict=True)):
        refuse(f"config.json describes no model: {numbers} of {_MOST}")
    kv_heads = read.number(keys.kv_heads or keys.heads)
    if not 0 < kv_heads <= heads or heads % kv_heads:
        refuse(f"{heads} heads cannot share {kv_heads} heads of keys")
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=float(read.settings.get("rms_norm_eps", 1e-6)),
        experts=experts,
        qk_norm="none" if read.settings.get("use_qk_norm") is False else family.forward.qk_norm,
        rope=rope_of(
            # Latent attention rotates all numbers of a part of the head.
            {**read.settings, "rotary_dim": head_dim} if latent else read.settings,
            head_dim,
            theta=family.vllm.rope.theta if family.vllm else _THETA,
            share=family.forward.rope_share,
            context=context,
            neighbours=family.forward.rope_neighbours
            and read.settings.get("rope_interleave") is not False,
        ),
        router=_router(read, family.forward) if experts else Router(0),
        latent=latent,
        spans=tuple(_span(read, family.forward, layer, context) for layer in range(layers)),
    )


def _check(read: _Config, forward: Forward, context: int) -> None:
    """Refuse what config.json asks for and the decoder does not know."""
    settings = read.settings
    takes = {"hidden_act": ("silu",), **forward.takes}
    for key, values in takes.items():
        value = settings.get(key, values[0])
        if value not in values:
            known = " or ".join("null" if each is None else str(each) for each in values)
            refuse(f"mquant does not know {key} {value}, only {known}")
    indexed = settings.get("index_topk")
    if type(indexed) is int and indexed < context:
        refuse(f"Attention looks at {indexed} tokens that an indexer chooses, fewer than {context}")
    types = settings.get("layer_types")
    for kind in types if isinstance(types, list) else ():
        if kind not in _TYPES:
            refuse(f"mquant does not know layers of {kind}, only {' and '.join(_TYPES)}")


def _span(read: _Config, forward: Forward, layer: int, context: int) -> int | None:
    span = read.settings.get("sliding_window")
    if type(span) is not int or read.settings.get("use_sliding_window") is False:
        return None
    types = read.settings.get("layer_types")
    if isinstance(types, list) and layer < len(types):
        return span if types[layer] == "sliding_attention" else None
    if forward.sliding is None and span < context:
        refuse(f"Attention slides over {span} tokens, fewer than the context of {context}")
    return span if read.holds(forward.sliding, layer) else None


def _latent(read: _Config) -> Latent:
    return Latent(
        plain=read.number("qk_nope_head_dim"),
        rotated=read.number("qk_rope_head_dim"),
        value=read.number("v_head_dim"),
        rank=read.number("kv_lora_rank"),
    )


def _router(read: _Config, forward: Forward) -> Router:
    keys = read.family.config
    experts, top_k = read.number(keys.experts), read.number(keys.top_k)
    groups = best = 1
    if read.holds(forward.grouped):
        groups, best = read.number("n_group"), read.number("topk_group")
    if groups < 1 or experts % groups or not 0 < best <= groups:
        refuse(f"{experts} experts cannot be in {groups} groups, of which {best} are chosen")
    if not 0 < top_k <= best * (experts // groups):
        refuse(f"A token cannot choose {top_k} of {best * (experts // groups)} experts")
    return Router(
        top_k,
        groups,
        best,
        normalised=bool(read.said(forward.normalised)) if forward.normalised else True,
        factor=float(read.said(forward.scaled)) if forward.scaled else 1.0,
    )
