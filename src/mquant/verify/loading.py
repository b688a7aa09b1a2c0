"""Judge a checkpoint by the model of vLLM's loader.

The model says whether vLLM loads the checkpoint; other rules of structure say why it does not, in
the words of a publisher. So a rule that explains a refusal counts only if vLLM does not load.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from mquant.findings import RULES, Finding, Rule, if_loaded
from mquant.loader_model.vllm.load import Outcome
from mquant.loader_model.vllm.predict import VERSION
from mquant.loader_model.vllm.words import faults_of, in_words
from mquant.plan.never_quantized import saying_outcome
from mquant.verify.loaders.ask_vllm import (
    VLLM_CONVERTS,
    VLLM_DROPS,
    VLLM_LEAVES_UNSET,
    VLLM_REFUSES,
    VLLM_RESHAPES,
)

_RULES: Final[Mapping[str, Rule]] = {
    "dropped": VLLM_DROPS,
    "unset": VLLM_LEAVES_UNSET,
    "reshaped": VLLM_RESHAPES,
    "converted": VLLM_CONVERTS,
}


def with_outcome(
    findings: Iterable[Finding], outcome: Outcome, *, refusal_only: bool = False
) -> list[Finding]:
    """Return the findings that hold, given what vLLM does, and what the findings do not explain.

    `refusal_only`: of what the findings do not explain, only that vLLM stops.
    """
    findings = [saying_outcome(finding, outcome) for finding in findings]
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
        where, clause = in_words(outcome, "the checkpoint")
        yield VLLM_REFUSES.finding(where, f"vLLM {VERSION} {clause}.")
    for fault in faults_of(outcome):
        message = f"vLLM {VERSION} {fault.clause}, without a word."
        yield _RULES[fault.kind].finding(fault.where, message)
