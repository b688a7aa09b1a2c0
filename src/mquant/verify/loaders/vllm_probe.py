"""Run by vLLM's own Python, never imported by mquant: load a checkpoint's headers, say what came.

    python vllm_probe.py FOLDER RESULT [FOLDER RESULT ...]

FOLDER holds a checkpoint whose shards need no data (sparse files do); it need not be there before
standard input ends. vLLM parses its config, builds the model on torch's meta device and loads
tensors that have a dtype and a shape only. Every copy that vLLM's loaders make is watched, and so
what they drop, leave out, bend into another shape or convert is known, whatever the model or the
layout: at a glance first, and, where that does not account for everything, once more with every
operation followed, which takes three times as long. RESULT becomes a JSON object, each made in
processes of its own:

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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


class Copies:
    """Which offered tensors were copied where, known by their storage."""

    def __init__(self) -> None:
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

    def offer(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor of the checkpoint, about to be loaded."""
        self.mark(tensor, name)
        self._sizes[name] = tensor.numel()
        self._dtypes[name] = tensor.dtype

    def mark(self, tensor: torch.Tensor, name: str) -> None:
        """What lies in a tensor's storage comes from the offered one of that name."""
        self._origin[_storage(tensor)] = name
        self._kept.append(tensor.untyped_storage())

    def of(self, tensor: torch.Tensor) -> str | None:
        """The offered tensor that one comes from."""
        return self._origin.get(_storage(tensor))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """A copy is about to be made. Raises as the real one would."""
        name = self.of(source)
        if name is None:
            return  # not from the checkpoint: a default, or one buffer into another
        target_shape, shape = list(target.shape), list(source.shape)
        if [n for n in target_shape if n != 1] != [n for n in shape if n != 1]:
            source.expand_as(target)  # raises as the real copy would
            if not (source.numel() == 1 and target.numel() <= 1):
                self.reshaped.setdefault(name, (name, shape, target_shape))
        self._used[name] += source.numel()
        # Experts' weight_shape goes into a BF16 parameter that nothing reads.
        if _loses(self._dtypes[name], target.dtype) and not name.endswith(".weight_shape"):
            row = (name, str(self._dtypes[name]), str(target.dtype))
            self.converted.setdefault(name, row)
        place = (int(target.storage_offset()), tuple(target.shape), tuple(target.stride()))
        self._written[_storage(target)].add(place)
        if self.of(target) is None:
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


@contextmanager
def glance(copies: Copies) -> Iterator[None]:
    """Note the copies that loaders make of offered tensors and of views of them.

    What they make of conversions is not seen: it counts as dropped.
    """

    def copy_(self: torch.Tensor, source: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        copies.copy(self, source)
        return _COPY(self, source, *rest, **more)

    def setitem(self: torch.Tensor, key: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            copies.copy(self[key], value)
        _SETITEM(self, key, value)

    # The two methods that loaders copy with. torch has a hook for copies too, `Watch` below: slow.
    # torch.Tensor inherits both, so to delete the stand-ins is to put them back.
    torch.Tensor.copy_ = copy_  # type: ignore[method-assign, assignment]
    torch.Tensor.__setitem__ = setitem  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del torch.Tensor.copy_, torch.Tensor.__setitem__


_COPY, _SETITEM = torch.Tensor.copy_, torch.Tensor.__setitem__


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows offered tensors through every operation, conversions included."""

    def __init__(self, copies: Copies) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies = copies

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles here; the guard takes as long as all else

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        of = self._copies.of
        if name == "copy_":
            self._copies.copy(args[0], args[1])
            return args[0]
        if name in ("_local_scalar_dense", "item"):
            raise RuntimeError("the value of a tensor was asked for; only headers are here")
        made = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(made, torch.Tensor) and of(made) is None:
            origin = next((of(a) for a in args if isinstance(a, torch.Tensor) and of(a)), None)
            if origin:  # converted, or made contiguous; a view has its storage
                self._copies.mark(made, origin)
        return made


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
    if "input_global_scale" in last or last.endswith("input_scale"):
        spec = getattr(method, "spec", None)  # of ModelOpt's linear layers
        return bool(getattr(method, "use_a16", spec is not None and spec.activation is None))
    return isinstance(method, BaseKVCacheMethod)  # optional, with defaults


def stub() -> None:
    """What is no question of loading: which kernel would compute needs a GPU to answer.

    vLLM asks while it builds a layer. Whichever it is, the layer's parameters are the same. And
    vLLM looks at the model's class in a process of its own, so as not to touch a GPU in this one;
    that takes as long as all of the loading.
    """
    from vllm.model_executor.layers.fused_moe.oracle import fp8 as fp8_moe
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16, nvfp4
    from vllm.model_executor.layers.quantization import fp8, modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as moe,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8 as moe_fp8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as integers,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w4a4_nvfp4 as linear,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_fp8 as linear_fp8,
    )
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()

    def kernel(**_: Any) -> Any:
        return SimpleNamespace(input_quant_key=lambda: None)

    def of_integers(quant_config: Any, **_: Any) -> Any:
        # Only Marlin takes scales per channel; only others take every shape with groups.
        grouped = quant_config.strategy == "group"
        kernels = int_wna16.WNA16MoEBackend
        return kernels.TRITON if grouped else kernels.MARLIN, None

    for module in (linear, modelopt):
        module.init_nvfp4_linear_kernel = kernel
    for module in (moe, modelopt):
        module.select_nvfp4_moe_backend = lambda **_: (nvfp4.NvFp4MoeBackend.MARLIN, None)
    fp8.init_fp8_linear_kernel = linear_fp8.init_fp8_linear_kernel = kernel
    for module in (fp8, moe_fp8):
        module.select_fp8_moe_backend = lambda **_: (fp8_moe.Fp8MoeBackend.MARLIN, None)
    integers.select_wna16_moe_backend = of_integers


def load(folder: str, result: dict[str, Any], report_stage: Any, *, closely: bool) -> None:
    """Do as vLLM does, noting in `result` what was reached, and what became of the tensors."""
    import tempfile

    from vllm import __version__
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    result["vllm"] = __version__
    stub()
    report_stage("config")
    arguments = EngineArgs(
        model=folder, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, max_num_seqs=1
    )
    config = arguments.create_engine_config()
    report_stage("model")
    with ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(config))
        where = stack.enter_context(tempfile.TemporaryDirectory())
        init_distributed_environment(1, 0, f"file://{where}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        stack.enter_context(set_default_torch_dtype(config.model_config.dtype))
        with torch.device("meta"):
            model = initialize_model(vllm_config=config)
        report_stage("weights")
        loader = DefaultModelLoader(config.load_config)
        prepared = loader._prepare_weights(folder, None, None, True, None)
        copies = Copies()
        count = 0

        def offered() -> Any:
            nonlocal count
            for file in sorted(prepared[1]):
                for name, tensor in headers(file):
                    count += 1
                    copies.offer(name, tensor)
                    yield name, tensor

        with Watch(copies) if closely else glance(copies):
            model.load_weights(offered())
    found: dict[str, list[Any]] = {
        "dropped": copies.dropped(),
        "unset": copies.unset(model),
        "reshaped": list(copies.reshaped.values()),
        "converted": list(copies.converted.values()),
    }
    result.update({key: value[:MOST] for key, value in found.items()})
    result["counts"] = {key: len(value) for key, value in found.items()}
    result["tensors"] = count
    report_stage("done")


def headers(file: str) -> Any:
    """Every tensor of a shard, without data, as safetensors' own reader describes it."""
    from safetensors import safe_open
    from safetensors.torch import _TYPES

    with safe_open(file, framework="pt", device="cpu") as shard:
        for name in shard.keys():  # noqa: SIM118  (not a dict)
            part = shard.get_slice(name)
            dtype = _TYPES[part.get_dtype()]
            yield name, torch.empty(part.get_shape(), dtype=dtype, device="meta")


def judge(folder: str, path: str, *, closely: bool) -> bool:
    """Load one folder and write what came; whether that is all there is to say."""
    result: dict[str, Any] = {}

    def report_stage(stage: str) -> None:
        result["stage"] = stage
        Path(path).write_text(json.dumps(result))

    report_stage("start")
    try:
        load(folder, result, report_stage, closely=closely)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is vLLM's verdict)
        result["error"], result["kind"] = str(error), type(error).__name__
        report_stage(result["stage"])
    return closely or not any(result.get("counts", {}).values())


def in_child(folder: str, path: str, *, closely: bool) -> bool:
    """The same in a process of its own, which may die."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        told = judge(folder, path, closely=closely)
        os._exit(0 if told else 1)  # vLLM leaves threads behind
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 1


def main() -> None:
    """See above."""
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader  # noqa: F401  (seconds, once for all)

    sys.stdin.read()
    for folder, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        if not in_child(folder, path, closely=False):
            in_child(folder, path, closely=True)


if __name__ == "__main__":
    main()
