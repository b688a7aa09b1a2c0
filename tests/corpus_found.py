"""Further cases of the corpus: kinds that differential.py or a person found judged wrongly once."""

from pathlib import Path
from typing import Any, Final

import schemes
from corpus import ATTENTION, Case
from corpus import CASES as FIRST
from make import Row, renamed
from mquant.checkpoint import INDEX_NAME


def _case(name: str, *rules: str, **how: Any) -> Case:
    return Case(name, frozenset(rules), **how)


def _nested(config: dict[str, Any]) -> None:
    config["text_config"] = {"quantization_config": config.pop("quantization_config")}


def _mxfp4(config: dict[str, Any]) -> None:
    config["quantization_config"]["quant_method"] = "mxfp4"


def _ordered(config: dict[str, Any]) -> None:
    schemes.int4(config)
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["actorder"] = "group"


def _suffixed(rows: list[Row]) -> list[Row]:
    scale = f"{ATTENTION}o_proj.weight_scale"
    return renamed(rows, scale, f"{scale}s")


def _beside_mistrals(folder: Path) -> None:
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"")


def _no_tensors(folder: Path) -> None:
    (folder / INDEX_NAME).write_text('{"weight_map": {}}')


FOUND: Final = (
    _case("the model_type of another config class", "family-unknown", config={"model_type": "minimax"}),
    _case("a model_type that nobody knows", "family-unknown", config={"model_type": "no_such_model"}),
    _case("another architecture", "vllm-refuses", config={"architectures": ["MixtralForCausalLM"]}),
    _case("a number in quotes", "vllm-refuses", config={"num_experts_per_tok": "2"}),
    _case("a method that takes no such layers", config=_mxfp4),
    _case("quantization_config inside text_config", "vllm-refuses", config=_nested),
    _case("embeddings said to be tied, with a head on disk", config={"tie_word_embeddings": True}),
    _case("integers in the order of activations", "vllm-refuses", edit=schemes.INT4, config=_ordered),
    _case("a suffix that nobody reads", "part-missing", edit=_suffixed),
    _case("a folder of Mistral's format beside the shards", "vllm-refuses", files=_beside_mistrals),
    _case("an index without tensors", "vllm-refuses", "tensor-not-in-index", files=_no_tensors),
)  # fmt: skip
CASES: Final = FIRST + FOUND
