"""The role that a tensor most likely has, by the names that models usually give.

The families in `configs/` say more, and take precedence. These guesses serve the checkpoints of
families that nobody has written, and the drafts of family files.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from mquant.family_rows import Role

ROUTERS: Final = frozenset(
    {"gate", "router", "shared_expert_gate", "wg", "classifier", "weights_proj"}
)
"""The last parts of the names of routers, and of gates that loaders treat as routers."""
EXPERT_KEYS: Final = (
    *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    *("num_routed_experts", "n_experts"),
)
"""The keys of config.json that usually have the number of experts, the likeliest first."""
_INSIDE_ROUTERS: Final = frozenset({"gate", "proj", "classifier", "layer", "weight"})
_EMBEDDINGS: Final = frozenset(
    {"embed_tokens", "embeddings", "word_embeddings", "embed", "wte", "tok_embeddings", "embed_in"}
)
_HEADS: Final = frozenset({"lm_head", "head", "output", "embed_out"})
_TOWERS: Final = frozenset(
    {"visual", "vision", "vision_tower", "vision_model", "vision_encoder", "vision_embed_tokens"}
    | {"vision_projection", "audio", "audio_tower", "embed_audio", "embed_vision", "vit"}
    | {"multi_modal_projector", "mm_projector", "patch_merge_mlp", "merger"}
)
_MTP: Final = frozenset({"mtp", "mtp_layers", "mtp_block", "nextn"})
_SHARED: Final = re.compile(r"shared?_?(expert|mlp)s?|shared_mlp|mlp_shared")
_ROLES: Final = {
    Role.INDEXER: re.compile(r"indexer|index_\w+_proj"),
    Role.LINEAR_ATTENTION: re.compile(r"linear_attn|linear_attention|\w*delta\w*|lightning\w*"),
    Role.MAMBA: re.compile(r"mamba|ssm|x_proj|dt_proj|in_proj|conv1d"),
    Role.ATTENTION: re.compile(r"(self_|cross_)?att(n|ention)|[qkvo]_proj|qkv(_proj)?|w[qkvo]"),
    Role.MLP: re.compile(
        r"mlp\w*|feed_forward|ffn|(gate|up|down|gate_up)_proj|w[123]|fc[12]|\w*_moe|moe"
    ),
}
_NORM: Final = re.compile(r"(\w*_)?(layer_?|rms_?)?norm(_?\w*)?|ln(_\w+)?")


def usual_role(name: str, shape: Collection[int], experts: int = 0) -> Role | None:
    """Return the role of a tensor, by its name on disk and its shape; None if nothing tells it.

    `experts` is the number of experts in config.json, or 0.
    """
    parts = name.split(".")
    module = parts[:-1] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts
    short = next((part for part in reversed(module) if not part.isdecimal()), "")
    if tower(parts):
        return Role.VISION
    if not _MTP.isdisjoint(parts):
        return Role.MTP
    if "correction_bias" in name or short in ("expert_bias", "expert_biases", "router_bias"):
        return Role.ROUTING_BIAS
    if len(shape) == 1:
        if tuple(shape) == (experts,) and parts[-1] == "bias" and short == "gate":
            return Role.ROUTING_BIAS
        return Role.NORM if _NORM.fullmatch(short) and parts[-1] != "bias" else Role.OTHER
    if not any(part.isdecimal() for part in parts):
        return _outside_layers(short)
    return _in_layers(parts, short, tuple(shape), experts)


def experts_of(config: Mapping[str, Any]) -> int:
    """Return the number of experts that config.json, or a table in it, says; 0 without one."""
    tables = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    numbers = (table.get(key) for table in tables for key in EXPERT_KEYS)
    return next((number for number in numbers if type(number) is int and number > 0), 0)


def tower(parts: list[str]) -> bool:
    """Return whether the parts of a name say that it is outside the text model."""
    first = next((n for n, part in enumerate(parts) if part.isdecimal()), len(parts))
    return not _TOWERS.isdisjoint(parts[:first])


def _outside_layers(short: str) -> Role | None:
    if short in _EMBEDDINGS:
        return Role.EMBEDDING
    return Role.HEAD if short in _HEADS else None


def _in_layers(parts: list[str], short: str, shape: tuple[int, ...], experts: int) -> Role | None:
    if parts[-1] == "weight" and _routes(parts, short):
        return Role.ROUTER
    if any(_SHARED.fullmatch(part) for part in parts):
        return Role.SHARED_EXPERT
    if "experts" in parts:
        return Role.EXPERT
    role = _of_matrix(parts[:-1] if parts[-1] == "weight" else parts)
    if len(shape) == 3 and shape[0] == experts > 1 and role in (None, Role.MLP):
        return Role.EXPERT
    if parts[-1] != "weight" and parts[-2] == "gate":
        return Role.ROUTING_BIAS
    if len(shape) != 2 or parts[-1] != "weight":
        return Role.OTHER
    # A matrix with a row for each expert, and no other use, chooses experts.
    return Role.ROUTER if shape[0] == experts > 1 and role in (None, Role.MLP) else role


def _of_matrix(module: list[str]) -> Role | None:
    for role in (Role.INDEXER, Role.LINEAR_ATTENTION):
        if any(_ROLES[role].fullmatch(part) for part in module):
            return role
    # A last part that tells all, such as q_proj, outweighs a part such as `mixer`.
    for part in reversed(module):
        for role, pattern in _ROLES.items():
            if pattern.fullmatch(part):
                return role
    return Role.MAMBA if "mixer" in module else None


def _routes(parts: list[str], short: str) -> bool:
    """Return whether a module is a router, or a gate of one number or of each expert."""
    module = parts[:-1] if parts[-1] in ("weight", "bias") else parts
    attention = (_ROLES[Role.ATTENTION], _ROLES[Role.LINEAR_ATTENTION], _ROLES[Role.INDEXER])
    if any(pattern.fullmatch(part) for part in module[:-1] for pattern in attention):
        return False
    if "experts" in module:
        return False
    return short in ROUTERS or ("router" in module and short in _INSIDE_ROUTERS)
