"""quant_method compressed-tensors in vLLM: which layers are quantized, and how.

The source is vLLM 0.32's `compressed_tensors.py`, with compressed-tensors 0.17's classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.layers import Attention, Embedding, Linear
from mquant.loader_model.vllm.methods.compressed_tensors_args import (
    QuantizationArgs,
    SparsityConfig,
    TransformConfig,
    table,
    validated,
)
from mquant.loader_model.vllm.methods.compressed_tensors_experts import expert_parameters
from mquant.loader_model.vllm.methods.compressed_tensors_names import Patterns
from mquant.loader_model.vllm.methods.compressed_tensors_schemes import (
    Mismatch,
    Scheme,
    embedding_parameters,
    is_weight_only,
    linear_parameters,
    quantizes_activations,
)
from mquant.loader_model.vllm.names import rename
from mquant.loader_model.vllm.tensors import MODEL_DTYPE, LoadRefused, Parameter, Unknown
from mquant.loader_rows import Renames

_EXPERTS: Final = "RoutedExperts"
_CLASSES: Final = frozenset(
    {
        "QKVParallelLinear",
        "MinimaxM3QKVParallelLinearWithIndexer",
        "MergedColumnParallelLinear",
        "ColumnParallelLinear",
        "RowParallelLinear",
        "ReplicatedLinear",
        "GateLinear",
        "DeepSeekV2FusedQkvAProjLinear",
        "VocabParallelEmbedding",
        "ParallelLMHead",
        _EXPERTS,
    }
)

_CACHE_STRATEGIES: Final = ("tensor", "attn_head")


@dataclass
class CompressedTensors:
    """A quantization config of compressed-tensors, as vLLM parses it.

    `heads` are the numbers of query heads and KV heads; 0 where vLLM does not know the numbers.
    """

    kind = "compressed-tensors"
    schemes: dict[str, Scheme]
    ignore: Sequence[str]
    cache: object
    heads: tuple[int, int]
    fused: Mapping[str, tuple[str, ...]]
    renames: Renames | None = None
    asked: frozenset[str] = frozenset()
    suffixes: tuple[tuple[str, str], ...] = ()
    _names: tuple[Patterns, Patterns] | None = None

    @classmethod
    def parse(cls, config: Mapping[str, Any], total_heads: int, total_kv_heads: int) -> Self:
        """Parse a quantization config. Raises LoadRefused where vLLM stops, and Unknown."""
        schemes = _schemes(config)
        sparsity, transforms = config.get("sparsity_config"), config.get("transform_config")
        if sparsity and validated(SparsityConfig, sparsity, "sparsity_config").targets:
            raise LoadRefused("config.json", "has a sparsity_config, and vLLM takes none")
        if transforms and validated(TransformConfig, transforms, "transform_config").online:
            raise Unknown("transforms of activations")
        heads = (total_heads, total_kv_heads) if "config_groups" in config else (0, 0)
        ignore = _strings(config.get("ignore", []), "ignore")
        return cls(schemes, ignore, config.get("kv_cache_scheme"), heads, {})

    def linear(self, layer: Linear) -> Iterable[Parameter] | None:
        """Return the parameters of a linear layer; None for a plain one."""
        scheme = self._scheme(layer.prefix, layer.class_name)
        return None if scheme is None else linear_parameters(scheme, layer)

    def embedding(self, layer: Embedding, *, head: bool) -> Iterable[Parameter] | None:
        """Return the parameters of the embeddings, or of the head; None for plain ones."""
        scheme = self._scheme(layer.prefix, layer.class_name)
        if scheme is None:
            return None
        if head:
            try:
                return linear_parameters(scheme, layer)
            except Mismatch:
                pass  # vLLM goes on as if the head were embeddings
        if scheme.weights.type != "int" or not is_weight_only(replace(scheme, inputs=None)):
            raise LoadRefused(
                layer.name, "is quantized in a way that vLLM does not take embeddings"
            )
        return embedding_parameters(scheme.weights, layer)

    def experts(self, layer: Experts) -> Iterable[Parameter] | None:
        """Return the parameters of the experts of a layer; None for plain ones."""
        if "Linear" in self.schemes and _EXPERTS not in self.schemes:
            self.schemes[_EXPERTS] = self.schemes["Linear"]
            self._names = None
        gate, down, up = (
            self._scheme(f"{layer.prefix}.0.{name}", _EXPERTS) for name in layer.asked
        )
        if not gate == up == down:
            raise LoadRefused(layer.name, "has matrices of different schemes")
        return None if down is None else expert_parameters(down, layer)

    def attention(self, layer: Attention, kv_heads: int) -> Iterable[Parameter]:
        """Return the scales of the KV cache, which no checkpoint must have."""
        if layer.class_name != "Attention":
            return ()
        per_head = self._cache_strategy() == "attn_head"
        count = kv_heads if per_head else 1
        layer.per_head = self.heads if per_head else None
        return [
            Parameter(f"{which}_{end}", dtype, (count,), optional=True)
            for end, dtype in (("scale", "F32"), ("zero_point", MODEL_DTYPE))
            for which in "kvq"
        ]

    def _cache_strategy(self) -> object:
        if self.cache is None:
            return None
        cache = table(self.cache, "kv_cache_scheme")
        strategy = cache.get("strategy")
        if cache.get("type") != "float" or cache.get("num_bits") != 8:
            raise LoadRefused("config.json", "has a kv_cache_scheme that is not FP8")
        if strategy not in _CACHE_STRATEGIES:
            raise LoadRefused("config.json", f"has a kv_cache_scheme of strategy {strategy!r:.80}")
        if not cache.get("symmetric"):
            raise LoadRefused("config.json", "has a kv_cache_scheme that is not symmetric")
        return strategy

    def _scheme(self, name: str, class_name: str) -> Scheme | None:
        """Return the scheme of the first target that matches; None for a plain layer."""
        ignore, targets = self._names or self._compile()
        if self._ignores(ignore, name):
            return None
        target = (
            targets.first(name)
            or self._of_parts(targets, name)
            or targets.first_in_class(class_name)
        )
        return None if target is None else self.schemes[target]

    def _ignores(self, ignore: Patterns, name: str) -> bool:
        """Return whether a layer is ignored. Raises LoadRefused if only some parts of it are."""
        if ignore.any(name):
            return True
        last = name.rpartition(".")[2]
        parts = [ignore.any(name.replace(last, part)) for part in self.fused.get(last, ())]
        if any(parts) and not all(parts):
            raise LoadRefused(name, "is fused of matrices of which ignore names only some")
        return bool(parts) and all(parts)

    def _of_parts(self, targets: Patterns, name: str) -> str | None:
        """Return the target of a fused layer's first part, if each part has a target."""
        fused = next((key for key in self.fused if name.endswith(key)), None)
        if fused is None:
            return None
        found = [targets.first(name.replace(fused, part)) for part in self.fused[fused]]
        return found[0] if all(found) else None

    def _compile(self) -> tuple[Patterns, Patterns]:
        """Take vLLM's names for the config's, once vLLM's model class is known."""
        self.schemes = {self._renamed(target): each for target, each in self.schemes.items()}
        self.ignore = [self._renamed(entry) for entry in self.ignore]
        self.renames = None
        parts = {
            name.replace(fused, part)
            for name in self.asked
            for fused, parts in self.fused.items()
            if name.endswith(fused)
            for part in parts
        }
        names = self.asked | parts | _CLASSES
        self._names = Patterns(self.ignore, names), Patterns(list(self.schemes), names)
        return self._names

    def _renamed(self, name: str) -> str:
        if "." in name and not name.startswith("re:"):
            return rename(name, self.renames or ()) or name
        return name


def _schemes(config: Mapping[str, Any]) -> dict[str, Scheme]:
    """Return the scheme of each target, in the order of the targets."""
    groups = table(config["config_groups"], "config_groups") if "config_groups" in config else {}
    schemes: dict[str, Scheme] = {}
    kept = []
    for name, value in groups.items():
        group = table(value, f"config_groups.{name}")
        targets = _strings(group.get("targets"), f"config_groups.{name}.targets")
        # vLLM quantizes attention by kv_cache_scheme, not by a group of its own.
        if not (len(targets) == 1 and targets[0].endswith("Attention")):
            kept.append((f"config_groups.{name}", group, targets))
    for name, group, targets in kept:
        if targets:
            scheme = _group(group, name, config.get("format"))
            schemes.update(dict.fromkeys(targets, scheme))
    return schemes


def _group(group: Mapping[str, Any], name: str, default: object) -> Scheme:
    weights = validated(QuantizationArgs, group.get("weights"), f"{name}.weights")
    if weights.actorder in ("group", "dynamic"):
        raise LoadRefused(
            "config.json", f"has actorder {weights.actorder}, which vLLM does not take"
        )
    own = group.get("format")
    form = default if own is None else own
    inputs = outputs = None
    if value := group.get("input_activations"):
        inputs = validated(QuantizationArgs, value, f"{name}.input_activations")
    elif quantizes_activations(form) and weights.type != "float":
        raise LoadRefused(
            "config.json", f"has format {form} and a {name} without input_activations"
        )
    if value := group.get("output_activations"):
        outputs = validated(QuantizationArgs, value, f"{name}.output_activations")
    return Scheme(weights, inputs, outputs, form)


def _strings(value: object, key: str) -> list[str]:
    """Return the entries of a list; vLLM takes a text's characters, and a table's keys."""
    if not isinstance(value, list | str | dict) or not all(isinstance(each, str) for each in value):
        raise LoadRefused("config.json", f"has a bad list {key}")
    return list(value)
