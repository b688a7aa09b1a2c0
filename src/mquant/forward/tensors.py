"""The weights of a checkpoint under transformers' names, and products of states with weights.

Every product is in slices of a fixed number of tokens, which workers take: no result depends on the
number of workers, and no temporary array is as large as the states.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from mquant.errors import SourceError
from mquant.forward.linears import Linears
from mquant.forward.not_finite import not_finite
from mquant.loader_model.modules import ModuleView
from mquant.weights.decode import Floats
from mquant.weights.matrix import AnyReader, Matrix, Workers, matrix_of, plain

Integers = npt.NDArray[np.int64]

SLICE: Final = 512
"""Tokens in one product."""


class Tensors:
    """The weights of a checkpoint, which are read when they are needed."""

    def __init__(self, view: ModuleView, reader: AnyReader, workers: Workers) -> None:
        """Find the weights without reading a weight. The view's family must be known."""
        self.view, self.workers = view, workers
        family = view.family
        assert family is not None  # noqa: S101 -- callers refuse an unknown family
        self._matrices: dict[str, Matrix | None] = {}
        for module in view.modules.values():
            for suffix, info in module.tensors.items():
                if suffix not in module.quantized:
                    name = family.in_memory_name(f"{module.name}.{suffix}")
                    self._matrices[name] = plain(info, reader)
            if module.quantized:
                name = family.in_memory_name(f"{module.name}.weight")
                self._matrices[name] = matrix_of(view, module, reader)

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor of this name, which is transformers' name."""
        return name in self._matrices

    def matrix(self, name: str) -> Matrix:
        """Return a weight on disk. Raises SourceError if the weight is missing or not decodable."""
        matrix = self._matrices.get(name)
        if matrix is None:
            raise SourceError(
                f"{self.view.checkpoint.source.name} has no {name} that mquant can decode.",
                "Run mquant verify on the checkpoint.",
            )
        return matrix

    def rows(self, name: str, first: int, last: int, use: str) -> Floats:
        """Read rows [first, last) of a weight into this thread's buffer for `use`."""
        matrix = self.matrix(name)
        scratch = self.workers.scratch
        out = scratch.floats(use, (last - first, matrix.shape[1]))
        matrix.read(first, last, out, scratch)
        return out

    def weight(self, name: str, use: str) -> Floats:
        """Read a whole weight [rows, columns] into this thread's buffer for `use`."""
        return self.rows(name, 0, self.matrix(name).shape[0], use)

    def vector(self, name: str) -> Floats:
        """Read a whole vector."""
        vector: Floats = self.weight(name, "vector")[0].copy()
        return vector

    def bias(self, module: str) -> Floats | None:
        """Read a module's bias; None if the module has none."""
        name = f"{module}.bias"
        return self.vector(name) if self.has(name) else None

    def first(self, at: str, names: Iterable[str]) -> str | None:
        """Return the first of some modules below `at` that the checkpoint has, with its name."""
        modules = (f"{at}.{name}" for name in names)
        return next((module for module in modules if self.has(f"{module}.weight")), None)

    def not_finite(self, gives: str, *prefixes: str) -> SourceError:
        """Return the error that says why a part of the model `gives` NaN or infinity.

        The names of the part's weights, as transformers has them, start with `prefixes`.
        """
        part = [each for name, each in self._matrices.items() if name.startswith(prefixes)]
        source = self.view.checkpoint.source.name
        return not_finite(source, gives, (each for each in part if each), self.workers.scratch)

    def check_finite(self, states: Floats, gives: str, *prefixes: str) -> None:
        """Raise the error of `not_finite` if `states` [n, size] hold NaN or infinity."""
        if not np.isfinite(states.sum(axis=1, dtype=np.float64)).all():
            raise self.not_finite(gives, *prefixes)

    def nbytes(self, prefix: str) -> int:
        """Return the bytes of the tensors whose names, as transformers has them, have a prefix."""
        part = [each for name, each in self._matrices.items() if each and name.startswith(prefix)]
        return sum({info.name: info.nbytes for each in part for info in each.tensors}.values())

    def weights(self, names: tuple[str, ...], inputs: Floats) -> tuple[Floats, ...]:
        """Read the weights from disk, as `Linears` says. `inputs` do not matter."""
        return tuple(self.weight(name, name.rsplit(".", 2)[-2]) for name in names)

    def hear_block(self, experts: str, inputs: Floats) -> None:
        """Do nothing: weights on disk do not depend on inputs."""

    def in_slices(self, count: int, work: Callable[[slice], None]) -> None:
        """Let workers do the work on each slice of `count` tokens."""
        starts = range(0, count, SLICE)
        list(self.workers.map(work, (slice(at, min(at + SLICE, count)) for at in starts)))

    def normed(self, values: Floats, name: str, eps: float) -> Floats:
        """Return the RMS norm of `values` [n, size] over the last axis, with the weight `name`."""
        weight, out = self.vector(name), np.empty(values.shape, np.float32)

        def work(part: slice) -> None:
            out[part] = rms_norm(values[part], weight, eps)

        self.in_slices(len(values), work)
        return out

    def linear(self, values: Floats, modules: Sequence[str], linears: Linears) -> list[Floats]:
        """Return `values` [n, in] times the weight [out, in] of each module, plus its bias.

        The modules have the same inputs.
        """
        names = tuple(f"{module}.weight" for module in modules)
        weights = linears.weights(names, values)
        return [self.times(values, *pair) for pair in zip(weights, modules, strict=True)]

    def times(self, values: Floats, weight: Floats, module: str) -> Floats:
        """Return `values` [n, in] times `weight` [out, in], plus the module's bias."""
        out, bias = np.empty((len(values), len(weight)), np.float32), self.bias(module)

        def work(part: slice) -> None:
            np.matmul(values[part], weight.T, out=out[part])
            if bias is not None:
                out[part] += bias

        self.in_slices(len(values), work)
        return out

    def add_linear(
        self,
        values: Floats,
        module: str,
        linears: Linears,
        out: Floats,
        factors: Floats | None = None,
    ) -> None:
        """Add the module's results for `values` [n, in], times `factors` [n, 1], to `out`."""
        (weight,) = linears.weights((f"{module}.weight",), values)
        bias = self.bias(module)

        def work(part: slice) -> None:
            result = values[part] @ weight.T
            if bias is not None:
                result += bias
            if factors is not None:
                result *= factors[part]
            out[part] += result

        self.in_slices(len(values), work)


def rms_norm(values: Floats, weight: Floats, eps: float) -> Floats:
    """Return the RMS norm over the last axis."""
    mean = np.mean(np.square(values), axis=-1, keepdims=True)
    out: Floats = values * (1 / np.sqrt(mean + np.float32(eps)))
    out *= weight
    return out
