"""Load a checkpoint's headers with vLLM and report the result. mquant never imports this file.

    python inside_vllm.py FOLDER RESULT [FOLDER RESULT ...]

vLLM's own Python runs this file. FOLDER holds a checkpoint whose shards need no data (sparse files
suffice); FOLDER may be written until standard input ends. vLLM parses the config, builds the model
on torch's meta device and loads tensors that have only a dtype and a shape. The probe watches every
copy that vLLM's loaders make, so it knows, for every model and layout, what the loaders drop, leave
unset, reshape or convert. The first load watches copies only. If that load leaves anything dropped,
unset, reshaped or converted, a second load follows every operation, which takes three times as
long. RESULT becomes a JSON object; each load runs in a process of its own:

    vllm            version
    stage           the last stage that was reached: start, config, model, weights, done
    error, kind     vLLM's message and the exception's class, if vLLM stopped
    dropped         names of tensors that were not, or not wholly, copied, but should be
    unset           [parameter, missing elements] of parameters not, or not wholly, loaded
    reshaped        [tensor, its shape, the shape of the target]
    converted       [tensor, its dtype, the dtype of the target], if the bytes lose their meaning
    counts          the true lengths of the four lists, which are cut off
    tensors         the number of tensors that were offered

If the process dies, RESULT has the last stage that was reached, and the kind is Killed.
"""

import gc
import importlib
import json
import math
import os
import resource
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

# Before vLLM is imported: no compilation, no telemetry, no network, the CPU.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CONFIGURE_LOGGING="0",  # every child would clear the caches of 270 loggers
    VLLM_USE_RAY_COMPILED_DAG="0",
    CUDA_VISIBLE_DEVICES="",
)

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parent))  # -I leaves the folder out; last, so it shadows nothing
from vllm_stubs import stub_kernels, stub_packages  # type: ignore[import-not-found]

MEMORY = 6 << 30
"""The bytes that vLLM may allocate: a config.json can ask for a billion layers; few need 1 GB."""
SECONDS = 240  # of the processor's time, for one load
_COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
PIPE = 60_000  # bytes that a pipe holds, so that a child need not wait for its parent
OFTEN = ("vllm.", "compressed_tensors", "transformers.")  # the packages of modules to preload
MOST = 200  # entries of each list; `counts` has the true numbers


class Copies:
    """A record of which offered tensors were copied where; storages identify tensors."""

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
        """Record a tensor of the checkpoint before vLLM loads the tensor."""
        self.mark(tensor, name)
        self._sizes[name] = tensor.numel()
        self._dtypes[name] = tensor.dtype

    @property
    def names(self) -> Collection[str]:
        """The names of all offered tensors."""
        return self._sizes.keys()

    def mark(self, tensor: torch.Tensor, name: str) -> None:
        """Record that a tensor's storage comes from the offered tensor `name`."""
        self._origin[_storage(tensor)] = name
        self._kept.append(tensor.untyped_storage())

    def of(self, tensor: torch.Tensor) -> str | None:
        """Return the name of the offered tensor that `tensor` comes from, or None."""
        return self._origin.get(_storage(tensor))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Record a copy before torch makes the copy. Raises as the real copy would."""
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
        self.write(target)
        if self.of(target) is None:
            self._kept.append(target.untyped_storage())

    def dequantize(self, codes: torch.Tensor, scale: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return codes in BF16, in place of vLLM's function: both tensors are used."""
        plain = torch.empty_like(codes, dtype=torch.bfloat16)
        if name := self.of(codes):
            self.mark(plain, name)
            self._dtypes[name] = plain.dtype
        if name := self.of(scale):
            self._used[name] = self._sizes[name]
        return plain

    def write(self, target: torch.Tensor) -> None:
        """Record that a place has a value, from the checkpoint or the padding of a vocabulary."""
        place = (int(target.storage_offset()), tuple(target.shape), tuple(target.stride()))
        self._written[_storage(target)].add(place)

    def dropped(self, model: torch.nn.Module) -> list[str]:
        """Return the names of tensors that were not, or not wholly, copied.

        Left out is what vLLM passes over on purpose: a head that is tied to the embeddings, tables
        that vLLM computes, and the order of activations, which its kernels do not need.
        """
        own = {name for name, _ in model.named_parameters()}
        every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        rows = (name for name, size in self._sizes.items() if self._used[name] < size)
        return [
            name
            for name in rows
            if name not in every - own
            and not any(table in name for table in _COMPUTED)
            and not name.endswith(".g_idx")
        ]

    def unset(self, model: torch.nn.Module) -> list[tuple[str, int]]:
        """Return parameters that are not wholly loaded, and the number of missing elements."""
        rows = []
        for name, parameter in model.named_parameters():
            places = self._written.get(_storage(parameter), set())
            loaded = min(parameter.numel(), _area(places))
            if loaded < parameter.numel() and not _needless(model, name):
                rows.append((name, parameter.numel() - loaded))
        return rows


@contextmanager
def glance(copies: Copies) -> Iterator[None]:
    """Record the copies that loaders make of offered tensors and of views of offered tensors.

    Copies of converted tensors are not seen: the offered tensors count as dropped.
    """

    def copy_(self: torch.Tensor, source: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        copies.copy(self, source)
        return _COPY(self, blank(source, self), *rest, **more)

    def setitem(self: torch.Tensor, key: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            copies.copy(self[key], value)
            value = blank(value, self)
        _SETITEM(self, key, value)

    def fill_(self: torch.Tensor, value: Any) -> torch.Tensor:
        copies.write(self)
        return _FILL(self, value)

    # Loaders write with these methods. torch's hook for copies, in `Watch` below, is slow.
    # torch.Tensor inherits the methods, so `del` restores the inherited methods.
    torch.Tensor.fill_ = fill_  # type: ignore[method-assign, assignment]
    torch.Tensor.copy_ = copy_  # type: ignore[method-assign, assignment]
    torch.Tensor.__setitem__ = setitem  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del torch.Tensor.copy_, torch.Tensor.__setitem__, torch.Tensor.fill_


_COPY, _SETITEM, _FILL = torch.Tensor.copy_, torch.Tensor.__setitem__, torch.Tensor.fill_
_BOOL = torch.Tensor.__bool__


def blank(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return a source that can be copied: some models put parameters on the CPU, by its name."""
    return torch.zeros_like(source, device=target.device) if source.is_meta else source


@contextmanager
def no_difference() -> Iterator[None]:
    """Let comparisons of tensors that have no data find no difference.

    vLLM's loader of experts compares the input scales of w1 and w3, and refuses different ones.
    """

    def truth(self: torch.Tensor) -> bool:
        return False if self.is_meta else _BOOL(self)

    torch.Tensor.__bool__ = truth  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del torch.Tensor.__bool__


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that follows offered tensors through every operation, also conversions."""

    def __init__(self, copies: Copies) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies = copies

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles here; the guard would double the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        of = self._copies.of
        if name == "copy_":
            self._copies.copy(args[0], args[1])
            return args[0]
        if name == "fill_":
            self._copies.write(args[0])
            return args[0]
        if name in ("_local_scalar_dense", "item"):
            raise RuntimeError("the value of a tensor was asked for; only headers are here")
        result = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(result, torch.Tensor) and of(result) is None:
            origin = next((of(a) for a in args if isinstance(a, torch.Tensor) and of(a)), None)
            if origin:  # a converted or contiguous copy; a view has the same storage
                self._copies.mark(result, origin)
        return result


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _area(places: set[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> int:
    """Return the number of covered elements. Loaders write rows or columns; a place counts once."""
    return sum(math.prod(shape) for _, shape, _ in places)


def _loses(source: torch.dtype, target: torch.dtype) -> bool:
    """Return whether a copy changes values: no between floats of 16 bits and more, or indices."""
    floats = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
    indices = {
        torch.int32,
        torch.int64,
    }  # DeepSeek-V4's table of experts
    return source != target and not ({source, target} <= floats or {source, target} <= indices)


def _needless(model: torch.nn.Module, name: str) -> bool:
    """Return whether no checkpoint must fill a parameter: some layers never read input scales."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    module, _, last = name.rpartition(".")
    method = getattr(model.get_submodule(module), "quant_method", None)
    method = getattr(model.get_submodule(module), "scheme", method)
    if "input_global_scale" in last or last.endswith("input_scale"):
        spec = getattr(method, "spec", None)  # of ModelOpt's linear layers
        return bool(getattr(method, "use_a16", spec is not None and spec.activation is None))
    return isinstance(method, BaseKVCacheMethod)  # optional, with defaults


def load(folder: str, result: dict[str, Any], report_stage: Any, *, closely: bool) -> None:
    """Load the headers as vLLM does; put the version and the lists of tensors into `result`."""
    import tempfile

    from vllm import __version__
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models import deepseek_v2
    from vllm.utils.torch_utils import set_default_torch_dtype

    result["vllm"] = __version__
    stub_kernels()
    report_stage("config")
    arguments = EngineArgs(
        model=folder, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, max_num_seqs=1
    )
    config = arguments.create_engine_config()
    report_stage("model")
    with ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(config))
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        init_distributed_environment(1, 0, f"file://{scratch}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        stack.enter_context(set_default_torch_dtype(config.model_config.dtype))
        with torch.device("meta"):
            model = initialize_model(vllm_config=config)
        if ".cpu." in type(model).__module__:
            raise NotImplementedError("vLLM has a model of its own for CPUs, with other names")
        report_stage("weights")
        loader = DefaultModelLoader(config.load_config)
        prepared = loader._prepare_weights(folder, None, None, True, None)
        copies = Copies()
        deepseek_v2.scaled_dequantize = copies.dequantize  # of an indexer's key in FP8
        count = 0

        def offered() -> Any:
            nonlocal count
            for file in sorted(prepared[1]):
                for name, tensor in headers(file):
                    count += 1
                    copies.offer(name, tensor)
                    yield name, tensor

        with no_difference(), Watch(copies) if closely else glance(copies):
            model.load_weights(offered())
    passed_over = mtp_layers(config.model_config.hf_text_config, copies.names)
    mapper = getattr(type(model), "hf_to_vllm_mapper", None)
    prefixes = getattr(mapper, "orig_to_new_prefix", {})
    passed_over += tuple(prefix for prefix, new in prefixes.items() if new is None)
    lists: dict[str, list[Any]] = {
        "dropped": [n for n in copies.dropped(model) if not n.startswith(passed_over)],
        "unset": copies.unset(model),
        "reshaped": list(copies.reshaped.values()),
        "converted": list(copies.converted.values()),
    }
    result.update({key: value[:MOST] for key, value in lists.items()})
    result["counts"] = {key: len(value) for key, value in lists.items()}
    result["tensors"] = count
    report_stage("done")


def mtp_layers(config: Any, names: Collection[str]) -> tuple[str, ...]:
    """Return the prefixes of the layers for multi-token prediction that the config announces.

    vLLM passes over these layers on purpose: another model, for speculative decoding, loads them.
    vLLM passes over every layer with such a number; here a layer without `eh_proj`, which joins
    state and token, is a layer that the model has lost. Some models have such layers under a
    name of their own.
    """
    keys = ("num_nextn_predict_layers", "num_mtp_modules")
    count = next((getattr(config, key) for key in keys if getattr(config, key, 0)), 0)
    first = config.num_hidden_layers
    layers = (f"model.layers.{first + number}." for number in range(count))
    found = (layer for layer in layers if f"{layer}eh_proj.weight" in names)
    return "model.mtp.", "language_model.model.mtp.", *found


def headers(file: str) -> Any:
    """Yield every tensor of a shard, without data, as safetensors' reader describes the tensor."""
    from safetensors import safe_open
    from safetensors.torch import _TYPES

    types = {"F8_E8M0": torch.float8_e8m0fnu, **_TYPES}  # the reader's own code knows both
    with safe_open(file, framework="pt", device="cpu") as shard:
        for name in shard.keys():  # noqa: SIM118  (not a dict)
            part = shard.get_slice(name)
            dtype = types[part.get_dtype()]
            yield name, torch.empty(part.get_shape(), dtype=dtype, device="meta")


def judge(folder: str, path: str, *, closely: bool) -> bool:
    """Load one folder and write the result; return whether no closer load is needed."""
    result: dict[str, Any] = {}

    def report_stage(stage: str) -> None:
        result["stage"] = stage
        Path(path).write_text(json.dumps(result))

    report_stage("start")
    try:
        load(folder, result, report_stage, closely=closely)
    except Exception as error:  # noqa: BLE001  (every exception is vLLM's verdict)
        result["error"], result["kind"] = str(error), type(error).__name__
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch's words
            result["kind"] = "MemoryError"
            result["error"] = f"vLLM needed more than {MEMORY >> 30} GB of memory"
        report_stage(result["stage"])
    return closely or not any(result.get("counts", {}).values())


def in_child(folder: str, path: str, *, closely: bool) -> tuple[bool, set[str]]:
    """Run `judge` in a child process, which may die.

    Return whether no closer load is needed, and the names of the modules that the child imported.
    """
    known = set(sys.modules)
    gc.freeze()  # so that the child does not copy what it only looks through
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        complete = judge(folder, path, closely=closely)
        os.write(writing, "\n".join(sys.modules.keys() - known).encode()[:PIPE])
        os._exit(0 if complete else 1)  # vLLM leaves threads behind
    os.close(writing)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reading, encoding="utf-8") as pipe:
        imported = set(pipe.read().splitlines())
    code = os.waitstatus_to_exitcode(status)
    if code < 0:  # often C++ code that lacks memory
        with suppress(OSError, ValueError):
            result = json.loads(Path(path).read_text())
            result |= {"kind": "Killed", "error": f"its process died of signal {-code}"}
            Path(path).write_text(json.dumps(result))
    return code != 1, imported


def preload(names: set[str]) -> None:
    """Import vLLM's own modules that a child imported: later children then need not.

    A child imports for two seconds, mostly quantization methods and the model's class, and loads a
    small checkpoint in half a second.
    """
    for name in sorted(name for name in names if name.startswith(OFTEN)):
        with suppress(Exception):  # the last name of a full pipe may be cut off
            importlib.import_module(name)


def main() -> None:
    """Wait for the end of standard input, then load each FOLDER and write its RESULT."""
    stub_packages()
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader  # noqa: F401  (takes seconds, so once for all folders)

    sys.stdin.read()
    pairs = list(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    for number, (folder, path) in enumerate(pairs, 1):
        complete, imported = in_child(folder, path, closely=False)
        if not complete:
            _, more = in_child(folder, path, closely=True)
            imported |= more
        if number < len(pairs):
            preload(imported)


if __name__ == "__main__":
    main()
