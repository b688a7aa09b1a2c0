"""If the tensors are right, repair mends config.json alone, as the model of vLLM's loader asks."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import schemes
from corpus import EXPERT
from judges import hashes, opened, read_json
from make import Edit, Row, without, write_json
from mquant.checkpoint import Folder
from mquant.errors import NotJudged, Refused
from mquant.loader_model.modules import read_modules
from mquant.loader_model.vllm.load import Outcome
from mquant.output import RECORD
from mquant.plan import Target
from mquant.repair.repair import repair_in_place
from mquant.runs.export import export
from mquant.runs.quantize import quantize
from mutate import mutated
from repairs import FAMILIES, diagnosis_of, repaired, right, tensors
from run import TRAINED, plan_of

__all__ = ["right"]

Config = dict[str, Any]
KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def outcome(folder: Path) -> Outcome:
    """Return what vLLM does with a folder."""
    return read_modules(opened(folder), FAMILIES).outcome


def configured(good: Path, folder: Path, change: Callable[[Config], object]) -> Path:
    """Copy a checkpoint, and change its config.json; mquant.json is left out."""
    bad = Path(shutil.copytree(good, folder))
    (bad / RECORD).unlink(missing_ok=True)
    config = read_json(bad / "config.json")
    change(config)
    write_json(bad / "config.json", config)
    return bad


def quantization(config: Config) -> Config:
    """Return the quantization config of a config.json."""
    table: Config = config["quantization_config"]
    return table


def with_kv_scales(value: bytes) -> Callable[[list[Row]], list[Row]]:
    """Return an edit that adds the KV-cache scales of every layer."""

    def edit(rows: list[Row]) -> list[Row]:
        layers = sorted({name.split(".")[2] for name, *_ in rows if ".layers." in name})
        names = [f"model.layers.{layer}.self_attn.{x}_scale" for layer in layers for x in "kv"]
        return [*rows, *((name, "F32", (1,), value) for name in names)]

    return edit


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint with experts in NVFP4 and attention in FP8."""
    return quantize(plan_of(TRAINED, "nvfp4-fp8"), tmp_path_factory.mktemp("mixed") / "good").out


def fp8_left_over(config: Config) -> None:
    """Say what config.json of an original in FP8 says."""
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(fp8_left_over, id="the original's quantization config is left over"),
        pytest.param(lambda c: c.update(num_experts=256), id="an alias wins"),
        pytest.param(lambda c: c.update(use_routing_bias=False), id="a switch is off"),
        pytest.param(lambda c: c.update(architectures=["MiniMaxM2Model"]), id="the bare model"),
        pytest.param(
            lambda c: quantization(c).update(kv_cache_scheme={**KV, "num_bits": 4}),
            id="a KV cache in 4 bits",
        ),
        pytest.param(
            lambda c: quantization(c)["config_groups"]["group_0"]["weights"].update(newer=None),
            id="a key of a newer tool",
        ),
    ],
)
def test_config_json_is_mended_and_every_shard_stays(
    right: Path, tmp_path: Path, change: Callable[[Config], object]
) -> None:
    bad = configured(right, tmp_path / "bad", change)
    assert not outcome(bad).loads
    out = repaired(bad, tmp_path / "out")
    assert outcome(out).loads
    assert read_json(out / "config.json") == read_json(right / "config.json")
    assert all((out / shard).samefile(bad / shard) for shard in opened(bad).shards)


def test_the_list_of_plain_modules_comes_under_the_key_that_the_method_reads(
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "experts.yaml"
    recipe.write_text("{name: experts, suffix: x, roles: {expert: NVFP4A16}}")
    good = quantize(plan_of(TRAINED, str(recipe)), tmp_path / "good").out

    def renamed(config: Config) -> None:
        table = quantization(config)
        table["modules_to_not_convert"] = table.pop("ignore")

    out = repaired(configured(good, tmp_path / "bad", renamed), tmp_path / "out")
    assert read_json(out / "config.json") == read_json(good / "config.json")


def test_groups_that_claim_each_other_s_modules_get_targets_of_their_own(
    mixed: Path, tmp_path: Path
) -> None:
    def all_linear(config: Config) -> None:
        for group in quantization(config)["config_groups"].values():
            group["targets"] = ["Linear"]

    bad = configured(mixed, tmp_path / "bad", all_linear)
    assert not outcome(bad).loads
    assert outcome(repaired(bad, tmp_path / "out")).loads


def test_kv_cache_scales_get_the_scheme_that_declares_them(right: Path, tmp_path: Path) -> None:
    good = mutated(right, tmp_path / "good", edit=with_kv_scales(b"\0\0\0?"))

    def in_4_bits(config: Config) -> None:
        quantization(config)["kv_cache_scheme"] = {**KV, "num_bits": 4}

    out = repaired(configured(good, tmp_path / "bad", in_4_bits), tmp_path / "out")
    scheme = read_json(out / "config.json")["quantization_config"]["kv_cache_scheme"]
    assert KV.items() <= scheme.items()
    assert tensors(out) == tensors(good)


def test_kv_cache_scales_stay_when_an_expert_is_made_again(right: Path, tmp_path: Path) -> None:
    good = mutated(right, tmp_path / "good", edit=with_kv_scales(b"\0\0\0?"))
    out = repaired(mutated(good, tmp_path, edit=without(EXPERT)), tmp_path / "out")
    assert tensors(out) == tensors(good)
    scheme = read_json(out / "config.json")["quantization_config"]["kv_cache_scheme"]
    assert KV.items() <= scheme.items()
    assert outcome(out).loads


def test_kv_cache_scales_of_zero_are_left_out(right: Path, tmp_path: Path) -> None:
    bad = mutated(right, tmp_path, edit=with_kv_scales(b"\0\0\0\0"))
    out = repaired(bad, tmp_path / "out")
    assert tensors(out) == tensors(right)
    assert read_json(out / "config.json") == read_json(right / "config.json")


def test_modelopt_s_own_file_goes_if_config_json_says_otherwise(
    right: Path, tmp_path: Path
) -> None:
    modelopt = export(Folder(right), FAMILIES, Target.MODELOPT, tmp_path / "modelopt").out
    bad = configured(modelopt, tmp_path / "bad", lambda c: quantization(c).update(quant_algo="FP8"))
    out = repaired(bad, tmp_path / "out")
    assert not (out / "hf_quant_config.json").exists()
    assert outcome(out).loads


def test_config_json_is_mended_in_place(right: Path, tmp_path: Path) -> None:
    bad = configured(right, tmp_path / "bad", lambda c: c.update(use_routing_bias=False))
    repair_in_place(diagnosis_of(bad))
    assert tensors(bad) == tensors(right)
    assert read_json(bad / "config.json") == read_json(right / "config.json")


def test_a_sound_checkpoint_in_another_layout_needs_no_repair(mixed: Path) -> None:
    assert not diagnosis_of(mixed).needed


def test_what_repair_cannot_mend_is_told_in_vllm_s_words(mixed: Path, tmp_path: Path) -> None:
    def flat(rows: list[Row]) -> list[Row]:
        return [
            (n, d, s[:1] if n.endswith("q_proj.weight_scale") else s, raw) for n, d, s, raw in rows
        ]

    bad = mutated(mixed, tmp_path, edit=flat)
    (bad / RECORD).unlink()
    before = hashes(bad)
    with pytest.raises(Refused) as caught:
        diagnosis_of(bad)
    finding = caught.value.findings[-1]
    assert finding.rule == "repair-cannot-mend"
    assert finding.message.startswith("Repair cannot mend bad: ")
    assert hashes(bad) == before


def test_what_the_model_does_not_know_is_not_judged(right: Path, tmp_path: Path) -> None:
    def odd(config: Config) -> None:
        config["thinker_config"] = {"a": 1}

    parent = configured(TRAINED, tmp_path / "parent", odd)
    bad = configured(right, tmp_path / "bad", odd)
    with pytest.raises(NotJudged, match="thinker_config"):
        diagnosis_of(bad, parent)


LAYOUTS: dict[str, tuple[Edit | None, Callable[[Config], object]]] = {
    "FP8 per channel": (schemes.FP8_CHANNEL, schemes.fp8_channel),
    "FP8 in blocks of 64": (schemes.FP8_BLOCKS, schemes.fp8_blocks),
    "INT4": (schemes.INT4, schemes.int4),
    "INT8": (schemes.INT8, schemes.int8),
    "ModelOpt NVFP4": (schemes.as_modelopt, schemes.modelopt),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def other(right: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    """A sound checkpoint in another layout."""
    edit, declare = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("other")
    made = configured(mutated(right, folder, edit=edit), folder / "good", declare)
    assert outcome(made).loads
    return made


def renamed_list(config: Config) -> None:
    """Write the list of plain modules under a key that the method does not read."""
    table = quantization(config)
    key = "modules_to_not_convert" if "ignore" in table else "exclude_modules"
    table[key] = table.pop("ignore", None) or table.pop("modules_to_not_convert")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda c: c.pop("quantization_config"), id="no quantization config"),
        pytest.param(lambda c: quantization(c).pop("quant_method"), id="no method"),
        pytest.param(lambda c: quantization(c).update(quant_method="awq"), id="another method"),
        pytest.param(renamed_list, id="the list under another key"),
    ],
)
def test_config_json_of_every_layout_is_mended(
    other: Path, tmp_path: Path, change: Callable[[Config], object]
) -> None:
    bad = configured(other, tmp_path / "bad", change)
    diagnosis = diagnosis_of(bad)
    assert diagnosis.needed or outcome(bad).loads
    out = repaired(bad, tmp_path / "out")
    assert outcome(out).loads
    assert tensors(out) == tensors(other)
