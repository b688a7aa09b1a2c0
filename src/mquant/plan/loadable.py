"""Whether vLLM loads the checkpoint that a plan makes, asked before a weight is read.

A plan knows every tensor of the output, and its config.json, which has every key of the parent's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from mquant.checkpoint import TensorInfo
from mquant.findings import RULES, Context, Finding, rule
from mquant.loader_model.routing import check_top_k
from mquant.loader_model.vllm.load import Outcome
from mquant.loader_model.vllm.predict import VERSION, predict_of
from mquant.loader_model.vllm.tensors import Loaded
from mquant.loader_model.vllm.words import in_words
from mquant.plan.action import OutputTensor
from mquant.plan.members import as_stored
from mquant.plan.model import Plan, config_json
from mquant.plan.never_quantized import ANYWAY, IDS, saying_outcome

OUTPUT_NOT_LOADABLE: Final = rule(
    "output-not-loadable",
    "vLLM loads the checkpoint that the plan makes.",
    "The output has the parent's config.json and the recipe's quantization_config. If these do not "
    "fit the tensors, no run can make a checkpoint that loads.",
    "Correct config.json of the source, or the recipe.",
    needs="plan",
    if_tolerated="warning",
)


OUTPUT_NOT_JUDGED: Final = rule(
    "output-not-judged",
    "It is known whether vLLM loads the checkpoint that the plan makes.",
    "mquant's model of vLLM's loader does not cover every key and value of config.json.",
    "Have vLLM itself judge the output of a run: mquant verify OUT --loader vllm",
    severity="warning",
    needs="plan",
)


def checked(plan: Plan, context: Context = "source") -> Plan:
    """Return the plan with findings if vLLM does not load the output, or if that is not known.

    A finding about quantized routers, embeddings or heads says what vLLM does with the output, and
    is no error if vLLM loads the output. The plan is as it is if it has another error, or a finding
    that already says why vLLM does not load the output.
    """
    others = [f for f in plan.findings if f.rule not in IDS]
    if any(f.severity == "error" or RULES[f.rule].if_loads for f in others):
        return plan
    config = config_json(plan)
    outputs = (output for unit in plan.units for output in unit.outputs)
    outcome = _predict(plan, config, outputs)
    findings = [saying_outcome(f, outcome) for f in plan.findings]
    findings += check_top_k(plan.family, config, context)
    if outcome.unknown:
        findings.append(not_judged(plan, outcome))
    elif not outcome.loads and len(others) == len(plan.findings):
        findings.append(_finding(plan, config, outcome, context))
    return replace(plan, findings=tuple(findings))


def not_judged(plan: Plan, outcome: Outcome) -> Finding:
    """Return the finding that it is not known whether vLLM loads the output of a plan."""
    return OUTPUT_NOT_JUDGED.finding(
        plan.survey.checkpoint.source.name,
        f"Whether vLLM loads the output of recipe {plan.recipe.name} is not judged: what vLLM "
        f"{VERSION} makes of {outcome.unknown} is not known.",
    )


def _predict(
    plan: Plan, config: Mapping[str, Any], tensors: Iterable[OutputTensor | TensorInfo]
) -> Outcome:
    loaded = (Loaded(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
    return predict_of(config, plan.family, loaded)


def _finding(plan: Plan, config: Mapping[str, Any], outcome: Outcome, context: Context) -> Finding:
    """Return the finding, which blames the source if vLLM does not load the source in BF16."""
    anyway = ANYWAY if plan.recipe.roles else ""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    in_bf16 = _predict(plan, plain, (member.info for member in as_stored(plan.survey.members)))
    if in_bf16.loads or in_bf16.unknown:
        where, clause = in_words(outcome, f"the output of recipe {plan.recipe.name}")
        fix = "Correct the recipe's roles, targets or ignore"
    else:
        source = plan.survey.checkpoint.source.name
        where, clause = in_words(in_bf16, f"{source} in BF16, and so any output")
        fix = "Correct config.json of the source: the output gets all its keys"
    return OUTPUT_NOT_LOADABLE.finding(
        where, f"vLLM {VERSION} {clause}.", f"{fix}{anyway}.", context
    )
