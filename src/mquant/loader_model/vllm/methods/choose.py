"""How vLLM 0.32 finds a checkpoint's quantization config, and which method the config gets.

The source is `transformers_utils/config.py` (`get_config`), `model_arch_config_convertor.py`,
`config/model.py` (`_verify_quantization`) and `model_loader/weight_utils.py` (`get_quant_config`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mquant.loader_model.vllm.methods import modelopt
from mquant.loader_model.vllm.methods.compressed_tensors import CompressedTensors
from mquant.loader_model.vllm.methods.fp8 import Fp8
from mquant.loader_model.vllm.methods.mxfp4 import ExpertsOnly
from mquant.loader_model.vllm.model import Method
from mquant.loader_model.vllm.tensors import LoadRefused, Unknown

_MODELOPT: Final = (
    "modelopt",
    "modelopt_fp4",
    "modelopt_mxfp8",
    "mxfp8",
    "modelopt_mixed",
)
_GPTQ: Final = (("bits",), ("group_size",), ("desc_act",), ("sym",))
_AWQ: Final = (("w_bit", "bits"), ("q_group_size", "group_size"), ("zero_point",))
_UNMODELLED: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "awq": _AWQ,
    "auto_awq": _AWQ,
    "awq_marlin": _AWQ,
    "gptq": _GPTQ,
    "auto_gptq": _GPTQ,
    "gptq_marlin": _GPTQ,
    "humming": (),
    "quark": (("export",),),
    "moe_wna16": (("bits",), ("group_size",)),
    "torchao": (("quant_type",),),
    "inc": (("bits",), ("group_size",)),
    "gpt_oss_mxfp4": (),
    "deepseek_v4_fp8": (),
}
"""Methods that are not modelled, and the keys (one of each) without which vLLM refuses them."""
_EXPERTS_ONLY: Final = ("mxfp4", "experts_int8")
_DEPRECATED: Final = ("fbgemm_fp8", "fp_quant")
_ONLINE: Final = (
    "online",
    "fp8_per_tensor",
    "fp8_per_block",
    "fp8_per_channel",
    "int8_per_channel_weight_only",
    "nvfp4_per_token",
)
"""Methods that quantize while vLLM loads; a checkpoint cannot ask for them."""
_RENAMED: Final = {"gptq": "auto_gptq", "awq": "auto_awq", "auto-round": "inc"}
_BY_PRODUCER: Final = {
    "FP8": "modelopt",
    "FP8_PER_CHANNEL_PER_TOKEN": "modelopt",
    "FP8_PB_WO": "modelopt",
    "NVFP4": "modelopt_fp4",
}
"""ModelOpt's algorithm in a file of its own -> the method."""
_NO_FLOAT16: Final = ("modelopt_mxfp8", "mxfp8", "mxfp4")
_WHERE: Final = "config.json"
_FILE: Final = "hf_quant_config.json"


@dataclass(frozen=True)
class Chosen:
    """A quantization method of vLLM, by vLLM's name, and the config that the method parses."""

    method: str
    config: Mapping[str, Any]


def choose(
    config: Mapping[str, Any], hf_quant_config: Any = None, text: Mapping[str, Any] | None = None
) -> Chosen | None:
    """Return the method and its config; None if vLLM takes the checkpoint for unquantized.

    `hf_quant_config` is the content of that file, None without the file. `text` is the table with
    the text model's keys, None without a table. Raises LoadRefused if vLLM
    stops, and Unknown for a method that is not modelled.
    """
    where, table = _find(config, hf_quant_config)
    if table is None and text is not None:
        where, table = _find(text, None)
    if table is None:
        return None
    name = table.get("quant_method", "")
    if not isinstance(name, str):
        raise LoadRefused(where, "has a quant_method that is no text")
    name = name.lower().replace("compressed_tensors", "compressed-tensors")
    table = {**table, "quant_method": name}
    method = _overridden(name, table)
    if not method:
        return None
    if method in _DEPRECATED:
        raise LoadRefused(where, f"asks for {method}, which vLLM calls deprecated")
    if method in _ONLINE:
        raise LoadRefused(where, f"asks for {method}, which vLLM takes from no checkpoint")
    if method in _UNMODELLED:
        for keys in _UNMODELLED[method]:
            if table.keys().isdisjoint(keys):
                raise LoadRefused(where, f"has no {' or '.join(keys)}, which {method} reads")
        raise Unknown(f"the quantization method {method}")
    if method not in (*_MODELOPT, *_EXPERTS_ONLY, "fp8", "compressed-tensors"):
        raise LoadRefused(where, f"asks for the quantization method {method!r}")
    if method in _NO_FLOAT16 and config.get("dtype", config.get("torch_dtype")) == "float16":
        raise LoadRefused(_WHERE, f"has torch_dtype float16, and {method} takes bfloat16 only")
    if method == "modelopt_mixed" and "quantized_layers" not in table:
        return Chosen(method, _from_file(hf_quant_config))
    return Chosen(method, table)


def _find(config: Mapping[str, Any], hf_quant_config: Any) -> tuple[str, Mapping[str, Any] | None]:
    """Return the file that has the quantization config, and the config, if there is one."""
    where, table = _WHERE, config.get("quantization_config")
    if table is None and hf_quant_config is not None:
        where, table = _FILE, hf_quant_config
    by_producer = table is not None
    if table is None:
        table = config.get("compression_config")
    if table is not None and not isinstance(table, Mapping):
        raise LoadRefused(where, "has a quantization config that is no table")
    return where, _by_producer(where, table) if by_producer and table is not None else table


def _by_producer(where: str, table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config with the quant_method of ModelOpt's algorithm, if ModelOpt wrote it."""
    producer, nested = table.get("producer", {}), table.get("quantization", {})
    if not isinstance(producer, Mapping):
        raise LoadRefused(where, "has a `producer` that is no table")
    legacy = isinstance(nested, Mapping) and "modelopt_quant_config" in nested
    if producer.get("name") != "modelopt" and not legacy:
        return table
    if not isinstance(nested, Mapping):
        raise LoadRefused(where, "has a `quantization` that is no table")
    algo = nested.get("quant_algo")
    if algo is None:
        return table
    if str(algo).upper() not in _BY_PRODUCER:
        raise LoadRefused(where, f"has the quant_algo {algo!r} of ModelOpt")
    return {**table, "quant_method": _BY_PRODUCER[str(algo).upper()]}


def _overridden(method: str, table: Mapping[str, Any]) -> str:
    """Return the method after vLLM asked every class whether the class takes the config."""
    if method in _RENAMED:
        return _RENAMED[method]
    _dynamic(table)
    if not method.startswith("modelopt"):
        return method
    values = table.get("quantization", table)
    if not isinstance(values, Mapping):
        return method
    algo = str(values.get("quant_algo", "")).upper()
    if algo == "FP8":
        return "modelopt"
    if "FP4" in algo:
        return "modelopt_fp4"
    if "MXFP8" in algo:
        return "modelopt_mxfp8"
    return "modelopt_mixed" if algo == "MIXED_PRECISION" else method


def _dynamic(table: Mapping[str, Any]) -> None:
    """Stop where vLLM does when vLLM looks, in every config, for GPTQ's rules for single layers."""
    ordered = table.get("desc_act") and table.get("group_size") != -1
    if not ordered and not isinstance(table.get("dynamic") or {}, Mapping):
        raise LoadRefused(_WHERE, "has a `dynamic` that is no table")


def _from_file(hf_quant_config: Any) -> Mapping[str, Any]:
    """Return the content of ModelOpt's file, where older exports list the layers."""
    if hf_quant_config is None:
        raise LoadRefused(_WHERE, f"has no quantized_layers, and there is no {_FILE}")
    producer = hf_quant_config.get("producer", {}) if isinstance(hf_quant_config, Mapping) else None
    if not isinstance(producer, Mapping) or producer.get("name") != "modelopt":
        raise LoadRefused(_FILE, "does not say that ModelOpt wrote it")
    content: Mapping[str, Any] = hf_quant_config
    return content


def read_method(
    config: Mapping[str, Any],
    hf_quant_config: Any,
    heads: tuple[int, int],
    text: Mapping[str, Any] | None = None,
) -> Method | None:
    """Return the method that vLLM builds; None if vLLM takes the checkpoint for unquantized.

    `heads` are the numbers of query heads and KV heads; `text` is as for `choose`. Raises
    LoadRefused if vLLM stops, and Unknown.
    """
    chosen = choose(config, hf_quant_config, text)
    if chosen is None:
        return None
    if chosen.method in _MODELOPT:
        return modelopt.parse(chosen.method, chosen.config)
    if chosen.method == "compressed-tensors":
        return CompressedTensors.parse(chosen.config, *heads)
    if chosen.method == "fp8":
        return Fp8.parse(chosen.config)
    if chosen.method in _EXPERTS_ONLY:
        return ExpertsOnly(chosen.method)
    raise Unknown(f"the quantization method {chosen.method}")
