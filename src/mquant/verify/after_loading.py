"""Judge what fails, or goes wrong, only after a loader has taken every tensor."""

from collections.abc import Iterator
from typing import Any, Final

from mquant.family import Family
from mquant.findings import Finding, rule
from mquant.loader_model.modules import ModuleView
from mquant.loader_model.routing import check_top_k
from mquant.text import names

KV_SCALES: Final = frozenset({"k_scale", "v_scale", "kv_scale"})
"""The suffixes of scales of a KV cache; the module is the attention layer, or k_proj and v_proj."""

KV_SCALES_MISSING: Final = rule(
    "kv-scales-missing",
    "If config.json declares static scales of an FP8 KV cache, the shards hold the scales.",
    "vLLM takes 1.0 for every scale, with a warning: keys and values beyond 448 are cut off.",
    "Calibrate the scales, or remove kv_cache_scheme from config.json.",
    severity="warning",
)
CONFIG_DEFAULT_TAKEN: Final = rule(
    "config-default-taken",
    "config.json has the keys for which vLLM has a default that no release of the family uses.",
    "vLLM takes its default without a word, and the model computes something else.",
    "Take the key from config.json of the original release.",
    severity="warning",
    knowing=("family",),
)


def check_after_loading(view: ModuleView) -> Iterator[Finding]:
    """Yield findings that headers and config.json show."""
    config = view.checkpoint.config
    if view.family:
        yield from check_top_k(view.family, config)
        yield from _defaults(view.family, config)
    scheme = view.config.get("kv_cache_scheme")
    static = isinstance(scheme, dict) and not scheme.get("dynamic")
    suffixes = {suffix for module in view.modules.values() for suffix in module.tensors}
    if static and not suffixes & KV_SCALES and not view.checkpoint.lost_shards:
        yield KV_SCALES_MISSING.finding(
            "config.json",
            "config.json declares kv_cache_scheme with static scales, and no shard holds k_scale "
            "or v_scale.",
        )


def _defaults(family: Family, config: dict[str, Any]) -> Iterator[Finding]:
    rows = family.vllm
    if rows is None:
        return
    settings = family.settings(config)
    rope = isinstance(settings.get("rope_parameters"), dict)
    lost = {
        key: value
        for key, value in rows.quiet.items()
        if settings.get(key) is None and not (rope and key == "rope_theta")
    }
    if lost:
        taken = " and ".join(f"{value!r} for {key}" for key, value in lost.items())
        yield CONFIG_DEFAULT_TAKEN.finding(
            "config.json", f"config.json lacks {names(list(lost))}: vLLM takes {taken}."
        )
