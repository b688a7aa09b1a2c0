"""What `verify-ignore` says of families and methods that mquant does not know."""

import pytest

from ignore_reports import Judge, judge, message, rules
from make import Edit, renamed
from quantized_rows import (
    AWQ,
    MODELOPT,
    NVFP4A16,
    Suffixes,
    compressed,
    quantized,
)

__all__ = ["judge"]  # the fixture


def test_an_unknown_family_is_judged_by_usual_names(judge: Judge) -> None:
    report = judge(quantized(NVFP4A16), compressed(["lm_head"]), model_type="olmo2")
    assert rules(report) == {"ignore-uncovered": "warning"}
    assert "model_type 'olmo2' is of no family that mquant knows" in report.undecided
    assert report.verdict == (
        "All 2 routers, lm_head and the embeddings are kept; routers of an unknown family are "
        "known by usual names and shapes alone."
    )
    bad = judge(quantized(NVFP4A16, "lm_head"), compressed(["lm_head"]), model_type="olmo2")
    assert bad.verdict == (
        "lm_head is quantized: loaders may refuse this checkpoint; what vLLM 0.32 does with it is "
        "not known."
    )


def under(edit: Edit, old: str, new: str) -> Edit:
    """Return an edit that quantizes, and then replaces a part of all names."""
    return lambda rows: renamed(edit(rows) or rows, old, new)


@pytest.mark.parametrize(
    "name",
    [
        "mlp.gate",
        "mlp.router",
        "mlp.router.gate",
        "router.proj",
        "mlp.shared_expert_gate",
        "feed_forward.wg",
        "mlp.router.classifier",
        "self_attn.indexer.weights_proj",
        "mlp.chooser",  # nothing but the shape: a row for each expert
    ],
)
@pytest.mark.parametrize("suffixes", [NVFP4A16, MODELOPT], ids=["nvfp4", "modelopt"])
def test_a_quantized_router_of_an_unknown_family_is_an_error(
    judge: Judge, name: str, suffixes: Suffixes
) -> None:
    edit = under(quantized(suffixes, ".gate"), "block_sparse_moe.gate", name)
    report = judge(edit, compressed(["lm_head"]), model_type="olmo2")
    assert rules(report)["router-quantized"] == "error"
    assert "2 router modules are quantized" in message(report, "router-quantized")


@pytest.mark.parametrize("name", ["mlp.gate_proj", "self_attn.gate", "self_attn.o_gate_proj"])
def test_a_gate_that_chooses_no_experts_is_no_router(judge: Judge, name: str) -> None:
    edit = under(quantized(NVFP4A16, ".q_proj"), "self_attn.q_proj", name)
    report = judge(edit, compressed(["lm_head"]), model_type="olmo2")
    assert "router-quantized" not in rules(report)


@pytest.mark.parametrize(
    "name", ["backbone.embeddings", "model.word_embeddings", "embed", "transformer.wte"]
)
def test_quantized_embeddings_of_an_unknown_family_are_an_error(judge: Judge, name: str) -> None:
    edit = under(quantized(NVFP4A16, "embed_tokens"), "model.embed_tokens", name)
    report = judge(edit, compressed(["lm_head"]), model_type="olmo2")
    assert rules(report)["embedding-quantized"] == "error"


@pytest.mark.parametrize("name", ["head", "model.lm_head", "output"])
def test_a_quantized_head_of_an_unknown_family_is_an_error(judge: Judge, name: str) -> None:
    edit = under(quantized(NVFP4A16, "lm_head"), "lm_head", name)
    report = judge(edit, compressed([]), model_type="olmo2")
    assert rules(report)["head-quantized"] == "error"


def test_a_model_type_that_vllm_does_not_know_is_an_error(judge: Judge) -> None:
    report = judge(quantized(NVFP4A16), compressed(["lm_head"]), model_type="odd", auto_map=...)
    assert "model_type 'odd', which vLLM does not know" in message(report, "vllm-refuses")


def test_an_unknown_method_is_judged_by_its_tensors(judge: Judge) -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    report = judge(quantized(AWQ), awq)
    assert rules(report) == {} and "was not judged" in report.verdict
    assert "what vLLM makes of the quantization method auto_awq is not known" in report.undecided
    assert "router-quantized" in rules(judge(quantized(AWQ, ".gate"), awq))
