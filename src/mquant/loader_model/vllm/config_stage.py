"""What vLLM refuses of a config.json before vLLM builds a model, or while vLLM builds one.

Sources: transformers 5.19's config classes; `config/model.py`, and `config.py` and
`model_arch_config_convertor.py` of `transformers_utils/`, of vLLM 0.32.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from mquant.formulas import MOST_LAYERS, find
from mquant.loader_model.vllm.config_attributes import ATTRIBUTES
from mquant.loader_model.vllm.config_rope import check_rope
from mquant.loader_model.vllm.config_types import (
    check_types,
    is_integer,
    is_number,
    said,
    whole,
)
from mquant.loader_model.vllm.tensors import LoadRefused, Unknown
from mquant.loader_rows import Settings, VllmRows

_FILE: Final = "config.json"
_LENGTH: Final = 64
"""The length of context with which the real loader is asked."""
_LENGTHS: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_EXPERTS: Final = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
_TOP_K: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
)
_KINDS_OF_LAYER: Final = frozenset({"full_attention", "sliding_attention"})
"""The types of layer of which it is known what vLLM builds in families that name no types."""
_OTHER_KINDS: Final = frozenset(
    {
        "chunked_attention",
        "window_attention",
        "indexed_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "minimax_m3_sparse",
        "conv",
        "moe",
        "hybrid",
        "hybrid_sliding",
        "linear_attention",
    }
)
"""The other types of layer that transformers takes."""
_DTYPES: Final = frozenset(
    {
        "float16",
        "half",
        "bfloat16",
        "float32",
        "float",
        "float64",
        "double",
        "uint8",
        "int8",
        "int16",
        "short",
        "int32",
        "int",
        "int64",
        "long",
        "bool",
        "float8_e4m3fn",
        "float8_e5m2",
    }
)
"""The dtypes of torch that a config.json names."""
_UNMODELLED: Final = (
    "speculators_config",
    "llm_config",
    "thinker_config",
    "vision_config",
    "encoder_config",
    "decoder",
    "generator",
    "block_configs",
    "mrope_section",
    "xdrope_section",
    "dual_chunk_attention_config",
    "head_dtype",
    "mlp_layer_types",
    "hidden_size_per_head",
    "n_head_kv",
    "num_kv_heads",
    "multi_query_group_num",
    "num_attention_groups",
    "compress_ratios",
)
"""Keys with which vLLM does what is not told here."""


def check(settings: Settings, rows: VllmRows) -> None:
    """Raise LoadRefused if vLLM stops at config.json, and Unknown if it is not known.

    `rows` are those of the model that vLLM builds.
    """
    config, read_as = settings.config, settings.read_as
    _check_nesting(settings, rows)
    told = {*_typed(read_as), *read_as.settings}
    unknown = (key for key in _UNMODELLED if key not in told)
    _check_known(config, (*unknown, *rows.unmodelled, *read_as.unmodelled))
    for key, value in rows.fixed.items():
        if config.get(key, value) != value or type(config.get(key, value)) is not type(value):
            raise Unknown(f"{key} {said(config[key])}")
    check_types(config, read_as.types)
    _check_general(config)
    if rows is not read_as and rows.kinds_of_layer and config.get("layer_types") is None:
        raise Unknown("the layer_types that another model's config class makes")
    _check_layer_types(config, read_as, settings)
    stretch = check_rope(config, read_as, settings)
    _check_counts(config, read_as, settings)
    _check_length(config, stretch)
    _check_demands(config, rows)
    _check_model(rows, settings)


def _check_known(config: Mapping[str, Any], unmodelled: Iterable[str]) -> None:
    """Raise Unknown if there is a key with which it is not known what happens."""
    for key in unmodelled:
        if config.get(key) is not None:
            raise Unknown(f"{key} of config.json")
    if taken := [key for key in config if key in ATTRIBUTES or key.startswith("__")]:
        raise Unknown(f"{said(taken[0])} of config.json")


def _check_nesting(settings: Settings, rows: VllmRows) -> None:
    """Check the keys outside the table of the text model's keys, if there is a table."""
    config, around = settings.outer, settings.read_as.wrapped
    if around is None or not settings.nested:
        if settings.wrapping:
            raise LoadRefused(_FILE, f"says {config.get('model_type')}, a text model's model_type")
        for key in ("text_config", "llm_config"):
            if config.get(key) is not None:
                raise LoadRefused(_FILE, f"has a {key}, which vLLM takes for the model's config")
        return
    if not settings.wrapping and rows is not settings.read_as:
        # The class of the text model looks for the keys outside the table.
        raise LoadRefused(_FILE, f"has its keys in {around.key}, and names a text model's class")
    table = config.get(around.key)
    if table is not None and not isinstance(table, dict):
        raise LoadRefused(_FILE, f"says {around.key} {said(table)}, not a table")
    inner = (table or {}).get("model_type", "")
    if not isinstance(inner, str) or inner not in ("", *(around.text_types or (inner,))):
        raise Unknown(f"{around.key} of model_type {said(inner)}")
    if not config.get("architectures"):
        raise Unknown("config.json without architectures")
    _check_known(config, (key for key in _UNMODELLED if key not in (around.key, "vision_config")))
    for key in around.required:
        if config.get(key) is None:
            raise LoadRefused(_FILE, f"has no {key}")
    for key in around.unmodelled:
        if find(config, key):
            raise Unknown(f"{key} of config.json")
    check_types(config, around.types)
    _check_general(config)


def _check_general(config: Mapping[str, Any]) -> None:
    """Check the keys that every config class of transformers has."""
    auto_map = config.get("auto_map", {})
    if not isinstance(auto_map, dict | list | str):
        raise LoadRefused(_FILE, f"says auto_map {said(auto_map)}")
    dtype = config.get("dtype")
    dtype = config.get("torch_dtype") if dtype is None else dtype
    if isinstance(dtype, str):
        known = dtype in _DTYPES
    else:  # transformers takes the text after the point of anything else
        known = dtype is None or isinstance(dtype, dict | int) or "." in str(dtype)
    if not known:
        raise LoadRefused(_FILE, f"says the dtype {said(dtype)}, which torch does not have")
    _check_labels(config)
    if config.get("output_attentions") and config.get("attn_implementation") not in (None, "eager"):
        raise LoadRefused(_FILE, "says output_attentions without eager attention")
    layers = config.get("per_layer_config")
    if layers is not None:
        if isinstance(layers, dict):
            raise Unknown("per_layer_config of config.json")
        raise LoadRefused(_FILE, f"says per_layer_config {said(layers)}, not a table")
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise LoadRefused(_FILE, f"says quantization_config {said(quantization)}, not a table")
    pair = config.get("is_encoder_decoder", False)
    word = pair.lower() if isinstance(pair, str) else pair
    if word in (1, "1", "on", "t", "true", "y", "yes"):
        raise Unknown("is_encoder_decoder of config.json")
    if word not in (0, "0", "off", "f", "false", "n", "no"):
        raise LoadRefused(_FILE, f"says is_encoder_decoder {said(pair)}")


def _check_labels(config: Mapping[str, Any]) -> None:
    labels, count = config.get("id2label"), config.get("num_labels", 2)
    if labels is None:
        if not isinstance(count, int):
            raise LoadRefused(_FILE, f"says num_labels {said(count)}, not a whole number")
        labels = range(count if count < 2 else 2)
    elif not isinstance(labels, dict):
        raise LoadRefused(_FILE, f"says id2label {said(labels)}, not a table")
    elif "num_labels" in config and not isinstance(count, int):
        raise LoadRefused(_FILE, f"says num_labels {said(count)}, not a whole number")
    for number in labels:
        try:
            int(number)
        except ValueError:
            raise LoadRefused(_FILE, f"has the label {said(number)}, not a number") from None
    if config.get("problem_type") == "single_label_classification" and len(labels) == 1:
        raise LoadRefused(_FILE, "says single_label_classification of one label")


def _check_layer_types(config: Mapping[str, Any], rows: VllmRows, settings: Settings) -> None:
    """Check `layer_types`, which transformers reads in every family."""
    listed = settings.values.get("layer_types")
    if listed is not None or "layer_types" in _typed(rows):
        _check_mlp_types(config.get("mlp_layer_types"), settings)
    if listed is None:
        kinds = _windows(rows, settings)
    elif not isinstance(listed, list | dict | str):
        raise LoadRefused(_FILE, f"says layer_types {said(listed)}, not a list")
    elif len(listed) != settings.number("num_hidden_layers"):
        raise LoadRefused(_FILE, f"has {len(listed)} layer_types, and another number of layers")
    else:
        kinds = set()
        # A class with a pattern has types of its own.
        known = rows.kinds_of_layer if rows.pattern else _KINDS_OF_LAYER | _OTHER_KINDS
        for kind in map(str, listed):
            if kind not in known:
                raise LoadRefused(_FILE, f"has a layer of type {said(kind)}")
            if kind not in (rows.kinds_of_layer or _KINDS_OF_LAYER):
                raise Unknown(f"a layer of type {kind}")
            kinds.add(kind)
    if "sliding_attention" in kinds and rows.window and rows.window not in config:
        raise LoadRefused(_FILE, f"has sliding attention without {rows.window}")
    count = settings.number("num_hidden_layers")
    if rows.windowed_from and len(kinds) > 1 and settings.number(rows.windowed_from) != count:
        raise LoadRefused(_FILE, "has a sliding window for some layers only")


def _check_mlp_types(listed: list[str] | None, settings: Settings) -> None:
    """Check `mlp_layer_types`, which transformers reads only beside `layer_types`."""
    if listed is None:
        return
    if not {"dense", "sparse"}.issuperset(listed):
        raise LoadRefused(_FILE, f"says mlp_layer_types {said(listed)}")
    if len(listed) != settings.number("num_hidden_layers"):
        raise LoadRefused(_FILE, f"has {len(listed)} mlp_layer_types, not one for every layer")


def _windows(rows: VllmRows, settings: Settings) -> set[str]:
    """Return the types of layer that transformers derives from the sliding window."""
    values, first = settings.values, settings.number(rows.windowed_from)
    count = settings.number("num_hidden_layers")
    if first is None or count is None:
        return set()
    if not values.get("use_sliding_window") or values.get("sliding_window") is None:
        return {"full_attention"}
    full = {"full_attention"} if first > 0 else set()
    return full | ({"sliding_attention"} if first < count else set())


def _check_counts(config: Mapping[str, Any], rows: VllmRows, settings: Settings) -> None:
    """Check the counts that vLLM reads in every family, whether the family has experts or not."""
    values = settings.values
    names = [rows.aliases.get(key, key) for key in _EXPERTS]
    experts = next((values[key] for key in names if key in values), 0)
    if isinstance(experts, list):
        if not experts:
            raise LoadRefused(_FILE, "has an empty list of experts")
        experts = experts[0]
    count = whole("the number of experts", experts or 0)
    top = next((values[key] for key in _TOP_K if key in values), 0)
    if isinstance(top, list):
        if not all(map(is_number, top)):
            raise LoadRefused(_FILE, f"says top-k {said(top)}")
        top = max(top, default=0)
    whole("top-k", top or 0)
    window = config.get("sliding_window")
    if window is not None and "use_sliding_window" not in _typed(rows):
        whole("sliding_window", window)
    of_experts = (row.when for row in rows.layers if row.kind == "experts")
    layers = range(min(settings.number("num_hidden_layers") or 0, MOST_LAYERS))
    if count <= 0 and any(settings.has(when, layer) for when in of_experts for layer in layers):
        raise LoadRefused(_FILE, "says that there are no experts")


def _typed(rows: VllmRows) -> set[str]:
    return {key for keys in rows.types.values() for key in keys}


def _check_length(config: Mapping[str, Any], stretch: float) -> None:
    """Raise LoadRefused if the model's length is no number, or is shorter than what is asked."""
    lengths = {key: config[key] for key in _LENGTHS if config.get(key) is not None}
    for key, value in lengths.items():
        if not is_number(value):
            raise LoadRefused(_FILE, f"says {key} {said(value)}, not a number")
    named = lengths.get("model_max_length")
    length = named or min(lengths.values(), default=_LENGTH)
    # A whole number may be too large for a float.
    if min(length, 2**62) * stretch < _LENGTH and (named is None or named < _LENGTH):
        raise LoadRefused(_FILE, f"gives the model a length of {length * stretch}")


def _check_demands(config: Mapping[str, Any], rows: VllmRows) -> None:
    """Raise LoadRefused if a key has a value that vLLM's code of the model does not take."""
    for key, allowed in rows.demands.items():
        if key in config and config[key] not in allowed:
            raise LoadRefused(_FILE, f"says {key} {said(config[key])}, which vLLM does not take")
    for key in rows.tables:
        if not isinstance(config.get(key, {}), Mapping):
            raise LoadRefused(_FILE, f"says {key} {said(config[key])}, not a table")
    for key, items in rows.demands_of_items.items():
        value = config.get(key)
        if isinstance(value, list) and any(each not in items for each in value):
            raise LoadRefused(_FILE, f"says {key} {said(value)}, which vLLM does not take")


def _check_model(rows: VllmRows, settings: Settings) -> None:
    """Check the numbers by which vLLM divides and of which vLLM builds layers."""
    values = settings.values
    for part, whole_size in rows.divides:
        size, other = settings.size(part), settings.size(whole_size)
        if size is not None and other is not None and (not size or other % size):
            what = f"{whole_size} {other}, and {part}" if part.isdecimal() else f"{part} {size}"
            raise LoadRefused(_FILE, f"says {what}, which does not divide {whole_size}")
    for key, most in rows.below:
        low, high = settings.number(key), settings.number(most)
        if low is not None and high is not None and low >= high:
            raise LoadRefused(_FILE, f"says {key} {low}, which is not below {most}")
    for key in rows.numbers:
        if not is_integer(values.get(key)):
            raise LoadRefused(_FILE, f"says {key} {said(values.get(key))}, not a whole number")
    for key in rows.divisors:
        value = values.get(key)
        if not is_number(value) or not value:
            raise LoadRefused(_FILE, f"says {key} {said(value)}, and vLLM divides by {key}")
        of_layers = any(f"{key} divides" in text for text in rows.blocks.values())
        if of_layers and (not is_integer(value) or value < 0):
            raise Unknown(f"{key} {said(value)}")
    for key in rows.per_layer:
        _check_list(key, values, settings)
    for key in rows.positive:
        if values.get(key) is not None and not (is_integer(values[key]) and values[key]):
            raise Unknown(f"{key} {said(values.get(key))}")
    for key in rows.counts:
        value = values.get(key, 0)
        if not is_number(value):
            raise LoadRefused(_FILE, f"says {key} {said(value)}, not a number")
        if not is_integer(value) or value < 0:
            raise Unknown(f"{key} {said(value)}")
    later = values.get(rows.mtp)
    if later and not is_integer(later):
        if isinstance(later, bool):
            raise Unknown(f"{rows.mtp} {later}")
        raise LoadRefused(_FILE, f"says {rows.mtp} {said(later)}, not a whole number")
    _check_heads(rows, settings)
    for row in rows.layers:
        for text in (*row.rows, row.columns):
            for key in text.replace("+", " ").replace("*", " ").replace("/", " ").split():
                value = values.get(key)
                if isinstance(value, int) and value < 0:
                    raise LoadRefused(_FILE, f"says {key} {value}")


def _check_list(key: str, values: Mapping[str, Any], settings: Settings) -> None:
    """Raise LoadRefused if a key has no item for some layer."""
    found, count = values.get(key, 0), settings.number("num_hidden_layers") or 0
    if not is_number(found) and (not isinstance(found, list) or len(found) < count):
        raise LoadRefused(_FILE, f"says {key} {said(found)}, without an item for every layer")


def _check_heads(rows: VllmRows, settings: Settings) -> None:
    """Raise LoadRefused if the KV heads cannot be shared evenly, and Unknown of odd numbers."""
    if not any(row.kind == "attention" for row in rows.layers):
        return
    heads = settings.number("num_attention_heads") or 0
    groups = settings.number("num_key_value_heads")
    if settings.values.get("head_dim") == 0:
        raise Unknown("head_dim 0")
    if groups is None:
        return
    if groups < 0:
        raise Unknown(f"num_key_value_heads {groups}")
    if groups == 0 or heads % groups:
        raise LoadRefused(_FILE, f"has {heads} attention heads for {groups} KV heads")
