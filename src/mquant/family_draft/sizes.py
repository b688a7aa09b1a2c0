"""Sizes as sums and products of config.json's keys, the likeliest first."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Final

from mquant.family_rows import Role

_NO_SIZE: Final = re.compile(
    r".*(_id|_ids|position_embeddings|_window|_layers|_per_tok|dropout|_freq|_interval|_step"
    r"|theta|topk|top_k|eps|length|_len|pretraining_tp)$|.*(replace|nextn|context|version).*"
)
_COUNT: Final = re.compile(r"(num_|n_).*|.*(num|_heads|_groups|experts)(_.*)?")
_DIMENSION: Final = re.compile(r".*(dim|size|rank|_per_head)(_.*)?")
_SYNONYMS: Final[Mapping[str, str]] = {
    "q_proj": "num_attention_heads head_dim qk",
    "o_proj": "num_attention_heads head_dim v",
    "k_proj": "key_value head_dim",
    "v_proj": "key_value head_dim",
    "q_norm": "head_dim",
    "k_norm": "key_value head_dim",
    "layernorm": "hidden",
    "norm": "hidden",
}
_BY_ROLE: Final[Mapping[Role, str]] = {
    Role.EMBEDDING: "vocab",
    Role.HEAD: "vocab",
    Role.ROUTER: "experts",
    Role.ROUTING_BIAS: "experts",
    Role.EXPERT: "moe intermediate ffn",
    Role.SHARED_EXPERT: "shared moe intermediate",
    Role.MLP: "intermediate ffn inner",
    Role.ATTENTION: "heads head_dim rank",
    Role.LINEAR_ATTENTION: "linear key value conv",
    Role.MAMBA: "mamba ssm state conv expand",
    Role.INDEXER: "index",
}


@dataclass
class Sizes:
    """The keys of config.json that sizes may refer to, with their numbers.

    `hidden` is the key of the hidden size; `stated` are the keys that config.json has itself.
    """

    keys: dict[str, int]
    hidden: str
    _products: dict[int, list[str]] = field(default_factory=dict)
    _sums: dict[int, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Compute all products and sums once."""
        for text, value in self._all_products():
            self._products.setdefault(value, []).append(text)
        for text, value in self._all_sums():
            self._sums.setdefault(value, []).append(text)

    def _all_products(self) -> Iterator[tuple[str, int]]:
        for count, number, dim, value in self._pairs():
            yield f"{count} * {dim}", number * value
            yield f"{count} * {dim} * 2", number * value * 2
        for key, value in self.keys.items():
            if "intermediate" in key:  # shared experts are one wide expert
                counts = [k for k in self.keys if "shared" in k and _COUNT.fullmatch(k)]
                yield from ((f"{key} * {count}", value * self.keys[count]) for count in counts)
            if "vocab" not in key:
                yield from ((f"{key} * {factor}", value * factor) for factor in (2, 3, 4))

    def _pairs(self) -> list[tuple[str, int, str, int]]:
        """Return the counts of heads and the sizes of heads: every pair, with their numbers."""
        counts = {key: value for key, value in self.keys.items() if _COUNT.fullmatch(key)}
        dims = {
            key: value
            for key, value in self.keys.items()
            if _DIMENSION.fullmatch(key) and key not in counts and key != self.hidden
            if not re.search("intermediate|vocab|ffn", key)
        }
        return [(c, n, d, v) for c, n in counts.items() for d, v in dims.items()]

    def _all_sums(self) -> Iterator[tuple[str, int]]:
        pairs = self._pairs()
        dims = {dim: value for _, _, dim, value in pairs}
        for (one, first), (two, second) in combinations(dims.items(), 2):
            yield f"{one} + {two}", first + second
        products = [(f"{count} * {dim}", number * value) for count, number, dim, value in pairs]
        for (one, first), (two, second) in combinations(products, 2):
            yield f"{one} + {two}", first + second
            yield f"{one} * 2 + {two}", first * 2 + second
            yield f"{one} + {two} * 2", first + second * 2
            yield f"{one} * 2 + {two} * 2", first * 2 + second * 2

    def of(self, value: int, role: Role, name: str, place: int) -> tuple[str, list[str]]:
        """Return the likeliest size of a side, and other sizes that are as likely.

        The size is a number if no key gives it. `place` is 0 for rows, 1 for columns.
        """
        single = [key for key, number in self.keys.items() if number == value]
        texts = [*single, *self._products.get(value, ()), *self._sums.get(value, ())]
        if value == 1:
            return "1", []
        scored = sorted((self._cost(text, role, name, place), text) for text in texts)
        if not scored:
            return str(value), []
        best, text = scored[0]
        return text, [other for cost, other in scored[1:4] if cost <= best]

    def _cost(self, text: str, role: Role, name: str, place: int) -> int:
        """Return how unlikely a size is: long, and with no word that suits the tensor."""
        short = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        words = f"{_BY_ROLE.get(role, '')} {_SYNONYMS.get(short.rpartition('_layer')[2], '')} "
        words += "hidden" if "norm" in short and short not in _SYNONYMS else ""
        cost = 2 * (len(text.split(" ")) - 1) + 4 * text.count(" + ")
        hits = {word for word in words.split() if word in text}
        cost -= 3 * len(hits)
        # A matrix that reads the residual stream has its columns; one that writes it, its rows.
        writes = re.search(r"^(o_proj|down_proj|w2|wo|out_proj|dense|fc2|c_proj)$", short)
        if "vocab" in text and role not in (Role.EMBEDDING, Role.HEAD):
            cost += 20
        if "intermediate" in text and role in (Role.ATTENTION, Role.LINEAR_ATTENTION, Role.NORM):
            cost += 8
        streams = self.hidden if (place == 0) == bool(writes) else ""
        if role in (Role.EMBEDDING, Role.HEAD, Role.ROUTER):
            streams = self.hidden if place == 1 else ""
        if streams and text == self.hidden:
            cost -= 12
        # A key of one kind of layers says nothing about another kind.
        for word in ("linear", "mamba", "index", "vision", "shared", "moe", "lora", "mtp"):
            if word in text and word not in f"{role.value} {name} {words}":
                cost += 9
        if role is Role.LINEAR_ATTENTION or "linear_attn" in name:
            keys = re.findall(r"[A-Za-z_]\w*", text)
            cost += 6 * sum("linear" not in key and key != self.hidden for key in keys)
        return cost + 12 * (f"{self.hidden} *" in text)


def size_keys(settings: Mapping[str, Any], defaults: Mapping[str, int]) -> dict[str, int]:
    """Return the keys of config.json whose numbers may be sizes; `defaults` are further keys."""
    numbers = {
        key: value
        for key, value in {**defaults, **settings}.items()
        if type(value) is int and 1 < value < 10_000_000 and not _NO_SIZE.fullmatch(key)
        if re.fullmatch(r"[A-Za-z_]\w*", key)
    }
    counts = {key: settings[key] for key in settings if re.fullmatch(r"(n|num)_.*experts?", key)}
    return {**numbers, **{key: n for key, n in counts.items() if type(n) is int and n > 0}}
