"""The mean square of every input channel of each module, measured on calibration text.

The text goes through the model layer by layer, as in the oneshot engine. No weight is quantized,
and an expert sees only the tokens that are routed to that expert.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcompressor.core import create_session
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr

from mquant.checkpoint import Source
from mquant.data_files import temporary_folder
from mquant.engines.offloaded_model import attach, build_model
from mquant.engines.oneshot import calibrate, quiet
from mquant.errors import EngineError
from mquant.events import Emit, silent
from mquant.loader_model.stacks import unstacked
from mquant.numerics.floats import Floats
from mquant.plan import Plan
from mquant.tokens.tokenizer import Integers


def mean_squares(
    plan: Plan, source: Source, samples: list[Integers], emit: Emit = silent
) -> dict[str, Floats | None]:
    """Measure float32 [in] of every module to quantize, by hub name; None if no token reached it.

    Raises EngineError if transformers builds another model than the planned one.
    """
    checkpoint, in_memory = plan.survey.checkpoint, plan.family.in_memory_name
    stored = {**checkpoint.tensors, **unstacked(checkpoint, plan.family)}
    tensors = {in_memory(name): info for name, info in stored.items()}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(temporary_folder()))
        stack.enter_context(quiet(emit))
        session = stack.enter_context(create_session())
        model = build_model(folder, checkpoint.config)
        attach(model, source, tensors)
        modules = dict(model.named_modules())
        watched = {a.module: modules.get(in_memory(a.module)) for a in plan.actions if a.scheme}
        for name, module in watched.items():
            if not isinstance(module, torch.nn.Linear):
                raise EngineError(
                    f"{name} is no linear layer of the model that transformers builds.",
                    "List the module in the recipe's ignore, or correct the family's `in_memory`.",
                )
        watch = Watch()
        calibrate(model, watch.of(watched), samples, moe_calibrate_all_experts=False)
        session.reset()
    return {name: watch.means.get(name) for name in watched}


class Watch(Modifier):  # type: ignore[misc]  # untyped base
    """A modifier that changes nothing and adds up the squares of modules' inputs."""

    requires_calibration_data: bool = True
    _watched: dict[str, Any] = PrivateAttr(default_factory=dict)
    _sums: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
    _tokens: dict[str, int] = PrivateAttr(default_factory=dict)
    _means: dict[str, Floats] = PrivateAttr(default_factory=dict)

    def of(self, watched: dict[str, Any]) -> "Watch":
        """Watch these modules, given by the names that their means will have."""
        self._watched = watched
        return self

    @property
    def means(self) -> dict[str, Floats]:
        """The means, float32 [in], of every module that a token reached."""
        return self._means

    def on_initialize(self, state: Any, **options: Any) -> bool:
        """Do nothing: the modifier needs no preparation."""
        return True

    def on_calibration_start(self, state: Any, event: Any, **options: Any) -> None:
        """Register a hook on every watched module that adds up the squares of its inputs."""
        for name, module in self._watched.items():
            self.register_hook(module, partial(self._add, name), "forward_pre")

    def _add(self, name: str, _module: Any, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0].detach().reshape(-1, args[0].shape[-1])
        squares = rows.double().square().sum(0)
        self._sums[name] = self._sums[name] + squares if name in self._sums else squares
        self._tokens[name] = self._tokens.get(name, 0) + len(rows)

    def on_sequential_epoch_end(self, state: Any, event: Any, **options: Any) -> None:
        """Store the means of the layer that has ended, and clear its sums."""
        for name, sums in self._sums.items():
            if tokens := self._tokens[name]:
                self._means[name] = (sums / tokens).numpy().astype(np.float32)
        self._sums.clear()
        self._tokens.clear()

    def on_calibration_end(self, state: Any, event: Any, **options: Any) -> None:
        """Remove the hooks."""
        self.remove_hooks()
