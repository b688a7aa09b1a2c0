"""Run by vLLM's own Python, never imported by mquant: load a checkpoint's headers, say what came.

    python vllm_probe.py FOLDER RESULT [FOLDER RESULT ...]

FOLDER holds a checkpoint whose shards need no data (sparse files do). vLLM parses its config,
builds the model on torch's meta device and loads tensors that have a dtype and a shape only. Every
copy that vLLM's loaders make is watched, and so what they drop, leave out, bend into another shape
or convert is known, whatever the model or the layout. RESULT becomes a JSON object, each made in a
process of its own:

    vllm            version
    stage           what was reached: start, config, model, weights, done
    error, kind     vLLM's own words and the exception's class, where it stopped
    dropped         names of tensors that went nowhere
    unset           [parameter, elements it lacks] of those not, or not wholly, loaded
    reshaped        [tensor, its shape, the shape it was copied into]
    converted       [tensor, its dtype, the dtype it was copied into], where that loses its meaning
    tensors         how many were offered

The process may die; then RESULT has the last stage it reached.
"""

import json
import math
import os
import resource
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before vLLM is imported: no compilation, no telemetry, no network, the CPU.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_USE_RAY_COMPILED_DAG="0",
    CUDA_VISIBLE_DEVICES="",
)

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MEMORY = 16 << 30
"""Bytes vLLM may take: a config.json that asks for a billion layers gets no more."""
MOST = 200  # of each list; `counts` has the true numbers


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows offered tensors through views and conversions, and notes where they are copied."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._origin: dict[int, str] = {}
        self._kept: list[Any] = []  # a storage that is freed would give its address to another
        self._sizes: dict[str, int] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._used: dict[str, int] = defaultdict(int)
        self._written: dict[int, set[tuple[int, tuple[int, ...], tuple[int, ...]]]] = defaultdict(
            set
        )
        self.reshaped: dict[str, tuple[str, list[int], list[int]]] = {}
        self.converted: dict[str, tuple[str, str, str]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles here; the guard takes as long as all else

    def offer(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor of the checkpoint, about to be loaded."""
        self._mark(tensor, name)
        self._sizes[name] = tensor.numel()
        self._dtypes[name] = tensor.dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "copy_":
            self._copy(args[0], args[1])
            return args[0]
        if name in ("_local_scalar_dense", "item"):
            raise RuntimeError("the value of a tensor was asked for; only headers are here")
        made = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(made, torch.Tensor) and self._of(made) is None:
            sources = [a for a in args if isinstance(a, torch.Tensor)]
            origin = next((self._of(a) for a in sources if self._of(a)), None)
            if origin:  # converted, or made contiguous; a view has its storage
                self._mark(made, origin)
        return made

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        name = self._of(source)
        if name is None:
            return  # not from the checkpoint: a default, or one buffer into another
        target_shape, shape = list(target.shape), list(source.shape)
        if [n for n in target_shape if n != 1] != [n for n in shape if n != 1]:
            source.expand_as(target)  # raises as the real copy would
            if not (source.numel() == 1 and target.numel() <= 1):
                self.reshaped.setdefault(name, (name, shape, target_shape))
        self._used[name] += source.numel()
        if _loses(self._dtypes[name], target.dtype):
            row = (name, str(self._dtypes[name]), str(target.dtype))
            self.converted.setdefault(name, row)
        place = (int(target.storage_offset()), tuple(target.shape), tuple(target.stride()))
        self._written[_storage(target)].add(place)
        if self._of(target) is None:
            self._kept.append(target.untyped_storage())

    def dropped(self) -> list[str]:
        """Tensors of which nothing, or not all, was copied anywhere."""
        return [name for name, size in self._sizes.items() if self._used[name] < size]

    def unset(self, model: torch.nn.Module) -> list[tuple[str, int]]:
        """Parameters, and how many of their elements came from nowhere."""
        rows = []
        for name, parameter in model.named_parameters():
            places = self._written.get(_storage(parameter), set())
            came = min(parameter.numel(), _area(places))
            if came < parameter.numel() and not _needless(model, name):
                rows.append((name, parameter.numel() - came))
        return rows

    def _of(self, tensor: torch.Tensor) -> str | None:
        return self._origin.get(_storage(tensor))

    def _mark(self, tensor: torch.Tensor, name: str) -> None:
        self._origin[_storage(tensor)] = name
        self._kept.append(tensor.untyped_storage())


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _area(places: set[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> int:
    """Elements covered. Loaders write rows or columns of a matrix; the same place counts once."""
    return sum(math.prod(shape) for _, shape, _ in places)


def _loses(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a copy changes what the bytes mean. Between float types of 16 bits and more: no."""
    usual = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
    return source != target and not {source, target} <= usual


def _needless(model: torch.nn.Module, name: str) -> bool:
    """Parameters that no checkpoint has to fill: weight-only layers never read input scales."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    module, _, last = name.rpartition(".")
    method = getattr(model.get_submodule(module), "quant_method", None)
    method = getattr(model.get_submodule(module), "scheme", method)
    if "input_global_scale" in last:
        return bool(getattr(method, "use_a16", False))
    return isinstance(method, BaseKVCacheMethod)  # optional, with defaults


def stub_kernels() -> None:
    """Which kernel would compute is no question of loading, and needs a GPU to answer."""
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as moe,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w4a4_nvfp4 as linear,
    )

    linear.init_nvfp4_linear_kernel = lambda **_: SimpleNamespace(input_quant_key=lambda: None)
    moe.select_nvfp4_moe_backend = lambda **_: (nvfp4.NvFp4MoeBackend.MARLIN, None)


def load(folder: str, result: dict[str, Any], said: Any) -> None:
    """Do as vLLM does, noting in `result` what was reached."""
    import tempfile

    from vllm import __version__
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    result["vllm"] = __version__
    stub_kernels()
    said("config")
    arguments = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=1,
    )
    config = arguments.create_engine_config()
    said("model")
    with ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(config))
        where = stack.enter_context(tempfile.TemporaryDirectory())
        init_distributed_environment(1, 0, f"file://{where}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        stack.enter_context(set_default_torch_dtype(config.model_config.dtype))
        with torch.device("meta"):
            model = initialize_model(vllm_config=config)
        said("weights")
        loader = DefaultModelLoader(config.load_config)
        prepared = loader._prepare_weights(folder, None, None, True, None)
        watch = Watch()
        count = 0

        def offered() -> Any:
            nonlocal count
            for file in sorted(prepared[1]):
                for name, tensor in headers(file):
                    count += 1
                    watch.offer(name, tensor)
                    yield name, tensor

        with watch:
            model.load_weights(offered())
    found: dict[str, list[Any]] = {
        "dropped": watch.dropped(),
        "unset": watch.unset(model),
        "reshaped": list(watch.reshaped.values()),
        "converted": list(watch.converted.values()),
    }
    result.update({key: value[:MOST] for key, value in found.items()})
    result["counts"] = {key: len(value) for key, value in found.items()}
    result["tensors"] = count
    said("done")


def headers(file: str) -> Any:
    """Every tensor of a shard, without data, as safetensors' own reader describes it."""
    from safetensors import safe_open
    from safetensors.torch import _TYPES

    with safe_open(file, framework="pt", device="cpu") as shard:
        for name in shard.keys():  # noqa: SIM118  (not a dict)
            part = shard.get_slice(name)
            dtype = _TYPES[part.get_dtype()]
            yield name, torch.empty(part.get_shape(), dtype=dtype, device="meta")


def judge(folder: str, path: str) -> None:
    """Load one folder and write what came."""
    result: dict[str, Any] = {}

    def said(stage: str) -> None:
        result["stage"] = stage
        Path(path).write_text(json.dumps(result))

    said("start")
    try:
        load(folder, result, said)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is vLLM's verdict)
        result["error"], result["kind"] = str(error), type(error).__name__
        said(result["stage"])


def main() -> None:
    """See above."""
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader  # noqa: F401  (seconds, once for all)

    for folder, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            judge(folder, path)
            os._exit(0)  # vLLM leaves threads behind
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
