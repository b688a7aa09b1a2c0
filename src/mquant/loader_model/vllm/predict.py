"""What vLLM does with a checkpoint, predicted from its headers and config.json."""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from itertools import chain, islice
from typing import Any, Final

from mquant.checkpoint import INDEX_NAME, Checkpoint, read_header, read_json
from mquant.errors import HeaderError, SourceError
from mquant.family import Family
from mquant.loader_model.vllm.config_names import built_as, config_class, is_proven
from mquant.loader_model.vllm.config_types import check_nulls
from mquant.loader_model.vllm.load import Outcome, load
from mquant.loader_model.vllm.methods.choose import read_method
from mquant.loader_model.vllm.model import Model, build
from mquant.loader_model.vllm.tensors import Loaded, LoadRefused, Unknown
from mquant.loader_rows import Settings, VllmRows

VERSION: Final = "0.32"
"""The vLLM that the model follows."""
MODELOPT_FILE: Final = "hf_quant_config.json"
_TIES: Final = "tie_word_embeddings"
_MISTRAL: Final = "consolidated*.safetensors"
_MISTRAL_CONFIG: Final = "params.json"
_MISTRAL_INDEX: Final = "consolidated.safetensors.index.json"
_POOLING: Final = "modules.json"


def predict(checkpoint: Checkpoint, family: Family | None) -> Outcome:
    """Return what vLLM does with a checkpoint, or the reason why it is not known.

    `family` is that of the model_type in config.json.
    """
    if gap := _unread(checkpoint):
        return Outcome(unknown=gap)
    if fault := _no_weights(checkpoint):
        return Outcome(refused=("the shards", fault))
    tensors, hf_quant_config = _in_order(checkpoint), _of_modelopt(checkpoint)
    return predict_of(checkpoint.config, family, tensors, hf_quant_config)


def predict_of(
    config: Mapping[str, Any],
    family: Family | None,
    tensors: Iterable[Loaded],
    hf_quant_config: Any = None,
) -> Outcome:
    """Return what vLLM does with a config.json and tensors in this order, as `predict` does.

    `hf_quant_config` is the content of ModelOpt's file, None without the file.
    """
    if family is not None and family.vllm is None:
        return Outcome(unknown=f"{family.title}, whose file does not say what vLLM builds")
    rest = iter(tensors)
    try:
        # All tensors only if they decide something: a list of a million takes 70 MB.
        ties = _ties(config, family)
        first = list(rest if ties else islice(rest, 1))
    except HeaderError as error:
        return Outcome(refused=("the shards", error.message))
    config = _untied(config, first) if ties else config
    outcome = load(lambda: _model(family, config, hf_quant_config), chain(first, rest))
    if outcome.loads and not is_proven(config):
        read_as = _reads(config, family)
        if read_as is not built_as(config, read_as):
            return Outcome(unknown="config.json in the config class of another model")
    return outcome


def _reads(config: Mapping[str, Any], family: Family | None) -> VllmRows | None:
    """Return how transformers reads config.json: by its model_type, whatever vLLM builds."""
    return family.vllm if family else config_class(config.get("model_type"))


def _ties(config: Mapping[str, Any], family: Family | None) -> bool:
    """Return whether config.json ties the embeddings, or its config class without a word."""
    usual = family.vllm.settings.get(_TIES) if family and family.vllm else False
    return config.get(_TIES, usual) is True


def _untied(config: Mapping[str, Any], tensors: Iterable[Loaded]) -> Mapping[str, Any]:
    """Return the config after vLLM's `maybe_untie_word_embeddings`: a head on disk is loaded."""
    stored = any(loaded.name.endswith("lm_head.weight") for loaded in tensors)
    return {**config, _TIES: False} if stored else config


def split(checkpoint: Checkpoint, family: Family, ranks: int) -> str:
    """Return why several ranks cannot share vLLM's model of a checkpoint; empty if they can."""
    try:
        _model(family, checkpoint.config, _of_modelopt(checkpoint), ranks)
    except LoadRefused as stop:
        return f"on a rank, {stop.where} {stop.why}"
    except Unknown as gap:
        return f"what vLLM makes of {gap} is not known"
    return ""


def _model(
    family: Family | None, config: Mapping[str, Any], hf_quant_config: Any, ranks: int = 1
) -> Model:
    read_as = _reads(config, family)
    rows = built_as(config, read_as)
    settings = Settings(rows, config, read_as)
    heads = settings.number("num_attention_heads") or 0
    heads_of = heads, settings.number("num_key_value_heads") or heads
    text = settings.config if settings.nested else None
    if family and family.nested:
        check_nulls(config, family.synth.config, family.nested)
    method = read_method(config, hf_quant_config, heads_of, text)
    return build(rows, settings, method, ranks)


def _unread(checkpoint: Checkpoint) -> str:
    """Return the file from which vLLM takes what is not told here; empty if there is none."""
    files = checkpoint.source.files
    if _MISTRAL_CONFIG in files and _of_mistral(checkpoint):
        return f"{_MISTRAL_CONFIG}, which vLLM reads instead of config.json"
    if _MISTRAL_INDEX in files and _of_mistral(checkpoint):
        return _MISTRAL_INDEX
    return f"{_POOLING} of sentence-transformers" if _POOLING in files else ""


def _no_weights(checkpoint: Checkpoint) -> str:
    """Return why vLLM finds no file of weights; empty if vLLM finds one.

    vLLM looks for files of Mistral's format in every folder, but reads those in the first.
    """
    if own := _of_mistral(checkpoint):
        if all("/" in path for path in own):
            return f"lie beside {own[0]}, for which vLLM takes all weights for Mistral's format"
    elif INDEX_NAME in checkpoint.source.files and not checkpoint.index:
        return f"are not in {INDEX_NAME}, which is empty"
    return ""


def _of_modelopt(checkpoint: Checkpoint) -> Any:
    """Return the content of ModelOpt's file; no table if vLLM cannot read the file."""
    if MODELOPT_FILE not in checkpoint.source.files:
        return None
    try:
        return read_json(checkpoint.source, MODELOPT_FILE)
    except SourceError:
        return ()


def _of_mistral(checkpoint: Checkpoint) -> list[str]:
    """Return the shards of Mistral's own format, in all folders."""
    paths = checkpoint.source.files
    return sorted(path for path in paths if fnmatch(path.rpartition("/")[2], _MISTRAL))


def _in_order(checkpoint: Checkpoint) -> Iterator[Loaded]:
    """Yield every tensor in the order in which vLLM reads the files.

    If there are files of Mistral's own format, vLLM reads no others.
    """
    source = checkpoint.source
    if own := _of_mistral(checkpoint):
        first = [path for path in own if "/" not in path]
        for info in [info for path in first for info in read_header(source, path)]:
            yield Loaded(info.name, info.dtype, tuple(info.shape))
        return
    number = {shard: place for place, shard in enumerate(checkpoint.shards)}
    tensors = [*checkpoint.tensors.values(), *checkpoint.again]
    for info in sorted(tensors, key=lambda each: number.get(each.shard, 0)):
        yield Loaded(info.name, info.dtype, tuple(info.shape))
