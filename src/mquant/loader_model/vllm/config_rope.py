"""The rotary embedding: what transformers and vLLM refuse of its config keys.

The sources are transformers 5.19's `modeling_rope_utils.py` and vLLM 0.32's `rotary_embedding/`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mquant.formulas import holds
from mquant.loader_model.vllm.config_longrope import LONGEST, check_longrope, check_only_longrope
from mquant.loader_model.vllm.config_types import is_integer, is_number, said
from mquant.loader_model.vllm.tensors import LoadRefused, Unknown
from mquant.loader_rows import Settings, VllmRows

_FILE: Final = "config.json"
_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
"""The keys that transformers wants for each type of scaling."""
_FROM_LENGTH: Final = ("llama3", "yarn", "longrope")
"""The types that know the length before scaling, which is the model's length without the key."""
_DEEPSEEK: Final = ("deepseek_yarn", "deepseek_llama_scaling")
_UNSCALED_LENGTH: Final = (*_FROM_LENGTH, *_DEEPSEEK)
_UNMODELLED: Final = ("mrope", "bailing_mrope", "openpangu", "mllama4")
_OTHERS: Final = frozenset({"rotary_emb_base", "rotary_pct", "rotary_emb_fraction"})
_LEAST_ODD_HEAD: Final = 5


def check_rope(config: Mapping[str, Any], rows: VllmRows, settings: Settings) -> float | int:
    """Check the rotary embedding; return the factor by which it stretches the model's length.

    Raises LoadRefused if transformers or vLLM stops, and Unknown.
    """
    if rows.rope.each:
        tables = _tables(config, rows, settings)
        return max((_check_table(table, rows, settings) for table in tables), default=1.0)
    return _check_table(_parameters(config, rows, settings), rows, settings)


def _check_table(params: dict[str, Any], rows: VllmRows, settings: Settings) -> float | int:
    """Check one table of parameters; return the factor by which it stretches the length."""
    kind = params["rope_type"]
    if rows.rope.longrope == "only":
        kind = check_only_longrope(params, settings)
    _check_by_transformers(params, kind, rows, settings)
    _check_head(params, settings)
    stretch = 1.0
    if kind not in _UNSCALED_LENGTH and rows.rope.stretches:
        stretch = params.get("factor", 1.0)
        if stretch is None:
            stretch = 1.0
        if not is_number(stretch):
            raise LoadRefused(_FILE, f"says the rotary factor {said(stretch)}, not a number")
    if kind in _DEEPSEEK or (rows.rope.scaled == "deepseek" and kind != "default"):
        kind = "deepseek"
    if rows.rope.scaled == "yarn":
        kind = "yarn"
        _numbers(params, "beta_fast", "beta_slow")
    built = rows.rope.built
    if isinstance(built, str):
        built = holds(built, None, settings.values, settings.number)
    if built and settings.number("num_hidden_layers"):
        if rows.rope.rotates and "partial_rotary_factor" not in params:
            raise LoadRefused(_FILE, f"says no {rows.rope.rotates}")
        _check_by_vllm(params, kind, rows, settings)
    return stretch


def _parameters(config: Mapping[str, Any], rows: VllmRows, settings: Settings) -> dict[str, Any]:
    """Return the parameters as transformers puts them into `rope_parameters`."""
    if other := sorted(_OTHERS & config.keys()):
        raise Unknown(f"{other[0]} of config.json")
    scaling = config.get("rope_scaling")
    if scaling and not isinstance(scaling, dict):
        raise LoadRefused(_FILE, f"says rope_scaling {said(scaling)}, not a table")
    params = dict(scaling or config.get("rope_parameters") or rows.rope.default)
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list) and any(key in layer_types for key in params):
        raise Unknown("rope_parameters for each type of layer")
    if "full_attention" in params or "sliding_attention" in params:
        raise Unknown("rope_parameters for each type of layer")
    params.setdefault("rope_theta", config.get("rope_theta", rows.rope.theta))
    bases, layers = params["rope_theta"], settings.number("num_hidden_layers") or 0
    if rows.rope.by_layer and isinstance(bases, list):
        if len(bases) < layers or not all(map(is_number, bases[:layers])):
            raise LoadRefused(_FILE, f"says rope_theta {said(bases)}, not a number for each layer")
        params["rope_theta"] = bases[0]
    if "mrope_section" in params and not rows.rope.sections:
        raise Unknown("mrope_section of config.json")
    share = _share(config, rows, settings)
    if share is not None:
        params.setdefault("partial_rotary_factor", share)
    return _standard(params, rows, settings)


def _tables(
    config: Mapping[str, Any], rows: VllmRows, settings: Settings
) -> Iterator[dict[str, Any]]:
    """Yield the parameters of each type of layer that the model has."""
    rope, given = rows.rope, config.get("rope_parameters")
    tables: dict[str, Any] = dict(rope.each if given is None else given)
    for kind, usual in rope.each.items():
        table = tables.get(kind)
        if table is None and not rope.bases:
            raise Unknown(f"rope_parameters without {kind}")
        if table is not None and not isinstance(table, Mapping):
            raise LoadRefused(_FILE, f"says rope_parameters of {kind} {said(table)}, not a table")
        known = usual if given is None else {} if rope.bases else {"rope_theta": None}
        tables[kind] = {**known, **(table or {})}
    for key, kind in rope.bases.items():
        if given is not None and "rope_theta" in tables[kind]:
            continue
        tables[kind]["rope_theta"] = config.get(key, rope.each[kind]["rope_theta"])
    scaling = config.get("rope_scaling")
    if not rope.bases and "rope_scaling" in config and (scaling is not None or given is None):
        raise Unknown("rope_scaling of a model with rope_parameters for each type of layer")
    if scaling is not None:
        if not isinstance(scaling, dict):
            raise LoadRefused(_FILE, f"says rope_scaling {said(scaling)}, not a table")
        if given is not None and not isinstance(given.get("full_attention"), dict):
            raise LoadRefused(_FILE, "has rope_scaling, and no full_attention in rope_parameters")
        tables["full_attention"] |= scaling
    listed = config.get("layer_types")
    for kind in rope.each:
        if not isinstance(listed, list) or kind in listed:
            yield _standard(tables[kind], rows, settings)


def _standard(params: dict[str, Any], rows: VllmRows, settings: Settings) -> dict[str, Any]:
    """Return the parameters with `rope_type`, as transformers names it."""
    legacy = params.get("type", "default")
    kind = params.setdefault("rope_type", legacy)
    if "type" in params and kind != legacy:
        raise LoadRefused(_FILE, f"says rope_type {said(kind)} and type {said(legacy)}")
    if kind == "mrope" and "mrope_section" not in params:
        raise LoadRefused(_FILE, "says rope_type mrope without mrope_section")
    if rows.rope.longrope != "only":
        if kind in _UNMODELLED or (rows.rope.scaled and not isinstance(kind, str)):
            raise Unknown(f"rope_type {said(kind)}")
        if kind == "su":
            kind = params["rope_type"] = "longrope"
    if kind in _FROM_LENGTH and rows.rope.mixed_in:
        length = settings.values.get("max_position_embeddings")
        params.setdefault("original_max_position_embeddings", length)
    return params


def _share(config: Mapping[str, Any], rows: VllmRows, settings: Settings) -> Any:
    """Return the part of a head that is rotated; None if no key says it."""
    key = rows.rope.rotates
    rotated = config.get(key) if key else None
    if not rows.rope.mixed_in and config.get("partial_rotary_factor", 1.0) is None:
        raise Unknown("partial_rotary_factor null")
    if rotated is None:
        return config.get("partial_rotary_factor", rows.rope.share)
    head = settings.number("head_dim")
    if not is_number(rotated) or not head:
        raise LoadRefused(_FILE, f"says {key} {said(rotated)} and head_dim {head}")
    return config.get("partial_rotary_factor", rotated / head)


def _check_by_transformers(
    params: dict[str, Any], kind: Any, rows: VllmRows, settings: Settings
) -> None:
    """Raise LoadRefused if transformers' checks of a type of scaling fail."""
    if rows.rope.longrope == "factors" and kind != "default":
        _numbers(params, "short_mscale", "long_mscale")
    for key in _REQUIRED.get(kind, ()) if isinstance(kind, str) else ():
        if key not in params:
            raise LoadRefused(_FILE, f"says rope_type {kind} without {key}")
    if kind == "longrope" and not rows.rope.longrope:
        raise Unknown("rope_type longrope")
    key = "original_max_position_embeddings"
    if kind in _FROM_LENGTH:
        if not rows.rope.mixed_in and key not in params:
            raise LoadRefused(_FILE, f"says rope_type {kind} without {key}")
        if rows.rope.longrope != "factors":
            params[key] = settings.values.get(key, params.get(key))
        if not is_number(params[key]) or (kind == "yarn" and not params[key]):
            raise LoadRefused(_FILE, f"says {key} {said(params[key])}")
    if kind == "llama3":
        _numbers(params, "low_freq_factor", "high_freq_factor")
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow"):
            if params.get(key) and not is_number(params[key]):
                raise LoadRefused(_FILE, f"says {key} {said(params[key])}, not a number")


def _check_head(params: Mapping[str, Any], settings: Settings) -> None:
    """Raise LoadRefused if a head of an odd size is rotated as a whole."""
    head = settings.values.get("head_dim", settings.values.get("qk_rope_head_dim"))
    if head is None:
        return
    if not is_number(head):
        raise LoadRefused(_FILE, f"says head_dim {said(head)}, not a number")
    if head < _LEAST_ODD_HEAD or not head % 2:
        return
    share = params.get("partial_rotary_factor", 1.0)
    if not is_number(share) or not math.isfinite(share):
        raise LoadRefused(_FILE, f"says partial_rotary_factor {said(share)}")
    if int(head * share) == head:
        raise LoadRefused(_FILE, f"has an odd head_dim, {head}, which cannot be rotated")


def _check_by_vllm(
    params: Mapping[str, Any], kind: Any, rows: VllmRows, settings: Settings
) -> None:
    """Raise LoadRefused if vLLM cannot build the rotary embedding, and Unknown."""
    if "mrope_section" in params:
        _check_sections(params, kind, settings)
    if params.get("use_fope") or params.get("rope_dim"):
        raise Unknown("the rotary embedding of config.json")
    for key, value in params.items():
        entries = value if isinstance(value, list) else [value]
        if any(isinstance(entry, dict | list) for entry in entries):
            raise LoadRefused(_FILE, f"says {key} {said(value)}, which vLLM cannot compare")
    share = params.get("partial_rotary_factor", 1.0)
    if not is_number(share) or not 0.0 < share <= 1.0:
        raise LoadRefused(_FILE, f"says partial_rotary_factor {said(share)}, not 0 to 1")
    base = params["rope_theta"]
    if not is_number(base):
        raise LoadRefused(_FILE, f"says rope_theta {said(base)}, not a number")
    if kind == "default":
        return
    if kind == "longrope":
        check_longrope(params, settings)
    elif kind == "llama3":
        _numbers(params, "factor")
        if not params["low_freq_factor"] or not params["high_freq_factor"]:
            raise LoadRefused(_FILE, "says a frequency factor of 0")
    elif kind in ("yarn", "deepseek"):
        _check_yarn(params, deepseek=kind == "deepseek")
    elif kind == "linear":
        if not isinstance(params["factor"], float):
            raise LoadRefused(_FILE, f"says the factor {said(params['factor'])}, without a point")
    elif kind == "dynamic":
        if rows.rope.alpha:
            _numbers(params, "factor", *(["alpha"] if params.get("alpha") else []))
        elif "alpha" in params or "max_trained_positions" in params:
            raise Unknown("rope_type dynamic with another key")
        _numbers(params, "factor")
    elif kind == "ntk":
        _numbers(params, "factor")
        if params.get("mixed_b") is not None or params["factor"] < 0:
            raise Unknown("rope_type ntk with a value that is not known")
    elif kind != "proportional":
        raise LoadRefused(_FILE, f"says rope_type {said(kind)}, which vLLM does not know")


def _check_sections(params: Mapping[str, Any], kind: Any, settings: Settings) -> None:
    """Raise Unknown if the parts of a head for time, height and width do not fill it."""
    sections, share = params["mrope_section"], params.get("partial_rotary_factor", 1.0)
    head = settings.number("head_dim")
    if kind != "default" or head is None or not is_number(share):
        raise Unknown(f"mrope_section with rope_type {said(kind)}")
    if not isinstance(sections, list) or not all(map(is_integer, sections)):
        raise Unknown(f"mrope_section {said(sections)}")
    if sections and sum(sections) != int(head * share) // 2:
        raise Unknown(f"mrope_section {said(sections)} for a head of {head}")


def _check_yarn(params: Mapping[str, Any], *, deepseek: bool) -> None:
    """Raise LoadRefused if YaRN's formulas cannot be computed, and Unknown of odd values."""
    for key in ("factor", "original_max_position_embeddings"):
        if key not in params:
            raise LoadRefused(_FILE, f"has no {key} for the rotary embedding")
    _numbers(params, "factor", "original_max_position_embeddings")
    base, factor = params["rope_theta"], params["factor"]
    length = params["original_max_position_embeddings"]
    if base <= 0 or base == 1 or length <= 0:
        raise LoadRefused(_FILE, "has a rotary embedding without a logarithm")
    for key in ("beta_fast", "beta_slow"):
        beta = params.get(key, 1)
        if not is_number(beta) or beta <= 0:
            raise LoadRefused(_FILE, f"says {key} {said(beta)}, not a positive number")
    if factor < 0:
        raise LoadRefused(_FILE, f"says the rotary factor {factor}")
    if not factor or not factor * length <= LONGEST:
        raise Unknown(f"YaRN from length {length} by factor {factor}")
    for key in ("mscale", "mscale_all_dim", "attention_factor"):
        value = params.get(key)
        if value is None and (not deepseek or key not in params):
            continue
        if isinstance(value, str) or (not deepseek and not is_number(value)):
            raise Unknown(f"YaRN with {key} {said(value)}")
        if not is_number(value) and key != "attention_factor":
            raise LoadRefused(_FILE, f"says {key} {said(value)}, not a number")


def _numbers(params: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if not is_number(params.get(key)):
            raise LoadRefused(_FILE, f"says {key} {said(params.get(key))}, not a number")
