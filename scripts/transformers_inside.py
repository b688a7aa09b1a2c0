"""Tell the tensors of transformers' own models by the names of the hub. mquant imports it never.

    python transformers_inside.py < QUESTIONS > ANSWERS

The Python of `mquant loader install transformers` runs this file; `transformers_names.py` asks. A
line of QUESTIONS is `{"id": ..., "config": a config.json}`; a line of ANSWERS is the answer, as
`transformers_names.py` describes it. The model is built on torch's meta device, so it costs neither
memory nor time, and `revert_weight_conversion`, which `save_pretrained` uses, undoes the conversion
that transformers applies when it loads. No code of a checkpoint ever runs.
"""

import json
import os
import re
import sys
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TRANSFORMERS_VERBOSITY="error")

import torch
import transformers
from transformers import conversion_mapping, core_model_loading
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]
_AUTO = (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_MAPPING,
)
_NOT_READ = ("quantization_config", "compression_config", "auto_map")


class NoModelError(Exception):
    """transformers has no model for a config; the message says why."""


def plain(config: Config) -> Config:
    """Return a config without what would quantize the model or name code of its own."""
    return {
        key: plain(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_READ
    }


def model_class(config: Config, read: Any) -> Any:
    """Return the class of `architectures`, if it is of the config's family, or the auto class."""
    for name in config.get("architectures") or ():
        found = getattr(transformers, name, None)
        if found is not None and getattr(found, "config_class", None) is type(read):
            return found
    for mapping in _AUTO:
        if type(read) in mapping:
            return mapping[type(read)]
    raise NoModelError(f"transformers reads {config['model_type']}, but has no model of it")


def build(config: Config) -> Any:
    """Return the model on the meta device."""
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise NoModelError(f"transformers {transformers.__version__} knows no model_type {kind}")
    read = CONFIG_MAPPING[kind].from_dict(plain(config))
    dtype = read.dtype or read.get_text_config().dtype or torch.bfloat16
    with torch.device("meta"):
        return model_class(config, read)._from_config(read, dtype=dtype)


def keep_precise(model: Any, tensors: Tensors) -> Tensors:
    """Return the tensors with F32 where transformers keeps parameters of a BF16 model in F32."""
    strict = "|".join(map(re.escape, model._keep_in_fp32_modules_strict or ()))
    if not strict:
        return tensors
    inside = re.compile(rf"(^|\.)({strict})($|\.)")
    return {n: t.float() if inside.search(n) else t for n, t in tensors.items()}


def tied(model: Any, own: Tensors) -> dict[str, str]:
    """Return each parameter that is another one, which alone is on disk: `{name: the other}`."""
    first: dict[int, str] = {}
    sources = set(model.all_tied_weights_keys.values())
    names = sorted(own, key=lambda name: name not in sources)
    result = {}
    for name in names:
        other = first.setdefault(id(model.get_parameter_or_buffer(name)), name)
        if other != name:
            result[name] = other
    return result


def loads_as(model: Any, own: Tensors, names: Any) -> dict[str, str]:
    """Return the parameter that transformers loads a tensor of each name into, if there is one."""
    every = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [row for row in every if isinstance(row, core_model_loading.WeightRenaming)]
    converters = [row for row in every if isinstance(row, core_model_loading.WeightConverter)]
    result = {}
    for name in names:
        target, _ = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, own
        )
        if target in own:
            result[name] = target
    return result


def as_released(model: Any, stored: Tensors) -> Tensors:
    """Return the tensors on disk as releases may have them, though `save_pretrained` does not.

    Each prefix that loading drops if it is there is there, and each tensor that loading transposes
    if its shape asks for it is transposed.
    """
    every = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    for row in every:
        for step in getattr(row, "operations", ()):
            if isinstance(step, core_model_loading.Transpose):
                step.check_dims = False
    model._weight_conversions = every or None  # `revert_weight_conversion` leaves no row out
    result: Tensors = core_model_loading.revert_weight_conversion(model, dict(stored))
    return result


def rows(tensors: Tensors) -> dict[str, list[Any]]:
    """Return `{name: [shape, dtype]}`."""
    return {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in tensors.items()}


def answer(config: Config) -> dict[str, Any]:
    """Return the answer for a config."""
    model = build(config)
    own = keep_precise(model, model.state_dict())
    twins = tied(model, own)
    stored = {name: tensor for name, tensor in own.items() if name not in twins}
    hub = core_model_loading.revert_weight_conversion(model, dict(stored))
    back = loads_as(model, own, hub)
    # Experts lie fused in transformers' model.
    as_they_are = {n: t for n, t in loads_as(model, own, stored).items() if n == t}
    released = as_released(model, stored)
    others = {n: stored[n] for n in as_they_are if n not in hub} | {
        name: t for name, t in released.items() if name not in hub or t.shape != hub[name].shape
    }
    return {
        "verdict": "ok",
        "class": type(model).__name__,
        "tensors": rows(hub),
        "tied": twins,
        "accepts": rows(others),
        "not_loaded": [name for name in hub if name not in back],
        "ignored": sorted(model._keys_to_ignore_on_load_unexpected or ()),
    }


def judge(config: Config) -> dict[str, Any]:
    """Return the answer for a config, also if transformers has none."""
    try:
        return answer(config)
    except NoModelError as error:
        return {"verdict": "no model", "why": str(error)}
    except Exception as error:  # noqa: BLE001  (every exception is transformers' answer)
        return {"verdict": "failed", "why": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer every question."""
    for line in sys.stdin:
        question = json.loads(line)
        row = {"id": question["id"], "transformers": transformers.__version__}
        print(json.dumps(row | judge(question["config"])), flush=True)


if __name__ == "__main__":
    main()
