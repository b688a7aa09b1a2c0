"""Rules against quantized routers, embeddings and heads, which loaders refuse."""

import math
import re
from dataclasses import replace
from typing import Final

import yaml

from mquant.family import Family
from mquant.family_rows import Role
from mquant.findings import Finding, Rule, if_loaded, rule
from mquant.loader_model.vllm.load import Outcome
from mquant.loader_model.vllm.predict import VERSION
from mquant.plan.action import Action
from mquant.recipe import Recipe
from mquant.text import names

KEPT_BECAUSE: Final = {
    Role.ROUTER: "loaders may refuse a quantized router",
    Role.ROUTING_BIAS: "not a weight; it steers the routing",
    Role.EMBEDDING: "loaders may refuse quantized embeddings",
    Role.HEAD: "loaders may refuse a quantized lm_head",
    Role.NORM: "norms are vectors",
    Role.LINEAR_ATTENTION: "errors add up in the state of linear attention",
    Role.MAMBA: "errors add up in the state of Mamba",
    Role.INDEXER: "loaders build parts of indexers plain, and an index weighs little",
    Role.LATENT: "every routed expert reads or writes through it",
    Role.VISION: "recipes are made for the text model",
    Role.MTP: "loaders take multi-token prediction as released",
    Role.OTHER: "not known to be a linear layer",
}
"""Why a role is kept by recipes that do not name the role."""

ROUTER_QUANTIZED: Final = rule(
    "router-quantized",
    "No router has tensors of a quantized layer.",
    "Loaders build the routers of most families plain, whatever config.json says: vLLM stops at "
    "the first scale or packed weight without a parameter. Tools that select layers by name take "
    "routers for linear layers, so `ignore` must name the routers when the checkpoint is made.",
    "Take the routers from the parent: `mquant repair SRC --from PARENT`. Or quantize again, with "
    "an ignore list that names the routers.",
    if_tolerated="warning",
    knowing=("family",),
    if_loads="warning",
)
HEAD_QUANTIZED: Final = rule(
    "head-quantized",
    "lm_head has no tensors of a quantized layer.",
    "vLLM builds lm_head plain, unless a target names lm_head, and refuses scales for it.",
    "Take lm_head from the parent: `mquant repair SRC --from PARENT`. Or quantize again, with "
    "an ignore list that names lm_head.",
    if_tolerated="warning",
    if_loads="warning",
)
EMBEDDING_QUANTIZED: Final = rule(
    "embedding-quantized",
    "The embeddings have no tensors of a quantized layer.",
    "Loaders look embeddings up row by row in a plain matrix: vLLM refuses a quantized matrix.",
    "Take the embeddings from the parent: `mquant repair SRC --from PARENT`. Or quantize again, "
    "with an ignore list that names the embeddings.",
    if_tolerated="warning",
    if_loads="warning",
)
EXPERT_BIAS: Final = rule(
    "expert-bias",
    "Experts in NVFP4 or FP8 have no bias.",
    "vLLM's layers of such experts have no parameter for a bias: vLLM stops while loading the "
    "weights, or passes over the bias without a word.",
    "Keep the experts unquantized: leave expert out of the recipe's roles, or ignore them.",
    if_tolerated="warning",
    knowing=("family", "layout"),
    if_loads="nothing",
)
QUANTIZED: Final[dict[Role, Rule]] = {
    Role.ROUTER: ROUTER_QUANTIZED,
    Role.HEAD: HEAD_QUANTIZED,
    Role.EMBEDDING: EMBEDDING_QUANTIZED,
}
"""The rule for each role that loaders refuse quantized."""
IDS: Final = frozenset(rule.id for rule in QUANTIZED.values())
ANYWAY: Final = " (or --allow-unsafe to do so anyway)"


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def unsafe(
    actions: list[Action], family: Family, recipe: Recipe, *, allow_unsafe: bool
) -> list[Finding]:
    """Return findings if a recipe quantizes routers, embeddings or the output head.

    `saying_outcome` adds what vLLM does with the output.
    """
    findings = []
    nouns = {Role.ROUTER: "router", Role.EMBEDDING: "embedding", Role.HEAD: "output head"}
    for role, noun in nouns.items():
        modules = [a.module for a in actions if a.role is role and a.stored_in]
        if not modules:
            continue
        findings.append(
            QUANTIZED[role].finding(
                modules[0],
                f"Recipe {recipe.name} would quantize {len(modules)} {noun}"
                f"{'s' if len(modules) > 1 else ''} ({names(modules, 2)}).",
                f"Use ignore: {safe_ignore(family, recipe)}{ANYWAY}.",
                "tolerated" if allow_unsafe else "source",
            )
        )
    return findings


def biased_experts(actions: list[Action], recipe: Recipe, *, allow_unsafe: bool) -> list[Finding]:
    """Return an error if experts with a bias become such that vLLM does not take the bias.

    The advice says what following the advice does: experts that the source stores quantized become
    BF16 if the recipe does not name them.
    """
    experts = (a for a in actions if a.role is Role.EXPERT)
    quantized = {
        a.module: a for a in experts if (s := a.stored_in) and s.format != "pack-quantized"
    }
    biased = [a.module for a in actions if a.source.name == f"{a.module}.bias"]
    biased = [module for module in biased if module in quantized]
    if not biased:
        return []
    first = quantized[biased[0]]
    does = f"keeps {names(biased)} as {first.already.name}" if first.already else ""
    fix = EXPERT_BIAS.fix.removesuffix(".")
    if first.stored:
        fix = (
            "Use the source as it is; or leave expert out of the recipe's roles, or ignore them, "
            "and the experts become BF16"
        )
    return [
        EXPERT_BIAS.finding(
            biased[0],
            f"Recipe {recipe.name} {does or f'quantizes {names(biased)}'}, in the layout of "
            "compressed-tensors. They have biases, and vLLM takes no bias of such experts.",
            f"{fix}{ANYWAY}.",
            "tolerated" if allow_unsafe else "source",
        )
    ]


def saying_outcome(finding: Finding, outcome: Outcome) -> Finding:
    """Return a finding about a quantized router, embedding or head that says what vLLM does.

    Other findings, and all findings if it is not known what vLLM does, stay as they are.
    """
    if outcome.unknown or finding.rule not in IDS:
        return finding
    says = f"{finding.message.removesuffix('.')}; vLLM {VERSION}"
    if outcome.loads:
        message = f"{says} loads such a checkpoint, and other loaders may not."
        fix = finding.fix.replace(ANYWAY, "")
        return replace(if_loaded(finding) or finding, message=message, fix=fix)
    wrong = "refuses such a checkpoint" if outcome.refused else "loads such a checkpoint wrongly"
    return replace(finding, message=f"{says} {wrong}.")


def safe_ignore(family: Family, recipe: Recipe) -> str:
    """Return the recipe's ignore list, completed for a family, as YAML in one line."""
    entries = []
    for row in family.tensors:
        module = row.name.rpartition(".")[0]
        if row.role.refused_by_loaders:
            entries.append(
                "re:" + re.escape(module).replace(r"\{layer\}", r"\d+") + "$"
                if "{layer}" in module
                else module
            )
    entries += [e for e in recipe.ignore if e not in entries]
    entries.sort(key=lambda entry: (entry.startswith("re:"), natural(entry)))
    return in_yaml(entries)


def in_yaml(entries: list[str]) -> str:
    """Return entries of an ignore list as YAML in one line."""
    return yaml.safe_dump(entries, default_flow_style=True, width=math.inf).strip()
