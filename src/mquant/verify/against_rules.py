"""The rules of a comparison with the parent."""

from mquant.verify.rules import Rule, register


def _rule(name: str, what: str, why: str, fix: str, *, warns: bool = False) -> Rule:
    return Rule(name, "warning" if warns else "error", "against", what, why, fix)


register(
    _rule(
        "parent-tensor-missing",
        "Every tensor of the parent is there, plain or quantized.",
        "What is missing stays uninitialised: vLLM does not look in quantized models.",
        "Quantize again, or copy the tensors from the parent.",
    ),
    _rule(
        "parent-lacks-tensor",
        "Every tensor belongs to one of the parent's.",
        "It is another model, or loaders drop the tensor.",
        "Give the parent it was made from, or remove the tensor.",
    ),
    _rule(
        "kept-tensor-differs",
        "What is not quantized is bit-identical to the parent, dtype included.",
        "A router cast from F32 to BF16 sends tokens to other experts.",
        "Copy the tensor from the parent.",
    ),
    _rule(
        "weight-beyond-bound",
        "Dequantized weights are as near to the parent's as rounding leaves them: in NVFP4, "
        "within amax/3 * 17/16 of each block.",
        "Swapped nibbles, rows, experts or scales load without an error.",
        "Quantize again. Weights that other tools change on purpose (AWQ, SmoothQuant) have no "
        "parent to be compared with.",
    ),
    _rule(
        "weight-error-high",
        "The relative error of a whole weight is one that rounding explains (NVFP4: about 0.1).",
        "The scales are badly chosen, or of another weight.",
        "Quantize again, and compare the tools.",
        warns=True,
    ),
    _rule(
        "weight-not-compared",
        "Quantized weights are in a layout that verify can dequantize.",
        "Whether the others are near the parent's, nobody has looked.",
        "Compare them with the tool that wrote them; those of NVFP4, ModelOpt, FP8 and symmetric "
        "integers of 4 and 8 bits are compared here.",
        warns=True,
    ),
    Rule(
        "scaled-not-compared",
        "info",
        "against",
        "What AWQ scaled by factors that no norm tells (norms, w3 and w2) has the parent's shape.",
        "AWQ divides a norm by what it multiplies the columns of all that reads it with, routers "
        "too: there both are compared. Of other factors nothing is known.",
        "Nothing to do: mquant eval --against says what all of it makes of a text.",
    ),
    _rule(
        "config-key-lost",
        "config.json has every key of the parent's.",
        "Loaders take a default, and compute something else: rope_theta, rotary_dim.",
        "Copy the keys from the parent's config.json.",
    ),
    _rule(
        "config-key-differs",
        "config.json says what the parent's says.",
        "Loaders compute something else than the model was trained for.",
        "Copy the keys from the parent's config.json.",
    ),
    _rule(
        "side-file-missing",
        "Tokenizer, chat template, generation config and model code of the parent are there.",
        "Without them engines do not serve it, or with other prompts and sampling.",
        "Copy the files from the parent.",
    ),
    _rule(
        "side-file-differs",
        "Tokenizer, chat template, generation config and model code are the parent's.",
        "Another template or tokenizer is another model to its users.",
        "Copy the files from the parent.",
        warns=True,
    ),
    _rule(
        "licence-missing",
        "The parent's licence is there.",
        "Most licences ask for it in every copy.",
        "Copy the file from the parent.",
        warns=True,
    ),
)
