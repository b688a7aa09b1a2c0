"""A tensor of a checkpoint, with the role that the family gives the tensor's name."""

from dataclasses import dataclass

from mquant.checkpoint import TensorInfo
from mquant.family import TensorRole
from mquant.family_rows import Role
from mquant.plan.stored import Stored


@dataclass(frozen=True, slots=True)
class Member:
    """A source tensor, with the role that the family gives the tensor's name.

    A weight that is stored quantized is one member: `info` is the weight in BF16, at the place of
    its codes, and `stored` says how the weight is stored.
    """

    info: TensorInfo
    tensor_role: TensorRole
    stored: Stored | None = None

    @property
    def role(self) -> Role:
        """What the tensor is for."""
        return self.tensor_role.row.role

    @property
    def module(self) -> str:
        """The hub name of the module that owns the tensor."""
        return self.info.name.rpartition(".")[0]
