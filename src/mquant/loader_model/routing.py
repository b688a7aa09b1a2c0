"""Judge from config.json whether tokens can be routed to experts once a loader has every tensor."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from mquant.family import Family
from mquant.findings import Context, Finding, rule

TOP_K_BEYOND_EXPERTS: Final = rule(
    "top-k-beyond-experts",
    "A layer has at least as many experts as every token is routed to.",
    "vLLM loads the checkpoint; the first token that is routed stops it.",
    "Correct the number of experts per token in config.json.",
    if_tolerated="warning",
    knowing=("family",),
)


def check_top_k(
    family: Family, config: Mapping[str, Any], context: Context = "judged"
) -> Iterator[Finding]:
    """Yield a finding if config.json routes every token to more experts than a layer has."""
    key, experts = family.config.top_k, family.config.experts
    chosen, there = (family.value(each, config) if each else None for each in (key, experts))
    if chosen is not None and there is not None and chosen > there:
        yield TOP_K_BEYOND_EXPERTS.finding(
            "config.json",
            f"config.json says {key} {chosen:,}, but a layer has {there:,} experts.",
            context=context,
        )
