"""The parent as a transformers model whose weights stay in its shards.

The model is built on torch's meta device and stays there. `ParentCache`, an offload cache of
compressed-tensors, reads a weight when code accesses the weight. So memory holds only the weights
in use, whatever the model's size. This module cannot write to the parent.
"""

import json
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from compressed_tensors.offload import cache as offload_cache
from compressed_tensors.offload import offload_module
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mquant.checkpoint import Source, TensorInfo
from mquant.checkpoint.slices import read_bytes
from mquant.engines.replaced import replaced
from mquant.errors import EngineError

DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Read = Callable[[], torch.Tensor]


class ParentCache(offload_cache.OffloadCache):  # type: ignore[misc]  # untyped base
    """A module's tensors: the parent's tensors are read on every access, new tensors are kept.

    `offloaded_values` holds meta tensors only. `reads` says where the parent's tensors come from;
    `own` holds the values of new tensors, and `blank` the new tensors without a value. While the
    onload device is meta (until a pipeline sets another device), no tensor is read or allocated.
    """

    offload_device = torch.device("cpu")

    def __init__(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str | None = None,
        *,
        reads: Mapping[torch.Tensor, Read],
    ) -> None:
        super().__init__(onload_device, offload_device)
        self.reads = reads
        self.own: dict[torch.Tensor, torch.Tensor] = {}
        self.blank: set[torch.Tensor] = set()

    def onload(self, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        """Return the tensor on the onload device; the meta tensor if no value is known."""
        if offloaded is None or torch.device(self.onload_device).type == "meta":
            return offloaded
        if offloaded in self.own:
            return self.own[offloaded].to(self.onload_device)
        if offloaded in self.reads:
            return self.reads[offloaded]().to(self.onload_device)
        if offloaded in self.blank:
            value = torch.empty_like(offloaded, device=self.onload_device)
            return torch.nn.Parameter(value, requires_grad=False)
        return offloaded

    def offload(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Return a meta tensor for a new tensor, and keep the new value unless it is meta."""
        if tensor is None or tensor.is_meta:
            return tensor
        offloaded = torch.nn.Parameter(tensor.to("meta"), requires_grad=False)
        self.own[offloaded] = tensor.detach()
        return offloaded

    def update_offload(self, offloaded: torch.Tensor, data: torch.Tensor | None) -> None:
        """Keep a new value, in the tensor's own dtype."""
        if data is None:
            return
        self.own[offloaded] = data.detach().to(offloaded.dtype).reshape_as(offloaded)
        if offloaded in self.keep_onloaded_values:
            self.keep_onloaded_values[offloaded] = self.own[offloaded].to(self.onload_device)

    def forget(self) -> None:
        """Drop every value that does not come from the parent."""
        self.own.clear()

    def __setitem__(self, key: Hashable, value: torch.Tensor | None) -> None:
        """Add or replace a tensor. A new meta tensor, such as a scale, gets memory on access."""
        new = key not in self
        super().__setitem__(key, value)
        if new and value is not None and value.is_meta:
            self.blank.add(self.offloaded_values[key])

    def __delitem__(self, key: Hashable) -> None:
        self.own.pop(self.offloaded_values[key], None)
        super().__delitem__(key)


def build_model(folder: Path, config: Mapping[str, Any]) -> PreTrainedModel:
    """Build the architecture, with one Linear per expert matrix and every tensor on meta.

    `folder` becomes the model's name_or_path: oneshot reads config.json in `folder` again.
    Raises EngineError if transformers does not know the architecture or refuses the config.
    """
    # Without auto_map, only transformers' own code runs, and no prompt asks for trust.
    plain = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        # Not `write_whole`: the folder is this process's own.
        (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    except OSError as error:
        raise EngineError(
            f"The temporary folder cannot be written: {error.strerror}.",
            "Free space there, or set TMPDIR to another folder.",
        ) from error
    try:
        parsed = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                parsed, trust_remote_code=False
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise EngineError(
            f"transformers cannot build this model from config.json: {reason}",
            "Compare config.json with the one in the model's repo.",
        ) from error
    _rotate(model, config)
    with torch.device("meta"):
        for name, experts in get_non_linearized_moes(model):
            linear = LinearExperts2D.get_linear_experts_cls(type(experts))(parsed)
            model.set_submodule(name, linear)
    return model.eval()


def _rotate(model: PreTrainedModel, config: Mapping[str, Any]) -> None:
    """Give the model the RoPE that config.json describes, with values instead of meta tensors.

    transformers 5 ignores `rotary_dim`, and would rotate the whole head.
    """
    parsed: Any = model.config
    if "rotary_dim" in config and config.get("head_dim"):
        factor = config["rotary_dim"] / config["head_dim"]
        parsed.rope_parameters.setdefault("partial_rotary_factor", factor)
    for name, module in list(model.named_modules()):
        if hasattr(module, "inv_freq"):
            model.set_submodule(name, type(module)(config=parsed))


def attach(model: PreTrainedModel, source: Source, tensors: Mapping[str, TensorInfo]) -> None:
    """Make every parameter and buffer read from the parent, in the parent's dtype.

    `tensors` maps names in memory to the parent's tensors. A model tensor that `tensors` lacks
    stays on meta, and using such a tensor is an error. Raises EngineError if shapes differ.
    """
    reads: dict[torch.Tensor, Read] = {}
    for prefix, module in model.named_modules():
        for slot in (module._parameters, module._buffers):
            for name in list(slot):
                info = tensors.get(f"{prefix}.{name}")
                if slot[name] is None or info is None:
                    continue
                _expect_shape(f"{prefix}.{name}", slot[name], info)
                meta = torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
                if slot is module._parameters:
                    meta = torch.nn.Parameter(meta, requires_grad=False)
                slot[name] = meta
                reads[meta] = partial(read_tensor, source, info)
    # compressed-tensors chooses a cache class by device; this class serves all devices.
    with replaced(offload_cache.OffloadCache, "cls_from_device", lambda _device: ParentCache):
        for module in model.modules():
            offload_module(module, "meta", ParentCache.offload_device, reads=reads)


def read_tensor(source: Source, info: TensorInfo) -> torch.Tensor:
    """Read one tensor. The file is not memory-mapped, so that the memory can be freed."""
    data = bytearray(read_bytes(source, info))
    return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(info.shape)


def _expect_shape(name: str, built: torch.Tensor | None, info: TensorInfo) -> None:
    if built is not None and tuple(built.shape) != info.shape:
        raise EngineError(
            f"transformers builds {name} as {list(built.shape)}, the checkpoint has "
            f"{list(info.shape)}.",
            "Take config.json and shards from the same checkpoint.",
        )
