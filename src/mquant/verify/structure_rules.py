"""The rules that headers and JSON are judged by."""

from typing import Final

from mquant.verify.rules import Rule, register

_AGAIN: Final = "Get the shards and the index again, from one revision."
_MAKE_AGAIN: Final = "Quantize again, with a tool that writes the whole module."
_SILENT: Final = (
    "vLLM turns its missing-weight check off for quantized models: what is missing stays "
    "uninitialised, and the model talks nonsense."
)
_FUSED: Final = "Loaders make one matrix of the members, quantized in one way, or refuse to."


def _error(name: str, what: str, why: str, fix: str) -> Rule:
    return Rule(name, "error", "structure", what, why, fix)


def _warning(name: str, what: str, why: str, fix: str) -> Rule:
    return Rule(name, "warning", "structure", what, why, fix)


register(
    # Files and index
    _error(
        "shard-damaged",
        "Every shard's header is valid and describes the file as it is, to its last byte.",
        "A truncated or damaged shard does not load, or loads other numbers.",
        "Download the shard again.",
    ),
    _error(
        "shard-missing",
        "Every shard that the index names is there.",
        "Loaders stop, or leave the shard's tensors uninitialised.",
        "Download the missing shards.",
    ),
    _warning(
        "index-missing",
        "Several shards come with an index.",
        "vLLM reads whatever lies in the folder; other loaders look for one shard, and stop.",
        "Download model.safetensors.index.json too.",
    ),
    _error(
        "tensor-stored-twice",
        "Every tensor is stored once.",
        "Which of the two is loaded depends on the order of files.",
        "Remove the shard that does not belong to this checkpoint.",
    ),
    _warning(
        "index-without-tensor",
        "Every tensor that the index lists is in a shard.",
        "vLLM goes by the shards, other loaders stop. (A tensor that the model lacks is an error "
        "of its own.)",
        _AGAIN,
    ),
    _warning(
        "index-wrong-shard",
        "The index names the shard that holds the tensor.",
        "vLLM goes by the shards; tools that read by the index fail, or find nothing.",
        _AGAIN,
    ),
    _warning(
        "shard-not-in-index",
        "Every shard is one that the index names.",
        "Loaders pass it over: it costs a download, or is what should have been loaded.",
        "Remove the file, or get the index again, from one revision.",
    ),
    _warning(
        "tensor-not-in-index",
        "Every tensor in the shards is in the index.",
        "vLLM loads it all the same, other loaders do not: they load different models.",
        _AGAIN,
    ),
    _warning(
        "total-size-wrong",
        "The index's total_size is the bytes of all tensors.",
        "Tools plan memory by it.",
        "Set metadata.total_size in the index to the true number.",
    ),
    # Names and completeness
    _warning(
        "family-unknown",
        "config.json's model_type is of a family mquant knows.",
        "Without it nobody can say which tensors must be there, and how large.",
        "Give the family, one YAML file, with --family FILE: see docs/adding-a-family.md.",
    ),
    _error(
        "tensor-unknown",
        "Every tensor is one that the family has, or a part of one that is quantized.",
        "Loaders refuse it, or drop it without a word.",
        "Remove it, or, if it belongs to the model, add its name to the family's file.",
    ),
    _error(
        "tensor-renamed",
        "Tensors have the names of the original release, not those of a loaded model.",
        "vLLM knows the original names only; what it does not know it refuses, or drops.",
        "Save again with the original names, or quantize with mquant, which keeps them.",
    ),
    _error(
        "tensor-missing",
        "Every tensor of the model is there.",
        _SILENT,
        "Get the checkpoint again.",
    ),
    _error(
        "expert-gap",
        "The experts of a layer are numbered without gaps.",
        _SILENT,
        "Number the experts without gaps, or get the missing shards.",
    ),
    _error(
        "experts-disagree",
        "Every layer has as many experts as config.json says.",
        "vLLM takes more or fewer without an error; routing then points at the wrong ones.",
        "Set the number in config.json to what the shards hold, or get the right shards.",
    ),
    _error(
        "layers-disagree",
        "There are as many layers as config.json says.",
        "Layers beyond the number are refused or dropped.",
        "Set the number in config.json to what the shards hold, or get the right shards.",
    ),
    _error(
        "fused-set-incomplete",
        "A fused set has all its members.",
        _SILENT,
        "Get the missing shards.",
    ),
    _error(
        "shape-disagrees",
        "Shapes are those that config.json implies; of a quantized weight, what it unpacks to.",
        "Loaders refuse it, or copy what fits: for experts without an error.",
        "Take config.json and shards from the same checkpoint.",
    ),
    # Quantized modules
    _error(
        "part-missing",
        "A quantized module has its codes and all its scales.",
        _SILENT,
        _MAKE_AGAIN,
    ),
    _error(
        "part-unexpected",
        "A quantized module has no tensor that its layout does not know.",
        "vLLM refuses parameters it has no place for; under experts it drops them.",
        "Remove the tensor, or quantize again.",
    ),
    _error(
        "part-dtype",
        "Codes and scales have the dtype of their layout.",
        "vLLM converts the numbers without an error: U8 scales become other scales.",
        _MAKE_AGAIN,
    ),
    _error(
        "part-shape",
        "Codes and scales of a module fit each other.",
        "vLLM copies what fits of an expert's scales, without an error.",
        _MAKE_AGAIN,
    ),
    _error(
        "weight-stored-twice",
        "A module has either a plain weight or a quantized one.",
        "Which of the two is loaded depends on the loader.",
        "Remove the one that config.json does not describe.",
    ),
    _error(
        "fused-set-mixed",
        "The members of a fused set are quantized alike, or all plain.",
        _FUSED,
        "Quantize all members, or put all of them in ignore.",
    ),
    _error(
        "experts-mixed",
        "The experts of a layer are quantized alike, or all plain.",
        "Engines run them in one kernel: one BF16 expert among quantized ones is refused.",
        "Quantize all experts of the layer, or none.",
    ),
    _error(
        "activation-scales-missing",
        "Where config.json declares static scales of activations, the tensors are there.",
        "vLLM loads without them and multiplies by what lay in memory.",
        "Calibrate again, or declare weights only (input_activations: null).",
    ),
    _error(
        "activation-scales-undeclared",
        "Where there are scales of activations, config.json declares them.",
        "Loaders of weight-only layouts have no place for the tensors and refuse them.",
        "Declare input_activations, or remove the tensors.",
    ),
    # config.json
    _error(
        "config-key-unusable",
        "config.json has the numbers that tensors are counted and measured by.",
        "No loader can build the model without them.",
        "Take config.json from the model's repo.",
    ),
    _error(
        "config-key-missing",
        "config.json has the keys without which engines do not build the model.",
        "vLLM and SGLang stop when they load the model.",
        "Take the key from config.json of the original release.",
    ),
    _warning(
        "quantization-unused",
        "A declared quantization has tensors it applies to.",
        "Loaders wait for scales that are not there.",
        "Remove quantization_config from config.json, or get the quantized shards.",
    ),
    _error(
        "quantization-config-invalid",
        "The quantization_config is one that loaders can parse.",
        "vLLM stops at what it does not understand.",
        "Take the quantization_config that the tool wrote.",
    ),
    _error(
        "weights-misdeclared",
        "The type, bits and group size in config_groups are those of the tensors.",
        "vLLM chooses the kernel by them: it stops, or expects other shapes.",
        "Take the quantization_config that the tool wrote.",
    ),
    _warning(
        "layout-not-judged",
        "Quantized modules are in a layout that mquant knows.",
        "Of others (MXFP4, GPTQ, INT8) neither parts nor numbers can be judged.",
        "Known are NVFP4, FP8 and packed integers of compressed-tensors, ModelOpt and FP8-block.",
    ),
    _warning(
        "format-differs",
        "The declared format is the one the tensors have.",
        "vLLM goes by the tensors; tools that unpack by the format fail.",
        "Set format in quantization_config to what the tensors are.",
    ),
)
