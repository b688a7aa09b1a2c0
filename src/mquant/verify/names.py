"""Judge whether tensors have names that loaders know, and plain tensors hold floats."""

from typing import Final

from mquant.dtypes import PLAIN_DTYPES
from mquant.family import Family
from mquant.family_rows import Role
from mquant.findings import rule
from mquant.loader_model.modules import ModuleView
from mquant.plan.survey import TENSOR_UNKNOWN
from mquant.verify.tally import Tally

# Loaders accept KV cache scales beside any attention, and work without such scales.
_HARMLESS: Final = ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale")
TENSOR_RENAMED: Final = rule(
    "tensor-renamed",
    "Tensors have the names of the original release, not those of a loaded model.",
    "vLLM knows the original names only, and refuses or drops other names.",
    "Save again with the original names, or quantize with mquant, which keeps the original names.",
    knowing=("family",),
    if_loads="nothing",
)
DTYPE_NOT_FLOAT: Final = rule(
    "dtype-not-float",
    "A tensor that is not quantized has a dtype of floats, or the family's dtype.",
    "vLLM converts integers and 8-bit codes to floats by value, without an error.",
    "Take the tensor from the parent, or quantize again.",
    knowing=("family",),
)


def check_names(view: ModuleView, family: Family, tally: Tally) -> None:
    """Judge the name of every tensor, and the dtype of every tensor that is not quantized."""
    for module in view.modules.values():
        renamed = family.classify_in_memory(f"{module.name}.weight")
        for suffix, info in module.tensors.items():
            if suffix in _HARMLESS:
                continue
            if (tensor_role := family.classify(info.name)) is not None:
                part = suffix in module.quantized
                if not part and info.dtype not in PLAIN_DTYPES | {tensor_role.row.dtype}:
                    tally.add(
                        DTYPE_NOT_FLOAT, info.name, f"{info.name} is {info.dtype}, not floats"
                    )
                continue
            if family.stack_of(info.name):
                continue  # `layouts` reports its shape
            part = suffix in module.quantized or suffix == "weight_g_idx"
            if module.tensor_role is not None and part:
                continue
            if renamed is not None and (part or suffix == "weight"):
                if renamed.row.role is Role.EXPERT:
                    continue  # `check_ignore` reports experts, with vLLM's names
                hub = renamed.row.format(renamed.layer, renamed.expert).removesuffix(".weight")
                tally.add(
                    TENSOR_RENAMED,
                    info.name,
                    f"{info.name} has a loaded model's name; on disk the module is {hub}",
                )
            else:
                tally.add(
                    TENSOR_UNKNOWN, info.name, f"{family.title} has no such tensor as {info.name}"
                )
