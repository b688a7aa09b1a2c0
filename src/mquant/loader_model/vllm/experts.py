"""The routed experts of a layer, without data, and how vLLM loads them (`routed_experts.py`).

vLLM keeps all experts of a layer in one parameter: `w13_` holds gate and up one above the other,
`w2_` holds down.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from mquant.loader_model.vllm.layers import Layer, Shard
from mquant.loader_model.vllm.tensors import (
    MODEL_DTYPE,
    Copies,
    Loaded,
    LoadRefused,
    Parameter,
    Unknown,
    View,
)

_NUMBERED: Final = re.compile(r"(\d+)\.([^.]+)\.(.+)")
_PARTS: Final = ("w1", "w2", "w3")
_STACKED: Final = dict(zip(("gate", "down", "up"), _PARTS, strict=True))
_FUSED: Final = {"gate_proj": "gate_up_proj", "w1": "w13"}
"""The name of the gate on disk -> the name of gate and up in one tensor."""
_DIMENSION: Final = {"w1": 0, "w2": 1, "w3": 0}


@dataclass(eq=False)
class Experts(Layer):
    """The experts of a layer. `names` are gate, down and up on disk, or up and down without a gate.

    `also` are other names of gate, down and up. `asked_names` are those for which vLLM asks the
    quantization config.

    `intermediate` is that of one rank; `ranks` is the number of ranks that share every expert.
    `layout` names the quantization method whose own way of loading scales vLLM follows: `modelopt`,
    `compressed-tensors`, or empty. `unknown` is a clause if it is not known how vLLM loads them.
    `transposed`: tensors of all experts have columns before rows. `biased`: the experts have
    biases; not all quantization methods create them.
    """

    count: int = 0
    hidden: int = 0
    intermediate: int = 0
    ranks: int = 1
    names: tuple[str, ...] = ("gate_proj", "down_proj", "up_proj")
    also: tuple[str, ...] | None = None
    asked_names: tuple[str, ...] = ()
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of modules that hold parts of all experts -> the parts, in order."""
    transposed: bool = False
    biased: bool = False
    layout: str = ""
    unknown: str = ""
    repeats: tuple[int, int] | None = None
    """How often vLLM repeats the rows and columns of block scales, for smaller blocks."""
    loads_itself = True

    @property
    def gated(self) -> bool:
        """Whether an expert has a gate beside up."""
        return len(self.names) == 3

    @property
    def shards(self) -> int:
        """The number of matrices in `w13_`: gate and up, or up alone."""
        return 2 if self.gated else 1

    @property
    def asked(self) -> tuple[str, ...]:
        """The names of an expert's matrices for which vLLM asks the quantization config."""
        return asked_matrices(self.asked_names or self.names)

    @property
    def _every_names(self) -> tuple[tuple[str, ...], ...]:
        return (self.names, self.also) if self.also else (self.names,)

    def _fused(self, names: tuple[str, ...]) -> str | None:
        """Return the name on disk of gate and up, or of up alone, of all experts."""
        return _FUSED.get(names[0]) if self.gated else names[0]

    def build(self, parameters: Iterable[Parameter] | None) -> None:
        """Create the parameters: those of a quantization method, or plain weights."""
        if parameters is None:
            parameters = (
                Parameter(
                    "w13_weight",
                    MODEL_DTYPE,
                    (self.count, self.shards * self.intermediate, self.hidden),
                ),
                Parameter("w2_weight", MODEL_DTYPE, (self.count, self.hidden, self.intermediate)),
                *self.biases(),
            )
        self.add(*parameters)

    def biases(self) -> list[Parameter]:
        """Return the parameters of the biases, if the experts have biases."""
        sizes = {"w13_bias": 2 * self.intermediate, "w2_bias": self.hidden} if self.biased else {}
        return [Parameter(name, MODEL_DTYPE, (self.count, size)) for name, size in sizes.items()]

    def add(self, *parameters: Parameter) -> None:
        """Add parameters, which vLLM names after the module that holds all experts."""
        for parameter in parameters:
            self.parameters[parameter.name] = parameter
            parameter.name = f"{self.name}.routed_experts.{parameter.name}"

    def load(self, copies: Copies, last: str, loaded: Loaded, shard: Shard) -> None:
        """Copy one expert's tensor; `last` is `<number>.<projection>.<suffix>`.

        vLLM passes over names that its map of experts lacks: numbers beyond the count, and other
        projections.
        """
        if self.unknown:
            raise Unknown(self.unknown)
        match = _NUMBERED.fullmatch(last)
        if match is None:
            self._other(copies, last, loaded)
            return
        number, projection, suffix = int(match[1]), match[2], match[3]
        if self.gated and projection in map(self._fused, self._every_names):
            raise Unknown(f"experts with a fused {projection} ({loaded.name})")
        names = next((names for names in self._every_names if projection in names), None)
        if number >= self.count or str(number) != match[1] or names is None:
            return
        part = _PARTS[names.index(projection)]
        key = ("w2_" if part == "w2" else "w13_") + suffix
        if key not in self.parameters:
            if key in ("w13_bias", "w2_bias"):
                return
            raise LoadRefused(
                loaded.name, f"vLLM's {self.name} has no parameter {key.partition('_')[2]}"
            )
        self._load(copies, self.parameters[key], loaded, number, part)

    def _other(self, copies: Copies, last: str, loaded: Loaded) -> None:
        """Load a tensor that is not of one expert: experts fused in one tensor, or no expert."""
        for names in self._every_names:
            fused = self._fused(names)
            known = fused or "gate_up_proj"
            if len(loaded.shape) == 3 and not self.layout and fused:
                if last == known and self._is_plain("w13_weight"):
                    self._all(copies, loaded, *("w1", "w3")[: self.shards])
                    return
                if last == names[1] and self._is_plain("w2_weight"):
                    self._all(copies, loaded, "w2")
                    return
            if any(f"experts.{name}" in f"experts.{last}" for name in (known, names[1])):
                raise Unknown(f"experts in one tensor ({loaded.name})")

    def load_stack(self, copies: Copies, name: str, loaded: Loaded, suffix: str) -> None:
        """Copy a tensor of all experts; `name` is that of a module in `stacks`.

        vLLM passes over a tensor for which the experts have no parameter.
        """
        parts = tuple(_STACKED[part] for part in self.stacks[name])
        if ("w2_" if parts[0] == "w2" else "w13_") + suffix not in self.parameters:
            return
        if suffix != "weight" or len(loaded.shape) != 3:
            raise Unknown(f"experts in one tensor ({loaded.name})")
        self._all(copies, loaded, *parts)

    def _is_plain(self, key: str) -> bool:
        return key in self.parameters and self.parameters[key].dtype == MODEL_DTYPE

    def _all(self, copies: Copies, loaded: Loaded, *parts: str) -> None:
        """Copy a tensor of all experts, which holds the rows of each part."""
        experts, rows, columns = loaded.shape
        if self.transposed:
            rows, columns = columns, rows
        first = -(-rows // len(parts))
        for part, height in zip(parts, (first, rows - first), strict=False):
            if not height:
                raise LoadRefused(loaded.name, f"has no rows of {part}")
            expert = Loaded(loaded.name, loaded.dtype, (height, columns))
            parameter = self.parameters["w2_weight" if part == "w2" else "w13_weight"]
            for number in range(experts):
                self._load(copies, parameter, expert, number, part)

    def _load(
        self, copies: Copies, parameter: Parameter, loaded: Loaded, number: int, part: str
    ) -> None:
        suffix = parameter.name.rpartition(".")[2].partition("_")[2]
        if parameter.transposed:
            if len(loaded.shape) > 2:
                raise LoadRefused(loaded.name, f"has shape {list(loaded.shape)}")
            loaded = replace(loaded, shape=loaded.shape[::-1])
        dim = _DIMENSION[part] ^ parameter.transposed
        target = parameter.whole()
        if len(loaded.shape) == 3:
            dim += 1
        else:
            target = target.index(number)
        strategy = parameter.quant_method
        if "input_scale" in suffix:
            self._input_scale(copies, parameter, loaded, number, part)
        elif self.layout == "modelopt":
            self._modelopt(copies, parameter, target, loaded, number, part)
        elif "scale" in suffix or "zero" in suffix or "offset" in suffix:
            if strategy == "tensor":
                self._scalar(copies, parameter, loaded, number, part)
            elif strategy == "channel" and part == "w2":
                copies.copy(_narrowed(target, loaded, *_hidden_first(dim, target)), loaded)
            elif strategy in ("channel", "group", "block"):
                if self.repeats and strategy == "block":
                    loaded = loaded.repeat(*self.repeats)
                self._matrix(copies, target, loaded, dim, part)
            else:
                raise LoadRefused(loaded.name, "vLLM knows no strategy for the scale")
        elif "weight_shape" in suffix:
            copies.assign(parameter.whole().index(number), loaded)
        elif "weight" in suffix:
            self._matrix(copies, target, loaded, dim, part)

    def _input_scale(
        self, copies: Copies, parameter: Parameter, loaded: Loaded, number: int, part: str
    ) -> None:
        if self.layout == "modelopt" and len(parameter.shape) == 2 and part != "w2":
            self._scalar(copies, parameter, loaded, number, part)
        else:
            copies.assign(parameter.whole().index(number), loaded)

    def _modelopt(
        self,
        copies: Copies,
        parameter: Parameter,
        target: View,
        loaded: Loaded,
        number: int,
        part: str,
    ) -> None:
        suffix = parameter.name.rpartition(".")[2].partition("_")[2]
        if parameter.quant_method == "tensor":
            self._scalar(copies, parameter, loaded, number, part)
            return
        dim = _DIMENSION[part] + (len(loaded.shape) == 3)
        if part != "w2" and suffix == "weight_scale":
            if len(loaded.shape) < 2:
                raise LoadRefused(loaded.name, f"has shape {list(loaded.shape)}, not rows")
            if loaded.shape[-2] == parameter.shape[-2]:  # gate and up in one tensor
                copies.copy(target, loaded.narrow(dim, 0, target.shape[dim]))
                return
        self._matrix(copies, target, loaded, dim, part)

    @staticmethod
    def _scalar(
        copies: Copies, parameter: Parameter, loaded: Loaded, number: int, part: str
    ) -> None:
        place = parameter.whole().index(number)
        if part != "w2":
            place = place.index(0 if part == "w1" else 1)
        copies.assign(place, loaded.reshape(()))

    def _matrix(self, copies: Copies, target: View, loaded: Loaded, dim: int, part: str) -> None:
        """Copy a weight, or its scales; a larger target is filled in part."""
        if loaded.shape:
            if dim >= len(loaded.shape):
                raise LoadRefused(
                    loaded.name, f"has shape {list(loaded.shape)}, and vLLM splits dimension {dim}"
                )
            if not loaded.shape[dim]:
                return
        if part != "w2" and self.gated:
            half = target.shape[dim] // 2
            target = target.narrow(dim, 0 if part == "w1" else half, half)
        copies.copy(_narrowed(target, loaded, *_hidden_first(dim, target)), loaded)


def asked_matrices(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the matrices of an expert for which vLLM asks: without a gate also one named None."""
    return (*names, "None")[:3]


def _hidden_first(dim: int, target: View) -> tuple[int, int]:
    """Return the dimension of the hidden size, and that of the intermediate size."""
    dims = len(target.shape)
    if dims < 2:
        return 0, dim
    if dim not in (dims - 2, dims - 1):
        raise LoadRefused(target.parameter.name, f"has no dimension {dim} to split")
    return (dims - 1 if dim == dims - 2 else dims - 2), dim


def _narrowed(target: View, loaded: Loaded, *dims: int) -> View:
    """Return the part of the target that a smaller tensor fills."""
    for dim in dims if loaded.shape else ():
        inside = 0 <= dim < min(len(target.shape), len(loaded.shape))
        if inside and target.shape[dim] > loaded.shape[dim]:
            target = target.narrow(dim, 0, loaded.shape[dim])
    return target
