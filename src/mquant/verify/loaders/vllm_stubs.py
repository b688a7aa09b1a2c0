"""Replace what vLLM needs only to compute: kernels, events of a GPU, packages that prepare images.

`inside_vllm.py` imports this file in vLLM's own Python. mquant never imports it.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class _Anything:
    """An object that is every class, function and constant of a package that nothing calls."""

    def __getattr__(self, name: str) -> "_Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> "_Anything":
        return self


class _Device:
    """An event or a stream of a GPU."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


class _OnGpu:
    """A platform that says that it is a GPU, and is the CPU in all else."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)


class _Package(ModuleType):
    """A module that has every name."""

    __path__: list[str] = []  # noqa: RUF012  (an attribute of modules)
    __version__ = "0"

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Finder:
    """Find torchvision and all its modules: models with a vision tower import it for images."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module has every name."""


def stub_packages() -> None:
    """Let models with a vision tower import torchvision, if the environment has none."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())


def stub_device() -> None:
    """Let a model be built that moves its parts to a device, or that needs events of a GPU."""
    move = torch.nn.Module.to

    def to(self: torch.nn.Module, *arguments: Any, **more: Any) -> torch.nn.Module:
        _, dtype, *_ = torch._C._nn._parse_to(*arguments, **more)
        return move(self, dtype) if dtype else self

    torch.nn.Module.to = to  # type: ignore[assignment]
    torch.cuda.Event = torch.cuda.Stream = _Device  # type: ignore[assignment, misc]


def stub_sparse_attention() -> None:
    """Let a CPU build models with sparse attention: as others, with the indexer beside.

    The indexer and its parameters are layers of the model, not of the attention's kernel.
    """
    from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl
    from vllm.platforms.cpu import CpuPlatform

    choose, init = CpuPlatform.get_attn_backend_cls.__func__, MLACommonImpl.__init__

    def dense(value: Any) -> Any:
        return value._replace(use_sparse=False) if hasattr(value, "use_sparse") else value

    def chosen(cls: Any, *arguments: Any, **more: Any) -> Any:
        return choose(cls, *map(dense, arguments), **{key: dense(x) for key, x in more.items()})

    def initialise(self: Any, *arguments: Any, **more: Any) -> None:
        for key in ("topk_indices_buffer", "index_group_builder"):
            more.pop(key, None)
        init(self, *arguments, **more)

    CpuPlatform.get_attn_backend_cls = classmethod(chosen)
    MLACommonImpl.__init__ = initialise


def stub_kernels() -> None:
    """Replace vLLM's choice of kernels, which needs a GPU, and its inspection of the model's class.

    vLLM chooses the kernel while vLLM builds a layer; the layer's parameters are the same for every
    kernel. vLLM inspects the model's class in a subprocess, so as not to touch a GPU in the main
    process; the subprocess takes as long as the whole load.
    """
    from vllm.model_executor.layers.fused_moe import config as experts
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as plain
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

    stub_device()
    stub_sparse_attention()
    # Experts without gate_proj need a GPU's kernels, not other parameters.
    experts.current_platform = _OnGpu(experts.current_platform)
    registry._run_in_subprocess = lambda action: action()

    def kernel(**_: Any) -> Any:
        return SimpleNamespace(input_quant_key=lambda: None)

    def of_integers(quant_config: Any, **_: Any) -> Any:
        # Only Marlin takes scales per channel; only the other kernels take all shapes with groups.
        grouped = quant_config.strategy == "group"
        kernels = int_wna16.WNA16MoEBackend
        return kernels.TRITON if grouped else kernels.MARLIN, None

    for module in (linear, modelopt):
        module.init_nvfp4_linear_kernel = kernel
    for module in (moe, modelopt):
        module.select_nvfp4_moe_backend = lambda **_: (nvfp4.NvFp4MoeBackend.MARLIN, None)
    for module in (fp8, linear_fp8, modelopt):
        module.init_fp8_linear_kernel = kernel
    modelopt.init_mxfp8_linear_kernel = kernel
    plain.select_unquantized_moe_backend = lambda **_: (plain.UnquantizedMoeBackend.TRITON, None)
    for module in (fp8, moe_fp8, modelopt):
        module.select_fp8_moe_backend = lambda **_: (fp8_moe.Fp8MoeBackend.MARLIN, None)
    modelopt.select_mxfp8_moe_backend = modelopt.select_fp8_moe_backend
    integers.select_wna16_moe_backend = of_integers
