"""Judge a checkpoint by the model of vLLM's loader.

The model says whether vLLM loads the checkpoint; other rules of structure say why it does not, in
the words of a publisher. So a rule that explains a refusal counts only if vLLM does not load.
"""

from collections.abc import Iterable

from mquant.findings import RULES, Finding, Rule, if_loaded
from mquant.loader_model.vllm.load import Outcome
from mquant.loader_model.vllm.predict import VERSION
from mquant.verify.loaders.ask_vllm import (
    VLLM_CONVERTS,
    VLLM_DROPS,
    VLLM_LEAVES_UNSET,
    VLLM_REFUSES,
    VLLM_RESHAPES,
)


def with_outcome(
    findings: Iterable[Finding], outcome: Outcome, *, refusal_only: bool = False
) -> list[Finding]:
    """Return the findings that hold, given what vLLM does, and what the findings do not explain.

    `refusal_only`: of what the findings do not explain, only that vLLM stops.
    """
    findings = list(findings)
    if outcome.unknown:
        return findings
    if outcome.loads:
        return [kept for each in findings if (kept := if_loaded(each)) is not None]
    explained = any(
        each.severity == "error" and RULES[each.rule].if_loads is not None for each in findings
    )
    if explained or (refusal_only and not outcome.refused):
        return findings
    return [*findings, *_of(outcome)]


def _of(outcome: Outcome) -> Iterable[Finding]:
    """Yield one finding for each way in which vLLM does not load a checkpoint."""
    if outcome.refused:
        where, why = outcome.refused
        yield _finding(VLLM_REFUSES, where, f"refuses the checkpoint: {where} {why}", 1)
    for name in outcome.dropped[:1]:
        yield _finding(VLLM_DROPS, name, f"drops {name}", len(outcome.dropped))
    for name, missing in outcome.unset[:1]:
        message = f"leaves {missing:,} of {name}'s elements unset"
        yield _finding(VLLM_LEAVES_UNSET, name, message, len(outcome.unset))
    for name, shape, target in outcome.reshaped[:1]:
        message = f"spreads {name}, {list(shape)}, over {list(target)}"
        yield _finding(VLLM_RESHAPES, name, message, len(outcome.reshaped))
    for name, dtype, target_dtype in outcome.converted[:1]:
        message = f"converts {name} from {dtype} to {target_dtype}"
        yield _finding(VLLM_CONVERTS, name, message, len(outcome.converted))


def _finding(broken: Rule, where: str, message: str, count: int) -> Finding:
    more = f" (and {count - 1:,} more)" if count > 1 else ""
    silent = "" if broken is VLLM_REFUSES else ", without a word"
    return broken.finding(where, f"vLLM {VERSION} {message}{more}{silent}.")
