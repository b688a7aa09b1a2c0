"""A quantized checkpoint has as many parameters as the checkpoint that it was made from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import schemes
from judges import opened, read_json
from make import Edit, Row, make_checkpoint, write_json
from mquant.checkpoint import CONFIG_NAME, Folder
from mquant.family_files import load_families
from mquant.loader_model.modules import MODELOPT_NAME, read_modules
from mquant.loader_model.parameters import count_parameters
from mquant.plan import Plan, Target
from mquant.plan.model import config_json
from mquant.recipe import load_recipes
from mquant.runs.export import export
from mutate import mutated
from run import TRAINED, plan_of, wide

WIDTHS = {"U8": 1, "I8": 1, "F8_E8M0": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I32": 4}


def parameters(folder: Path) -> int | None:
    return count_parameters(read_modules(opened(folder), load_families()))


def headers_of(plan: Plan, folder: Path) -> Path:
    """Write the checkpoint of a plan without data, which the count does not read."""
    folder.mkdir()
    for shard in plan.shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.file_bytes)
    write_json(folder / CONFIG_NAME, config_json(plan))
    return folder


def in_place_of(suffix: str, *parts: tuple[str, str, tuple[int, ...]]) -> Edit:
    """Return an edit that stores every expert's w1.weight [32, 64] as `parts`."""

    def edit(rows: list[Row]) -> list[Row]:
        result: list[Row] = []
        for row in rows:
            if row[0].endswith(f"w1.{suffix}"):
                module = row[0].removesuffix(suffix)
                for name, dtype, shape in parts:
                    size = WIDTHS[dtype]
                    for length in shape:
                        size *= length
                    result.append((module + name, dtype, shape, bytes(size)))
            else:
                result.append(row)
        return result

    return edit


@pytest.mark.parametrize("recipe", list(load_recipes()))
def test_the_output_of_a_recipe_has_its_parent_s_parameters(tmp_path: Path, recipe: str) -> None:
    parent = wide(tmp_path / "parent")
    plan = plan_of(parent, recipe)
    assert plan.schemes
    assert parameters(headers_of(plan, tmp_path / "out")) == parameters(parent)


@pytest.mark.parametrize(
    ("edit", "config"),
    [
        (schemes.FP8_CHANNEL, schemes.fp8_channel),
        (schemes.FP8_BLOCKS, schemes.fp8_blocks),
        (schemes.INT4, schemes.int4),
        (schemes.INT8, schemes.int8),
        (schemes.with_input_scales, schemes.w4a4),
        (schemes.as_modelopt, schemes.modelopt),
    ],
)
def test_a_format_has_its_parent_s_parameters(
    trained: Path, tmp_path: Path, edit: Edit, config: Callable[[dict[str, Any]], None]
) -> None:
    table = read_json(trained / CONFIG_NAME)
    config(table)
    assert parameters(mutated(trained, tmp_path, edit=edit, config=table)) == parameters(TRAINED)


def test_an_export_has_its_parent_s_parameters(trained: Path, tmp_path: Path) -> None:
    export(Folder(trained), load_families(), Target.MODELOPT, tmp_path / "out")
    assert parameters(tmp_path / "out") == parameters(TRAINED)


@pytest.mark.parametrize(
    ("parts", "config"),
    [
        ([("gate_blocks", "U8", (32, 2, 16)), ("gate_scales", "U8", (32, 2))], None),
        ([("weight", "I8", (32, 32)), ("scale", "F8_E8M0", (32, 2))], None),
        ([("weight", "F8_E4M3", (32, 64)), ("scale", "F8_E8M0", (1, 1))], None),
        ([("weight_packed", "U8", (32, 32)), ("weight_scale", "U8", (32, 2))], None),
        (
            [("qweight", "I32", (8, 32)), ("qzeros", "I32", (1, 4)), ("g_idx", "I32", (64,))],
            {"quant_method": "gptq", "bits": 4},
        ),
        (
            [("qweight", "I32", (64, 4)), ("scales", "F16", (2, 32))],
            {"quant_method": "awq", "w_bit": 4},
        ),
    ],
    ids=["mxfp4", "fp4 in int8", "fp8 with scale", "mxfp4-pack-quantized", "gptq", "awq"],
)
def test_codes_of_other_tools_are_counted(
    tmp_path: Path, parts: list[tuple[str, str, tuple[int, ...]]], config: dict[str, Any] | None
) -> None:
    parent = make_checkpoint(tmp_path / "parent")
    out = make_checkpoint(
        tmp_path / "out",
        config={"quantization_config": config or {"quant_method": "other"}},
        edit=in_place_of("weight", *parts),
    )
    assert parameters(out) == parameters(parent)


def int_groups(*widths: tuple[int, int]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {
            f"group_{bits}": {
                "targets": ["Linear"],
                "weights": {"type": "int", "num_bits": bits, "group_size": size},
            }
            for bits, size in widths
        },
    }


@pytest.mark.parametrize(("groups_of_row", "expected"), [(2, 0), (1, None)])
def test_scales_decide_between_packed_integers_of_two_widths(
    tmp_path: Path, groups_of_row: int, expected: int | None
) -> None:
    # 16 words a row are 64 codes of 8 bits (two groups of 32), or 128 of 4 bits (four of 32).
    edit = in_place_of(
        "weight", ("weight_packed", "I32", (32, 16)), ("weight_scale", "BF16", (32, groups_of_row))
    )
    declared = {"quantization_config": int_groups((4, 32), (8, 32))}
    out = make_checkpoint(tmp_path / "out", config=declared, edit=edit)
    parent = parameters(make_checkpoint(tmp_path / "parent"))
    assert parameters(out) == (parent if expected == 0 else None)


def test_integers_of_unknown_width_are_not_counted(tmp_path: Path) -> None:
    edit = in_place_of("weight", ("weight_packed", "I32", (32, 8)))
    declared = {"quantization_config": {"quant_method": "compressed-tensors"}}
    assert parameters(make_checkpoint(tmp_path / "out", config=declared, edit=edit)) is None


@pytest.mark.parametrize("nested", [True, False])
def test_modelopt_s_file_may_be_nested_or_flat(tmp_path: Path, nested: bool) -> None:
    model = make_checkpoint(tmp_path / "model")
    table = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    content = {"quantization": table} if nested else {"quant_method": "modelopt", **table}
    write_json(model / MODELOPT_NAME, {"producer": {"name": "modelopt"}, **content})

    view = read_modules(opened(model), load_families())
    assert (view.method, view.ignore) == ("modelopt", ("lm_head",))
    assert view.config["kv_cache_quant_algo"] == "FP8"
