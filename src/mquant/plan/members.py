"""A tensor of a checkpoint, with the role that the family gives the tensor's name."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

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


def apart(members: Iterable[Member], modules: Collection[str]) -> set[str]:
    """Return the tensors on disk that hold a tensor of one of `modules`, beside others."""
    return {m.info.held.by.name for m in members if m.info.held and m.module in modules}


def as_stored(members: Iterable[Member], split: Collection[str] = ()) -> list[Member]:
    """Return the members, with one member for each tensor on disk that holds many of them.

    A tensor that `split` names stays many members.
    """
    stored: dict[str, Member] = {}
    for member in members:
        held = member.info.held
        if held is None or held.by.name in split:
            stored[member.info.name] = member
        elif held.by.name not in stored:
            row = member.tensor_role.row.renamed(held.by.name).model_copy(update={"fused": ""})
            role = replace(member.tensor_role, row=row, expert=None)
            whole = member.stored.whole if member.stored else None
            stored[held.by.name] = Member(held.by, role, whole)
    return list(stored.values())
