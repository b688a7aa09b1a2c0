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
from mquant.plan.model import OutputTensor, Plan, config_json

OUTPUT_NOT_LOADABLE: Final = rule(
    "output-not-loadable",
    "vLLM loads the checkpoint that the plan makes.",
    "The output has the parent's config.json and the recipe's quantization_config. If these do not "
    "fit the tensors, no run can make a checkpoint that loads.",
    "Correct config.json of the source, or the recipe.",
    needs="plan",
    if_tolerated="warning",
)


def checked(plan: Plan, context: Context = "source") -> Plan:
    """Return the plan with a finding if vLLM does not load the output.

    The plan is as it is if it has an error, if a finding already says why vLLM does not load the
    output, and if it is not known what vLLM does.
    """
    if any(f.severity == "error" or RULES[f.rule].if_loads for f in plan.findings):
        return plan
    config = config_json(plan)
    outputs = (output for unit in plan.units for output in unit.outputs)
    outcome = _predict(plan, config, outputs)
    findings = [*check_top_k(plan.family, config, context)]
    if not outcome.loads and not outcome.unknown:
        findings.append(_finding(plan, config, outcome, context))
    return replace(plan, findings=(*plan.findings, *findings))


def _predict(
    plan: Plan, config: Mapping[str, Any], tensors: Iterable[OutputTensor | TensorInfo]
) -> Outcome:
    loaded = (Loaded(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
    return predict_of(config, plan.family, loaded)


def _finding(plan: Plan, config: Mapping[str, Any], outcome: Outcome, context: Context) -> Finding:
    """Return the finding, which blames the source if vLLM does not load the source in BF16."""
    anyway = " (or --allow-unsafe to do so anyway)" if plan.recipe.roles else ""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    in_bf16 = _predict(plan, plain, (member.info for member in plan.survey.members))
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
