"""Fused sets whose codes in MXFP4 become NVFP4 without decoding. Pure.

Both formats hold E2M1 codes, so the cast loses nothing where the exponents of the scales allow; see
`numerics.mx_cast`. A search of scales could find nothing better, so a cast set is not searched.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from mquant.family import FusedSet
from mquant.loader_model.storage import MXFP4S
from mquant.plan.action import Action
from mquant.plan.members import Member
from mquant.schemes import NVFP4A16


def with_casts(members: Sequence[Member], actions: Sequence[Action]) -> list[Action]:
    """Return the actions of the members; a fused set in MXFP4, for NVFP4A16, is cast.

    A set is cast as a whole, because its weights share a global scale.
    """
    sets: dict[FusedSet | str, list[int]] = defaultdict(list)
    for number, member in enumerate(members):
        if member.stored and member.stored.format in MXFP4S:
            sets[member.tensor_role.fused_set or member.info.name].append(number)
    plain = {
        member.tensor_role.fused_set
        for member in members
        if not (member.stored and member.stored.format in MXFP4S)
    }
    changed = list(actions)
    for key, numbers in sets.items():
        if key not in plain and all(_castable(actions[number]) for number in numbers):
            for number in numbers:
                changed[number] = replace(actions[number], cast=True)
    return changed


def _castable(action: Action) -> bool:
    """Return whether an action quantizes to NVFP4A16; a weight of an unfit shape has no outputs."""
    return action.scheme == NVFP4A16 and bool(action.outputs)
