"""LongRoPE: what transformers and vLLM refuse of the tables of factors in config.json.

The sources are transformers 5.19's `configuration_phi3.py`, and vLLM 0.32's
`phi3_long_rope_scaled_rope.py`.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

from mquant.loader_model.vllm.config_types import is_number, said
from mquant.loader_model.vllm.tensors import LoadRefused, Unknown
from mquant.loader_rows import Settings

_FILE: Final = "config.json"
_LENGTH: Final = "original_max_position_embeddings"
_FACTORS: Final = ("short_factor", "long_factor")
LONGEST: Final = 1 << 26
"""The longest context of which vLLM's table surely fits into memory."""


def check_only_longrope(params: dict[str, Any], settings: Settings) -> Any:
    """Check the type of a family that knows no other scaling than LongRoPE, and return the type.

    transformers takes `su` and `yarn` for LongRoPE, but reads the length before scaling only under
    the names `yarn` and `longrope`.
    """
    kind = params["rope_type"]
    if kind in ("su", "yarn"):
        if params.get("type", "su") != "su":
            raise LoadRefused(_FILE, f"says rope type {said(kind)}, which is taken for longrope")
        if kind == "su" and _LENGTH not in params:
            raise LoadRefused(_FILE, f"says rope_type su without {_LENGTH}")
        kind = params["rope_type"] = "longrope"
    if kind not in ("default", "longrope"):
        raise LoadRefused(_FILE, f"says rope_type {said(kind)}, not longrope")
    heads, hidden = settings.number("num_attention_heads"), settings.number("hidden_size")
    share = params.get("partial_rotary_factor")
    if not heads or hidden is None or not is_number(share) or not math.isfinite(share):
        raise LoadRefused(_FILE, f"says partial_rotary_factor {said(share)} of {heads} heads")
    for key in _FACTORS:
        factors, wanted = params.get(key), int(hidden // heads * share) // 2
        if factors is None:
            continue
        if not isinstance(factors, list) or not all(map(is_number, factors)):
            raise LoadRefused(_FILE, f"says {key} {said(factors)}, not a list of numbers")
        if len(factors) != wanted:
            raise LoadRefused(_FILE, f"has {len(factors)} numbers in {key}, not {wanted}")
    return kind


def check_longrope(params: Mapping[str, Any], settings: Settings) -> None:
    """Raise LoadRefused if vLLM cannot build LongRoPE's tables, and Unknown of odd values."""
    head, length = settings.number("head_dim"), params[_LENGTH]
    if head is None or 0 < length < 1:
        raise Unknown(f"LongRoPE from length {length} for a head of {head}")
    longest = settings.values["max_position_embeddings"]
    if length <= 0 or (length == 1 and longest > 1):
        raise LoadRefused(_FILE, f"says {_LENGTH} {length}")
    if max(length, longest) > LONGEST:
        raise Unknown(f"LongRoPE from length {length} to {longest}")
    pairs = -(-int(head * params.get("partial_rotary_factor", 1.0)) // 2)
    for key in _FACTORS:
        factors = params[key]
        if not isinstance(factors, list) or len(factors) not in (1, pairs):
            raise LoadRefused(_FILE, f"says {key} {said(factors)}, not {pairs} numbers")
        if not all(map(is_number, factors)):
            raise Unknown(f"{key} {said(factors)}")
    for key in ("short_mscale", "long_mscale"):
        if params.get(key) is not None and not is_number(params[key]):
            raise LoadRefused(_FILE, f"says {key} {said(params[key])}, not a number")
