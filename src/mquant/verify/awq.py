"""How much AWQ scaled each module, as far as norms tell, and the parent's weights scaled alike.

AWQ divides a norm by a vector, and multiplies the columns of all modules that read the norm.
"""

from dataclasses import dataclass

import numpy as np

from mquant.family import Role
from mquant.loader_model.modules import Module, ModuleView
from mquant.verify.numbers import PIECE
from mquant.weights.decode import READABLE, Floats, floats
from mquant.weights.stored_weight import Rows, StoredWeight, read


class Scaling:
    """The factors by which a checkpoint's modules were scaled, compared with the parent's."""

    def __init__(self, view: ModuleView, parent: ModuleView) -> None:
        self._layout, self._parent = view, parent
        groups = parent.family.smoothings if parent.family else ()
        self._fed_by = {row.name: group[0] for group in groups for row in group[1:]}
        # A divided weight has other rows, too, and no norm shows the divisor.
        self._fed_by |= {group[0].name: group[0] for group in groups}
        self._factors: dict[str, Floats | None] = {}

    def __contains__(self, module: Module) -> bool:
        return module.tensor_role is not None and module.tensor_role.row.name in self._fed_by

    def factors(self, module: Module) -> Floats | None:
        """The factor of each column of a module, float32 [in]; None if no norm tells."""
        tensor_role = module.tensor_role
        by = self._fed_by.get(tensor_role.row.name) if tensor_role else None
        if tensor_role is None or by is None or by.role is not Role.NORM or by is tensor_role.row:
            return None
        name = by.format(tensor_role.layer, None)
        if name not in self._factors:
            self._factors[name] = self._quotient(name)
        return self._factors[name]

    def _quotient(self, norm: str) -> Floats | None:
        mine, reference = (_vector(each, norm) for each in (self._layout, self._parent))
        if mine is None or reference is None or mine.shape != reference.shape:
            return None
        with np.errstate(all="ignore"):
            quotient: Floats = reference / mine
        return None if np.isnan(quotient).any() else quotient  # 0 / 0: it may be anything


@dataclass(frozen=True)
class Scaled(StoredWeight):
    """A parent's weight [out, in] whose columns are multiplied with factors [in] as it is read."""

    factors: Floats

    def rows(self, first: int, last: int) -> Rows:
        """Rows [first, last), scaled."""
        found = super().rows(first, last)
        return Rows(found.values * self.factors, found.allowed)


def scaled(weight: StoredWeight, factors: Floats) -> StoredWeight:
    """A weight with its columns scaled; the weight itself if the number of factors differs."""
    if factors.shape != (weight.shape[1],):
        return weight
    return Scaled(weight.view, weight.module, weight.format, weight.shape, factors)


def _vector(view: ModuleView, name: str) -> Floats | None:
    info = view.checkpoint.tensors.get(name)
    if info is None or info.dtype not in READABLE or info.nbytes > PIECE:  # no model has such
        return None
    return floats(read(view, info), info.dtype)
