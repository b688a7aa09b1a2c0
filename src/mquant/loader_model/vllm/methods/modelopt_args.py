"""How vLLM 0.32 parses ModelOpt's quantization config, and which layers the config names.

The source is `quantization/modelopt.py`: the `from_config` of the four config classes,
`is_layer_excluded` and `_resolve_quant_algo`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import translate
from functools import cached_property
from itertools import takewhile
from typing import Any, Final

from mquant.loader_model.vllm.names import rename
from mquant.loader_model.vllm.tensors import LoadRefused, Unknown
from mquant.loader_rows import Renames

_WHERE: Final = "the quantization config"
_OWNED: Final[Mapping[str, tuple[str, ...]]] = {
    "modelopt": ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"),
    "modelopt_fp4": ("NVFP4", "W4A16_NVFP4"),
    "modelopt_mxfp8": ("MXFP8",),
}
LINEAR_ALGOS: Final = frozenset(algo for algos in _OWNED.values() for algo in algos)
_MIXED: Final = "MIXED_PRECISION"
BLOCK_FP8: Final = ("FP8_PB_WO", "FP8_BLOCK_SCALES")
BLOCK_CODECS: Final[Mapping[str, tuple[int, int]]] = {
    "IQ2_XS": (256, 74),
    "IQ2_XXS": (256, 66),
    "Q8_0": (32, 34),
}
"""GGML's formats, which MIXED_PRECISION may name -> values and bytes of a block."""
_FUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {
    "modelopt_fp4": ("group_size", "kv_cache_quant_algo", "exclude_modules"),
    "modelopt_mxfp8": ("kv_cache_quant_algo", "exclude_modules"),
}
"""The keys that `quantization` must have, by method."""
_CACHE_KEYS: Final = ("kv_cache_scheme", "kv_cache_quant_algo")
_MOST_NAMES: Final = 100_000
_MOST_GLOBS: Final = 2_000
_LONGEST: Final = 1_000


@dataclass(frozen=True)
class Names:
    """The names of a list such as `exclude_modules`, and how vLLM matches a layer against them."""

    entries: tuple[Any, ...]
    fused: Mapping[str, tuple[str, ...]]

    @cached_property
    def _strings(self) -> frozenset[str]:
        """The entries before the first that is no string, where vLLM stops."""
        return frozenset(takewhile(lambda entry: isinstance(entry, str), self.entries))

    @cached_property
    def _broken(self) -> bool:
        return not all(isinstance(entry, str) for entry in self.entries)

    @cached_property
    def _globs(self) -> tuple[re.Pattern[str], ...]:
        globs = [entry for entry in self._strings if not set("*?[").isdisjoint(entry)]
        if len(globs) > _MOST_GLOBS:
            raise Unknown(f"an ignore list with more than {_MOST_GLOBS:,} wildcards")
        return tuple(re.compile(translate(entry)) for entry in globs)

    def exclude(self, prefix: str) -> bool:
        """Return what vLLM's `is_layer_excluded` returns. Raises LoadRefused if vLLM stops."""
        if not self.entries:
            return False
        if self._skip(prefix):
            return True
        size = len(prefix)
        parts = (prefix[a:b] for a in range(size + 1) for b in range(a, size + 1))
        if any(part in self._strings for part in parts):
            return True
        if self._broken:
            raise LoadRefused(_WHERE, "excludes a module whose name is no string")
        return any(glob.match(prefix) for glob in self._globs)

    def _skip(self, prefix: str) -> bool:
        """Return what vLLM's `is_layer_skipped` returns for exact names."""
        last = prefix.rpartition(".")[2]
        if last not in self.fused:
            if "experts" in prefix:
                return any(prefix in entry for entry in self._strings)
            return prefix in self._strings
        if prefix in self._strings:
            return True
        shards = {prefix.replace(last, shard) in self._strings for shard in self.fused[last]}
        if len(shards) > 1:
            raise LoadRefused(prefix, "has parts that are excluded and parts that are not")
        return shards == {True}


@dataclass(frozen=True)
class Arguments:
    """A ModelOpt config as vLLM keeps the config.

    `algo` is the algorithm of all layers, or MIXED_PRECISION, with an algorithm for each entry of
    `layers`. `group_size` is any value of JSON in a mixed config. `exclude` has names of layers
    that are not quantized. `cache`: whether the KV cache has an algorithm; `cache_fp4`: whether
    vLLM keeps the cache in NVFP4. `block`: the rows, and the columns, that share a scale in a mixed
    config's experts in FP8.
    """

    algo: str
    group_size: Any
    exclude: tuple[Any, ...]
    cache: bool
    cache_fp4: bool
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    block: int = 128

    @property
    def mixed(self) -> bool:
        """Whether each layer has an algorithm of its own."""
        return self.algo == _MIXED

    def renamed(self, renames: Renames) -> "Arguments":
        """Return the config after the model's mapper renamed its names."""
        if not all(isinstance(entry, str) for entry in self.exclude):
            raise LoadRefused(_WHERE, "excludes a module whose name is no string")
        names = (part for entry in self.exclude for part in _split(entry))
        exclude = tuple(rename(name, renames) for name in names)
        layers = {rename(name, renames) or name: info for name, info in self.layers.items()}
        return replace(self, exclude=exclude, layers=layers)

    def algo_of(self, prefix: str, fused: Mapping[str, tuple[str, ...]]) -> str | None:
        """Return the algorithm of a layer in a mixed config. Raises LoadRefused if vLLM stops."""
        candidates = list(_candidates(prefix))
        for name in candidates:
            if name in self.layers:
                return self._algo(name)
        base, _, last = prefix.rpartition(".")
        if last in fused:
            parents = _candidates(base or prefix)
            shards = [f"{parent}.{part}" for parent in parents for part in fused[last]]
            if algo := self._common(prefix, shards):
                return algo
        for name in candidates:
            if name in self._parents:
                return self._algo(self._parents[name])
        if prefix.endswith(".experts"):
            parent = prefix.rsplit(".experts", 1)[0]
            if parent in self._parents:
                return self._algo(self._parents[parent])
        for name in candidates if last in _FUSED else ():
            parent = name.rpartition(".")[0] or name
            if algo := self._common(prefix, [f"{parent}.{part}" for part in _FUSED[last]]):
                return algo
        return None

    @cached_property
    def _parents(self) -> Mapping[str, str]:
        """The modules above the entries of `layers` -> the first entry below."""
        parents: dict[str, str] = {}
        for name in self.layers:
            for dot in re.finditer(r"\.", name):
                parents.setdefault(name[: dot.start()], name)
        return parents

    def _algo(self, name: str) -> str:
        algo = self.layers[name].get("quant_algo")
        if algo is None:
            raise LoadRefused(_WHERE, f"has no quant_algo for {name}")
        return str(algo).upper()

    def _common(self, prefix: str, names: list[str]) -> str | None:
        algos = {self._algo(name) for name in names if name in self.layers}
        if len(algos) > 1:
            raise LoadRefused(prefix, f"has parts in {' and '.join(sorted(algos))}")
        return next(iter(algos), None)


def read(method: str, config: Mapping[str, Any]) -> Arguments:
    """Parse a config as vLLM's class of the method does. Raises LoadRefused if vLLM stops."""
    method = "modelopt_mxfp8" if method == "mxfp8" else method
    cache_fp4 = _cache_in_fp4(config)
    if method == "modelopt_mxfp8" and "quantization" not in config and not config.get("quant_algo"):
        config = {
            "quantization": {
                "quant_algo": "MXFP8",
                "kv_cache_quant_algo": config.get("kv_cache_quant_algo"),
                "exclude_modules": config.get("ignored_layers") or [],
            }
        }
    nested = "quantization" in config
    values = config["quantization"] if nested else config
    if not isinstance(values, Mapping):
        raise LoadRefused(_WHERE, "has a `quantization` that is no table")
    cache = values.get("kv_cache_quant_algo") if nested else _scheme(config)
    if cache is not None and not isinstance(cache, str):
        raise LoadRefused(_WHERE, "has a kv_cache_quant_algo that is no text")
    exclude = values.get("exclude_modules" if nested else "ignore", [])
    if not isinstance(exclude, list):
        raise LoadRefused(_WHERE, "has a list of excluded modules that is no list")
    group_size = _integer(values.get("group_size"))
    if not (algo := values.get("quant_algo")):
        raise LoadRefused(_WHERE, "has no quant_algo")
    algo = str(algo).upper()
    if method == "modelopt_mixed":
        if algo not in LINEAR_ALGOS | {_MIXED}:
            raise LoadRefused(_WHERE, f"has the quant_algo {algo}")
        layers = _layers(values.get("quantized_layers", {}))
        group_size = _mixed_group(layers) if group_size is None else group_size
        algo = _MIXED
    else:
        if algo not in _OWNED[method]:
            raise LoadRefused(_WHERE, f"has the quant_algo {algo}, which {method} does not know")
        missing = [key for key in _REQUIRED.get(method, ()) if nested and key not in values]
        if missing:
            raise LoadRefused(_WHERE, f"has no {', '.join(missing)} in `quantization`")
        if algo == "NVFP4" and _weights_only(config.get("config_groups")):
            algo = "W4A16_NVFP4"
        layers = {}
    names = [*exclude, *layers]
    if len(names) > _MOST_NAMES or any(isinstance(n, str) and len(n) > _LONGEST for n in names):
        raise Unknown("a quantization config with so many, or so long, names of modules")
    group_size = 16 if group_size is None else group_size
    block = _block(layers)
    return Arguments(algo, group_size, tuple(exclude), bool(cache), cache_fp4, layers, block)


def _scheme(config: Mapping[str, Any]) -> str | None:
    """Return the KV cache's algorithm by `kv_cache_scheme`, as a flat config has it."""
    scheme = config.get("kv_cache_scheme")
    if not isinstance(scheme, Mapping):
        return None
    eight = scheme.get("type") == "float" and scheme.get("num_bits") == 8
    return "FP8" if eight else None


def _cache_in_fp4(config: Mapping[str, Any]) -> bool:
    """Return whether vLLM's engine keeps the KV cache in NVFP4: it reads every key itself."""
    inner = config.get("quantization", config)
    if not str(config.get("quant_method", "")).startswith("modelopt"):
        return False
    tables = [each for each in (inner, config) if isinstance(each, Mapping)]
    values = [table.get(key) for key in _CACHE_KEYS for table in tables]
    cache = next((value for value in values if value), None)
    if isinstance(cache, Mapping):
        return cache.get("num_bits") == 4 and cache.get("type") == "float"
    return isinstance(cache, str) and cache.lower() == "nvfp4"


def _integer(value: Any) -> int | None:
    """Return a group size as vLLM reads it: also from a text, or a number that is not whole."""
    if value is None or isinstance(value, int):
        return value
    if not isinstance(value, str | float):
        raise LoadRefused(_WHERE, "has a group_size that is no number")
    try:
        return int(value)
    except (ValueError, OverflowError):
        raise LoadRefused(_WHERE, "has a group_size that is no number") from None


def _weights_only(groups: Any) -> bool:
    """Return whether every one of `config_groups` has no input_activations."""
    return (
        isinstance(groups, Mapping)
        and bool(groups)
        and all(
            isinstance(group, Mapping) and group.get("input_activations") is None
            for group in groups.values()
        )
    )


def _layers(layers: Any) -> Mapping[str, Mapping[str, Any]]:
    """Return `quantized_layers` after vLLM's checks."""
    if not layers or not isinstance(layers, Mapping):
        raise LoadRefused(_WHERE, "has no quantized_layers")
    for name, info in layers.items():
        if not isinstance(info, Mapping) or not isinstance(info.get("quant_algo", ""), str):
            raise LoadRefused(_WHERE, f"has no quant_algo for {name}")
        algo = info.get("quant_algo", "").upper()
        if block := BLOCK_CODECS.get(algo):
            facts = (info.get("group_size"), info.get("block_payload_bytes"), info.get("packing"))
            if facts != (*block, "ggml"):
                raise LoadRefused(_WHERE, f"has blocks of {algo} for {name} that vLLM cannot read")
    return layers


def _block(layers: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the one group size of all layers in blocks of FP8."""
    blocks = [info for info in layers.values() if info.get("quant_algo", "").upper() in BLOCK_FP8]
    sizes = {_integer(info.get("group_size", 128)) for info in blocks}
    if len(sizes) > 1 or None in sizes:
        raise LoadRefused(_WHERE, "has no one group_size for blocks of FP8")
    return next((size for size in sizes if size is not None), 128)


def _mixed_group(layers: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return the group size of the first layer in NVFP4."""
    for info in layers.values():
        if info.get("quant_algo", "").upper() in _OWNED["modelopt_fp4"]:
            return info.get("group_size", 16)
    return None


def _split(entry: str) -> tuple[str, ...]:
    """Return the two entries that vLLM makes of `module*`: the module, and everything below."""
    if len(entry) >= 2 and entry[-1] == "*" and entry[-2] != ".":
        return entry[:-1], entry[:-1] + ".*"
    return (entry,)


def _candidates(prefix: str) -> Iterator[str]:
    """Yield the names under which `quantized_layers` may have a layer."""
    yield prefix
    if prefix.endswith(".lm_head"):
        yield "lm_head"
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("model.language_model.", "language_model.model."),
    ):
        if prefix.startswith(old):
            yield new + prefix.removeprefix(old)
            return
