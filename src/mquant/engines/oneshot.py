"""The oneshot engine: llmcompressor's own `oneshot`, whose results are written module by module.

llmcompressor's modifier calibrates one group of siblings after another; each module's tensors are
written to the output before the next group is read. llmcompressor writes no checkpoint, so only the
bytes of its quantized weights reach the output, not its names or dtypes.
"""

import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Final

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle import apply as apply_module
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor import oneshot
from llmcompressor.core import create_session
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.awq import base as awq
from llmcompressor.pipelines import cache as intermediates
from llmcompressor.pipelines.sequential import pipeline as sequential
from loguru import logger
from pydantic import PrivateAttr
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from mquant.checkpoint import Source
from mquant.data_files import temporary_folder
from mquant.engines.offloaded_model import ParentCache, attach, build_model
from mquant.engines.replaced import replaced
from mquant.errors import EngineError
from mquant.events import Emit, Note, silent
from mquant.loader_model.stacks import unstacked
from mquant.plan import Plan
from mquant.text import names
from mquant.tokens.tokenizer import Integers

# Elements per call: compressed-tensors makes a dozen copies of its input.
_AT_ONCE: Final = 400_000
_PER_TENSOR: Final = frozenset({"weight_global_scale", "input_global_scale"})

Tensors = dict[str, torch.Tensor]
Write = Callable[[str, memoryview], None]

logger.remove()  # loguru's own stderr handler; `quiet` adds a handler of ours during a run
logger.enable("llmcompressor")
with suppress(ValueError):  # the level exists if llmcompressor was imported before
    logger.level("METRIC", no=38)  # llmcompressor uses this level even if its log is disabled


def run(
    plan: Plan,
    source: Source,
    write: Write,
    emit: Emit = silent,
    samples: list[Integers] | None = None,
) -> None:
    """Quantize every module that the plan quantizes, and pass each tensor to `write` by hub name.

    `source` holds the parent's weights. `samples` are token ids to calibrate with, if the recipe
    needs data: the samples go through one layer after another, and every expert sees all samples.
    Modules are written in the model's order. Raises EngineError if transformers builds another
    model than the planned one, or AWQ does not scale a module that the plan scales.
    """
    checkpoint = plan.survey.checkpoint
    in_memory = plan.family.in_memory_name
    stored = {**checkpoint.tensors, **unstacked(checkpoint, plan.family)}
    tensors = {in_memory(name): info for name, info in stored.items()}
    planned = {in_memory(a.module): a.module for a in plan.actions if a.scheme}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(temporary_folder()))
        stack.enter_context(quiet(emit))
        session = stack.enter_context(create_session())  # nothing global keeps the model alive
        model = build_model(folder, checkpoint.config)
        attach(model, source, tensors)
        linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        if missing := sorted(planned.keys() - linears.keys()):
            raise EngineError(
                f"{planned[missing[0]]} is no linear layer of the model that transformers builds.",
                "List the module in the recipe's ignore, or correct the family's `in_memory`.",
            )
        # One pattern: llmcompressor searches a list for every module, minutes for 29,000 modules.
        spared = "|".join(re.escape(name) for name in sorted(linears.keys() - planned.keys()))
        hub_names: dict[torch.nn.Module, str] = {linears[n]: hub for n, hub in planned.items()}
        scaled = {
            model.get_submodule(in_memory(a.module)): a.module for a in plan.actions if a.scaled
        }
        drain = Drain(hub_names, scaled, write, stack.enter_context(_threads()))
        kind, options = _kind(plan, emit)
        modifier = kind(
            **options,
            config_groups={
                scheme.name: preset_name_to_scheme(scheme.name, plan.targets(scheme, in_memory))
                for scheme in plan.schemes
            },
            ignore=[f"re:(?:{spared})$"] if spared else [],
        )
        modifier.drain = drain
        modifiers = [modifier]
        if plan.recipe.smoothing == "awq":
            stack.enter_context(_nothing_pinned())
            modifiers.insert(0, _awq(plan))
        stack.callback(watch_routing(model, drain, emit) if samples else lambda: None)
        calibrate(model, modifiers, samples)
        session.reset()
        if scaled:  # the output would otherwise have an unscaled copy
            raise EngineError(f"The engine did not write {min(scaled.values())}, scaled by AWQ.")


def _kind(plan: Plan, emit: Emit) -> tuple[Any, dict[str, Any]]:
    """Return the modifier of a recipe, and its options beside groups and modules."""
    recipe = plan.recipe
    if recipe.rounding != "gptq":
        return Drained if recipe.smoothing == "none" else DrainedAfterAWQ, {}
    if recipe.scales != "minmax":
        emit(Note("info", "llmcompressor's GPTQ takes min-max scales; it searches none."))
    return DrainedGPTQ, {"actorder": "static" if recipe.order == "descending" else None}


def _awq(plan: Plan) -> AWQModifier:
    """Return AWQ with the family's table: AWQ's own has no MiniMax-M2 and skips routers."""
    table = [AWQMapping(*entry) for entry in plan.family.smoothing_patterns]
    return AWQModifier(mappings=table)


def calibrate(
    model: PreTrainedModel, modifiers: Any, samples: list[Integers] | None, **options: Any
) -> None:
    """Run llmcompressor's oneshot with modifiers: without data, or layer by layer with samples."""
    if samples is not None:
        batches = [
            {"input_ids": torch.tensor(ids)[None], "attention_mask": torch.ones(1, len(ids)).long()}
            for ids in samples
        ]
        loader: Any = torch.utils.data.DataLoader
        options["dataset"] = loader(batches, batch_size=None)
        options["pipeline"] = "sequential"
    # If processor is neither None nor a name, oneshot does not look for one.
    oneshot(model=model, recipe=modifiers, processor=object(), **options)


@dataclass
class Drain:
    """The writer of calibrated modules: `names` maps quantized modules to the names for `write`.

    `scaled` maps modules that AWQ scales, but that are not quantized, to their names. `give` writes
    such a module's weight and removes the module from `scaled`.
    """

    names: dict[torch.nn.Module, str]
    scaled: dict[torch.nn.Module, str]
    write: Write
    pool: Executor

    def give(self, module: torch.nn.Module) -> None:
        """Write a calibrated module's tensors."""
        if module in self.scaled:
            weight: Any = module.weight
            self.write(f"{self.scaled.pop(module)}.weight", as_bytes(weight))
            return
        for suffix, tensor in compress(module, self.pool).items():
            self.write(f"{self.names[module]}.{suffix}", as_bytes(tensor))


def watch_routing(model: PreTrainedModel, drain: Drain, emit: Emit) -> Callable[[], None]:
    """Count the tokens that routers send to experts; return a function that reports idle experts.

    All experts see all tokens during calibration. An expert that no token was routed to is
    calibrated on the tokens of other experts.
    """
    counts: dict[str, torch.Tensor] = {}

    def count(prefix: str, module: Any, args: tuple[Any, ...]) -> None:
        chosen = torch.bincount(args[1].flatten(), minlength=module.num_experts)
        counts[prefix] = counts.get(prefix, 0) + chosen

    for prefix, module in model.named_modules():
        if isinstance(module, LinearExperts2D):
            module.register_forward_pre_hook(partial(count, prefix))
    hub = {module: name.rpartition(".")[0] for module, name in drain.names.items()}

    def report() -> None:
        idle = [
            hub[linear]
            for prefix, tokens in counts.items()
            for expert in (tokens == 0).nonzero().flatten().tolist()
            for linear in islice(model.get_submodule(f"{prefix}.{expert}").children(), 1)
            if linear in hub
        ]
        if idle:
            noun = "expert" if len(idle) == 1 else "experts"
            emit(
                Note(
                    "warning",
                    f"No calibration token was routed to {len(idle):,} {noun} ({names(idle)}); "
                    f"{'it was' if len(idle) == 1 else 'they were'} calibrated on other tokens.",
                )
            )

    return report


class Drained(QuantizationModifier):  # type: ignore[misc]  # untyped base
    """llmcompressor's QuantizationModifier, one group of siblings at a time."""

    drain: Any = None

    def on_sequential_epoch_end(
        self, state: Any, event: Any, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Calibrate and write siblings together: the members of a fused set are siblings."""
        quantized = [module for module in modules if is_module_quantized(module)]
        for _, group in groupby(quantized, lambda m: self.drain.names[m].rpartition(".")[0]):
            siblings = list(group)
            with torch.no_grad(), ParentCache.disable_offloading():  # each weight is read once
                super().on_sequential_epoch_end(state, event, siblings, **kwargs)
                for module in siblings:
                    self.drain.give(module)
            for module in siblings:
                cache: Any = module._parameters
                cache.forget()


class _DrainedByLayer:
    """A modifier that keeps a layer's new weights until the next layer ends.

    The calibration data goes through these weights on its way to the next layer.
    """

    drain: Any
    _kept: list[torch.nn.Module]

    def on_sequential_epoch_end(
        self, state: Any, event: Any, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Quantize a layer and write its modules; drop the new weights of the layer before."""
        for module in self._kept:
            cache: Any = module._parameters
            cache.forget()
        modifier: Any = super()
        with torch.no_grad(), ParentCache.disable_offloading():
            modifier.on_sequential_epoch_end(state, event, modules, **kwargs)
            planned = self.drain.names.keys() | self.drain.scaled.keys()
            self._kept = [module for module in modules if module in planned]
            for module in self._kept:
                self.drain.give(module)


class DrainedGPTQ(_DrainedByLayer, GPTQModifier):  # type: ignore[misc]  # untyped base
    """llmcompressor's GPTQModifier, one layer at a time."""

    drain: Any = None
    _kept: list[torch.nn.Module] = PrivateAttr(default_factory=list)


class DrainedAfterAWQ(_DrainedByLayer, QuantizationModifier):  # type: ignore[misc]  # untyped base
    """llmcompressor's QuantizationModifier, one layer at a time, after AWQ has scaled the layer."""

    drain: Any = None
    _kept: list[torch.nn.Module] = PrivateAttr(default_factory=list)


@contextmanager
def _nothing_pinned() -> Iterator[None]:
    """Let AWQ run without an accelerator: do not pin the memory of AWQ's inputs then."""
    if torch.accelerator.is_available():
        yield
        return
    with replaced(intermediates.IntermediatesCache, "pin_memory", lambda *_arguments: None):
        yield


def compress(module: torch.nn.Module, pool: Executor) -> Tensors:
    """Return the tensors that compressed-tensors would save for a calibrated Linear, on the CPU.

    If all scales but the global scales are per row, a few rows at a time go through the compressor,
    in the threads of `pool`: the bytes are the same, and memory stays small.
    """
    scheme: Any = module.quantization_scheme
    stored_as = infer_module_format(type(module), scheme)
    compressor: Any = BaseCompressor.get_value_from_registry(stored_as.value)
    names = [name for name in module._parameters if name != "bias"]
    state = {name: getattr(module, name).detach() for name in names}
    rows, columns = state["weight"].shape
    by_row = state.keys() - _PER_TENSOR
    divisible = all(state[name].shape[:1] == (rows,) for name in by_row)
    step = rows
    whole = stored_as is CompressionFormat.pack_quantized  # it saves its input's shape
    if divisible and not whole and state["weight"].device.type == "cpu":
        step = max(1, _AT_ONCE // columns)

    def block(start: int) -> Tensors:
        part = {n: t[start : start + step] if n in by_row else t for n, t in state.items()}
        with torch.no_grad():  # the setting is per thread
            return {n: t.cpu() for n, t in compressor.compress(part, scheme).items()}

    first, *rest = pool.map(block, range(0, rows, step))
    return {
        name: torch.cat([tensor, *(part[name] for part in rest)])
        if rest and name not in _PER_TENSOR
        else tensor
        for name, tensor in first.items()
    }


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, in row-major order."""
    flat: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)


@contextmanager
def _threads() -> Iterator[Executor]:
    """Open a pool of as many threads as torch has; torch's own threads are off meanwhile.

    torch's threads meet at a barrier after every small operation. The barrier costs a factor of ten
    as soon as another process uses a core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet(emit: Emit) -> Iterator[None]:
    """Pass on each warning of llmcompressor once; drop its other lines and progress bars.

    transformers' warnings are dropped, because these warnings are about generating text.
    """
    shown: set[str] = set()

    def forward(message: Any) -> None:
        text = message.record["message"]
        if text not in shown and message.record["level"].name != "METRIC":
            shown.add(text)
            emit(Note("info", text))

    handler = logger.add(forward, level="WARNING", format="{message}")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with (  # no option turns these progress bars off
            replaced(apply_module, "tqdm", lambda items, **_options: items),
            replaced(sequential, "tqdm", lambda items, **_options: items),
            replaced(intermediates, "tqdm", lambda items, **_options: items),
            replaced(awq, "tqdm", partial(awq.tqdm, disable=True)),
        ):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        logger.remove(handler)
