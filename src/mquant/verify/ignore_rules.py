"""The rules of `verify-ignore`: what stands in the ignore list, and what is quantized anyway."""

from typing import Final, Literal

from mquant.family import Role
from mquant.verify.rules import Rule, register

QUANTIZED: Final = {
    Role.ROUTER: "router-quantized",
    Role.HEAD: "head-quantized",
    Role.EMBEDDING: "embedding-quantized",
}

_AGAIN: Final = (
    "Take them from the parent, which `mquant repair SRC --from PARENT` does; or quantize again, "
    "with an ignore list that names them."
)
_LIST: Final = "Correct the list in config.json, with exact names; `mquant plan` shows them."


def _rule(id_: str, severity: Literal["error", "warning"], what: str, why: str, fix: str) -> Rule:
    return Rule(id_, severity, "structure", what, why, fix)


register(
    _rule(
        "router-quantized",
        "error",
        "No router has tensors of a quantized layer.",
        "Loaders build routers plain, whatever config.json says: vLLM stops at the first scale or "
        "packed weight it has no parameter for. Routers are linear layers to tools that go by "
        "names, so they must be named in `ignore` when the checkpoint is made.",
        _AGAIN,
    ),
    _rule(
        "embedding-quantized",
        "error",
        "The embeddings have no tensors of a quantized layer.",
        "Loaders look embeddings up, row by row, in a plain matrix: vLLM refuses any other.",
        _AGAIN,
    ),
    _rule(
        "head-quantized",
        "error",
        "lm_head has no tensors of a quantized layer.",
        "vLLM builds lm_head plain and refuses scales for it.",
        _AGAIN,
    ),
    _rule(
        "expert-names",
        "error",
        "Experts have the hub's names, not those that transformers gives them in memory.",
        "Saving a loaded MiniMax-M2 writes gate_proj, up_proj and down_proj for w1, w3 and w2. "
        "vLLM skips such names without an error, and every expert is left uninitialised.",
        "Rename the tensors, which `mquant repair SRC --from PARENT` does.",
    ),
    _rule(
        "kept-but-not-ignored",
        "error",
        "A linear layer that is plain on disk is in `ignore`, under the name vLLM has for it.",
        "vLLM builds every layer that is targeted and not ignored quantized. It then refuses the "
        "plain weight, or leaves the layer uninitialised.",
        "Add their names to `ignore` in config.json, experts' as vLLM has them.",
    ),
    _rule(
        "ignored-but-quantized",
        "error",
        "A layer that is quantized on disk is not in `ignore`.",
        "vLLM builds ignored layers plain, and refuses scales and packed weights for them.",
        "Take their names out of `ignore` in config.json.",
    ),
    _rule(
        "quantized-not-targeted",
        "error",
        "A layer that is quantized on disk is a target of some `config_groups` entry.",
        "vLLM builds layers that no target matches plain, and refuses scales for them. Experts "
        'are matched under vLLM\'s own names; `targets: ["Linear"]` means them all.',
        'Set `targets` in config.json to ["Linear"].',
    ),
    _rule(
        "fused-set-split",
        "error",
        "Layers that vLLM makes one of are all ignored, or none is.",
        "vLLM makes one layer of q, k and v, and one of all experts: it refuses to build one that "
        "`ignore` or `targets` cut in two.",
        "Name all of them, or none.",
    ),
    _rule(
        "quantization-undeclared",
        "error",
        "A checkpoint with quantized tensors says so in config.json.",
        "Without `quantization_config` a loader builds every layer plain, and refuses the scales.",
        "Write the `quantization_config` that the tensors were made with.",
    ),
    _rule(
        "ignore-bad-entry",
        "error",
        "Every entry of `ignore` and `targets` is a string, and after `re:` an expression.",
        "vLLM compiles every expression, and stops at the first that is none.",
        _LIST,
    ),
    _rule(
        "ignore-uncovered",
        "warning",
        "Routers, lm_head and embeddings that are kept are named in `ignore`.",
        "vLLM loads them all the same. Other loaders, and tools that quantize again with the same "
        "list, may take them for linear layers.",
        "Add their exact names to `ignore` in config.json.",
    ),
    _rule(
        "ignore-unmatched",
        "warning",
        "Every entry of `ignore` matches a name of the hub's or of vLLM's.",
        "An entry that matches nothing protects nothing: often it is a name from another model, "
        "or an expression that is anchored at the start and was not meant to be.",
        _LIST,
    ),
    _rule(
        "ignore-hub-only",
        "warning",
        "Entries for experts match vLLM's names too.",
        "vLLM looks experts up as `mlp.experts.0.w1`, whatever the tensors are called: an entry "
        "for another name or another expert does nothing there.",
        "Write the entry for vLLM's name, too.",
    ),
    _rule(
        "ignore-not-judged",
        "warning",
        "The method and the family are ones whose lists can be judged.",
        "How entries are matched, and which modules matter, differs between methods and families.",
        "Known are compressed-tensors, ModelOpt and FP8, of the families `mquant families` lists.",
    ),
)

__all__ = ["QUANTIZED"]
