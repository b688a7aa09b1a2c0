"""Tensors without data: a tensor of the checkpoint, a parameter of the model, and copies.

vLLM's loaders narrow, index and reshape a tensor, then copy the tensor into a part of a parameter.
Here the same operations act on shapes, raise where torch or vLLM raises, and are recorded.
"""

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from fractions import Fraction
from typing import Final, Self

Shape = tuple[int, ...]
MODEL_DTYPE: Final = "BF16"
"""The dtype of parameters that have the model's own dtype: F32, F16 and BF16 are alike here."""
_CONVERTIBLE: Final = (frozenset({"BF16", "F16", "F32", "F64"}), frozenset({"I32", "I64"}))


class LoadRefused(Exception):
    """vLLM stops. `where` is a tensor, a module or a file; `why` is a clause."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where, self.why = where, why


class Unknown(Exception):
    """It is not known what vLLM does; the text is a clause that says of what."""


class Kind(Enum):
    """The class of a parameter, which decides how a linear layer loads the parameter.

    COLUMN is split along the outputs only, ROW along the inputs only, MATRIX along both. SCALES has
    one element for each matrix that was fused. WHOLE is never split. PLAIN is no parameter of these
    classes: the layer's first loader, or torch's default, copies the tensor.
    """

    MATRIX = "matrix"
    COLUMN = "column"
    ROW = "row"
    SCALES = "scales"
    WHOLE = "whole"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A tensor of the checkpoint, or a view of the tensor."""

    name: str
    dtype: str
    shape: Shape

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def narrow(self, dim: int, start: int, size: int) -> "Loaded":
        """Return rows `start` to `start + size` of a dimension, as torch's `narrow` does."""
        return Loaded(self.name, self.dtype, _narrowed(self.name, self.shape, dim, start, size))

    def first(self) -> Self:
        """Return the view `tensor[0]`."""
        return replace(self, shape=self.shape[1:])

    def largest(self, dim: int) -> Self:
        """Return the largest elements along a dimension, as torch's `amax` does."""
        return replace(self, shape=(*self.shape[:dim], *self.shape[dim + 1 :]))

    def reshape(self, shape: Shape) -> "Loaded":
        """Return a view of another shape. Raises LoadRefused if the number of elements differs."""
        if math.prod(shape) != self.numel:
            raise LoadRefused(self.name, f"has shape {list(self.shape)}, not {list(shape)}")
        return Loaded(self.name, self.dtype, shape)

    def repeat(self, rows: int, columns: int) -> Self:
        """Return the tensor with every row and column repeated. Raises LoadRefused of a vector."""
        if len(self.shape) < 2:
            raise LoadRefused(self.name, f"has shape {list(self.shape)}, not rows and columns")
        *front, height, width = self.shape
        return replace(self, shape=(*front, height * rows, width * columns))

    def scalar_as_vector(self) -> Self:
        """Return a scalar as a vector of one element, and anything else as it is."""
        return self if self.shape else replace(self, shape=(1,))


@dataclass(eq=False, slots=True)
class Parameter:
    """A parameter of the model, and the places that were copied into.

    `output_dim` and `input_dim` are None if the parameter has none. `packed_dim` holds
    `packed_factor` values in one element; `block` rows of a weight share one row of scales.
    `optional`: no checkpoint must fill the parameter. `quant_method` is the strategy of an expert's
    scales.
    """

    name: str
    dtype: str
    shape: Shape
    kind: Kind = Kind.PLAIN
    output_dim: int | None = None
    input_dim: int | None = None
    packed_dim: int | None = None
    packed_factor: int | Fraction = 1
    block: int = 0
    optional: bool = False
    transposed: bool = False
    quant_method: str = ""
    _places: dict[Shape, set[int]] = field(default_factory=dict)
    """Shape -> the first elements of the places, which are many: two for each expert."""

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def missing(self) -> int:
        """The number of elements that nothing was copied into."""
        return max(0, self.numel - sum(math.prod(s) * len(f) for s, f in self._places.items()))

    def whole(self) -> "View":
        """Return the parameter as a view."""
        return View(self, (0,) * len(self.shape), self.shape)

    def written(self, offset: Shape, shape: Shape) -> None:
        """Note that elements were copied to a place; a place counts once."""
        first = 0
        for place, size in zip(offset, self.shape, strict=True):
            first = first * size + place
        self._places.setdefault(shape, set()).add(first)


@dataclass(frozen=True, slots=True)
class View:
    """A part of a parameter. `offset` has one number for each dimension of the parameter."""

    parameter: Parameter
    offset: Shape
    shape: Shape
    hidden: int = 0
    """The number of leading dimensions that were indexed away."""

    def narrow(self, dim: int, start: int, size: int) -> "View":
        """Return a part along a dimension, as torch's `narrow` does."""
        shape = _narrowed(self.parameter.name, self.shape, dim, start, size)
        place = list(self.offset)
        place[self.hidden + dim] += start
        return View(self.parameter, tuple(place), shape, self.hidden)

    def index(self, number: int) -> "View":
        """Return the view `parameter[number]`."""
        if not self.shape or not -self.shape[0] <= number < self.shape[0]:
            raise LoadRefused(self.parameter.name, f"has no element {number}")
        place = list(self.offset)
        place[self.hidden] += number % self.shape[0]
        return View(self.parameter, tuple(place), self.shape[1:], self.hidden + 1)


@dataclass
class Copies:
    """The copies of one load, which show what was dropped, spread and converted."""

    used: int = 0
    """The elements of the tensor being loaded that were copied, or passed over on purpose."""
    reshaped: dict[str, tuple[str, Shape, Shape]] = field(default_factory=dict)
    converted: dict[str, tuple[str, str, str]] = field(default_factory=dict)

    def same(self, target: View, source: Loaded) -> None:
        """Copy if the shapes are the same; vLLM asserts it."""
        if target.shape != source.shape:
            raise LoadRefused(
                source.name,
                f"has shape {list(source.shape)}, and vLLM's {target.parameter.name} takes "
                f"{list(target.shape)}",
            )
        self.copy(target, source)

    def assign(self, target: View, source: Loaded) -> None:
        """Copy as `target[...] = source` does: leading dimensions of one are dropped."""
        while len(source.shape) > len(target.shape) and source.shape[0] == 1:
            source = source.first()
        self.copy(target, source)

    def copy(self, target: View, source: Loaded) -> None:
        """Copy as torch's `copy_` does: a smaller tensor is spread over the target."""
        alike = source.shape == target.shape
        if not alike and not _spreads(source.shape, target.shape):
            raise LoadRefused(
                source.name,
                f"has shape {list(source.shape)}, and vLLM's {target.parameter.name} takes "
                f"{list(target.shape)}",
            )
        name = source.name
        scalar = source.numel == 1 and math.prod(target.shape) <= 1
        if not (alike or scalar) and _without_ones(source.shape) != _without_ones(target.shape):
            self.reshaped.setdefault(name, (name, source.shape, target.shape))
        self.used += source.numel
        dtype = target.parameter.dtype
        loses = not any({source.dtype, dtype} <= alike for alike in ({dtype}, *_CONVERTIBLE))
        # Experts' weight_shape goes into a parameter that nothing reads.
        if loses and not name.endswith(".weight_shape"):
            self.converted.setdefault(name, (name, source.dtype, dtype))
        rest = target.parameter.shape[target.hidden + len(target.shape) :]
        target.parameter.written(target.offset, (*target.shape, *rest))


def _narrowed(name: str, shape: Shape, dim: int, start: int, size: int) -> Shape:
    if not shape:
        raise LoadRefused(name, "is a scalar, and vLLM takes rows of it")
    if not -len(shape) <= dim < len(shape):
        raise LoadRefused(name, f"has shape {list(shape)}, and vLLM splits dimension {dim}")
    if size < 0 or start < 0 or start + size > shape[dim]:
        raise LoadRefused(name, f"has shape {list(shape)}, and vLLM wants {start + size} of it")
    dim %= len(shape)
    return (*shape[:dim], size, *shape[dim + 1 :])


def _without_ones(shape: Shape) -> list[int]:
    return [size for size in shape if size != 1]


def _spreads(source: Shape, target: Shape) -> bool:
    """Return whether torch broadcasts `source` to exactly `target`."""
    if len(source) > len(target):
        return False
    tail = target[len(target) - len(source) :]
    return all(n in (1, m) for n, m in zip(source, tail, strict=True))
