"""Find the factors by which AWQ scaled modules, from norms, and scale the parent's weights alike.

AWQ divides a norm by a vector, and multiplies the columns of all modules that read the norm.
"""

from dataclasses import dataclass

import numpy as np

from mquant.family_rows import Role
from mquant.loader_model.modules import Module, ModuleView
from mquant.verify.numbers import PIECE
from mquant.weights.decode import READABLE, Floats, floats
from mquant.weights.stored_weight import Rows, StoredWeight, read


class Scaling:
    """The factors by which AWQ scaled a checkpoint's modules, relative to the parent's."""

    def __init__(self, view: ModuleView, parent: ModuleView) -> None:
        self._layout, self._parent = view, parent
        groups = parent.family.smoothings if parent.family else ()
        self._fed_by = {row.name: group[0] for group in groups for row in group[1:]}
        # The rows of a divided weight differ too, and no norm shows the divisor.
        self._fed_by |= {group[0].name: group[0] for group in groups}
        self._factors: dict[str, Floats | None] = {}

    def __contains__(self, module: Module) -> bool:
        return module.tensor_role is not None and module.tensor_role.row.name in self._fed_by

    def factors(self, module: Module) -> Floats | None:
        """Return a module's factor of each column, float32 [in]; None if no norm shows factors."""
        tensor_role = module.tensor_role
        by = self._fed_by.get(tensor_role.row.name) if tensor_role else None
        if tensor_role is None or by is None or by.role is not Role.NORM or by is tensor_role.row:
            return None
        name = by.format(tensor_role.layer, None)
        if name not in self._factors:
            self._factors[name] = self._quotient(name)
        return self._factors[name]

    def _quotient(self, norm: str) -> Floats | None:
        own, reference = (_vector(view, norm) for view in (self._layout, self._parent))
        if own is None or reference is None or own.shape != reference.shape:
            return None
        with np.errstate(all="ignore"):
            quotient: Floats = reference / own
        return None if np.isnan(quotient).any() else quotient  # 0 / 0: any factor is possible


@dataclass(frozen=True)
class Scaled(StoredWeight):
    """A parent's weight [out, in] whose columns are multiplied by factors [in] on each read."""

    factors: Floats

    def rows(self, first: int, last: int) -> Rows:
        """Return rows [first, last), scaled."""
        rows = super().rows(first, last)
        return Rows(rows.values * self.factors, rows.allowed)


def scaled(weight: StoredWeight, factors: Floats) -> StoredWeight:
    """Return a weight with scaled columns; the weight itself if the number of factors differs."""
    if factors.shape != (weight.shape[1],):
        return weight
    return Scaled(weight.view, weight.module, weight.format, weight.shape, factors)


def _vector(view: ModuleView, name: str) -> Floats | None:
    info = view.checkpoint.tensors.get(name)
    if info is None or info.dtype not in READABLE or info.nbytes > PIECE:  # no norm is so large
        return None
    return floats(read(view, info), info.dtype)
