"""Report whether the checkpoint lacks modules for multi-token prediction, which is no error."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from mquant.family import Family, TensorRole
from mquant.findings import Finding, rule

MTP_WITHOUT_TENSORS: Final = rule(
    "mtp-without-tensors",
    "If config.json declares multi-token prediction modules, the checkpoint has their tensors.",
    "Loaders work without the modules; speculative decoding with them is not possible. The "
    "releases of MiniMax-M2 lack them, too.",
    "Nothing to do: only multi-token prediction cannot be used.",
    severity="info",
    knowing=("family",),
)


def check_mtp(
    family: Family, config: Mapping[str, Any], named_roles: Iterable[tuple[str, TensorRole | None]]
) -> Iterator[Finding]:
    """Yield a finding if config.json declares multi-token prediction modules that are missing.

    `named_roles` are names of tensors or modules, and the role that the family gives each name.
    """
    key = family.config.mtp
    count = family.value(key, config) if key else None
    if count is None or not 0 < count < 2**53:
        return
    layers = family.value(family.config.layers, config) or 0
    # MTP modules are numbered after the last layer, or have their own prefix.
    for name, tensor_role in named_roles:
        if "mtp" in name if tensor_role is None else (tensor_role.layer or -1) >= layers:
            return
    yield MTP_WITHOUT_TENSORS.finding(
        key, f"config.json says {key} {count}, but there is no tensor of such a module."
    )
