"""The tensors that store a quantized module, in other tools' formats. A weight is [out, in]."""

from differential_draft import Header, Layout

BLOCK, GROUP = 128, 16


def modelopt_nvfp4(module: str, shape: tuple[int, ...]) -> dict[str, Header]:
    """Return ModelOpt's NVFP4, weights only."""
    rows, columns = shape
    return {
        f"{module}.weight": ("U8", (rows, columns // 2)),
        f"{module}.weight_scale": ("F8_E4M3", (rows, columns // GROUP)),
        f"{module}.weight_scale_2": ("F32", ()),
    }


def modelopt_w4a4(module: str, shape: tuple[int, ...]) -> dict[str, Header]:
    """Return ModelOpt's NVFP4 with activations in NVFP4 too."""
    return {**modelopt_nvfp4(module, shape), f"{module}.input_scale": ("F32", ())}


def fp8_blocks(module: str, shape: tuple[int, ...]) -> dict[str, Header]:
    """Return FP8 with a scale for each block, as first released by DeepSeek and MiniMax."""
    rows, columns = shape
    return {
        f"{module}.weight": ("F8_E4M3", shape),
        f"{module}.weight_scale_inv": ("F32", (-(-rows // BLOCK), -(-columns // BLOCK))),
    }


def fp8_tensor(module: str, shape: tuple[int, ...]) -> dict[str, Header]:
    """Return FP8 with one scale; activations are scaled at run time."""
    return {f"{module}.weight": ("F8_E4M3", shape), f"{module}.weight_scale": ("F32", ())}


def fp8_static(module: str, shape: tuple[int, ...]) -> dict[str, Header]:
    """Return FP8 with one scale of weights and one of activations."""
    return {**fp8_tensor(module, shape), f"{module}.input_scale": ("F32", ())}


def ct_fp8_static(module: str, shape: tuple[int, ...]) -> dict[str, Header]:
    """Return compressed-tensors' preset FP8: both scales have one element."""
    return {
        f"{module}.weight": ("F8_E4M3", shape),
        f"{module}.weight_scale": ("BF16", (1,)),
        f"{module}.input_scale": ("BF16", (1,)),
    }


def packed(bits: int, group: int | None, *, symmetric: bool, order: bool = False) -> Layout:
    """Return compressed-tensors' packed integers; `group` None: a scale for each row."""

    def layout(module: str, shape: tuple[int, ...]) -> dict[str, Header]:
        rows, columns = shape
        per_word = 32 // bits
        groups = 1 if group is None else -(-columns // group)
        tensors: dict[str, Header] = {
            f"{module}.weight_packed": ("I32", (rows, -(-columns // per_word))),
            f"{module}.weight_scale": ("BF16", (rows, groups)),
            f"{module}.weight_shape": ("I64", (2,)),
        }
        if not symmetric:
            tensors[f"{module}.weight_zero_point"] = ("I32", (-(-rows // per_word), groups))
        if order:
            tensors[f"{module}.weight_g_idx"] = ("I32", (columns,))
        return tensors

    return layout
