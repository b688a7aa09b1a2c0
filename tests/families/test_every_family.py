"""What holds of every shipped family: its tiny checkpoint is whole, and its result is judged clean.

The families of tests/family_cases.py have further tests; docs/families.md has the others' evidence.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from judges import read_json
from make import Row
from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import family_of, load_families
from mquant.family_rows import Role
from mquant.loader_model.modules import read_modules
from mquant.synth import synth
from mquant.verify.ignore_report import check_ignore
from mquant.verify.judge import verify
from mutate import mutated
from quantized_rows import NVFP4A16, compressed, parts_of
from run import plan_of, quantize_nvfp4

FAMILIES = load_families()
KEPT = (Role.ROUTER, Role.EMBEDDING, Role.HEAD)
# What vLLM 0.32 does not load of any recipe that quantizes experts.
BROKEN = {"gpt_oss": {"expert-bias"}}
# The families whose routers vLLM 0.32 gives the quantization config: quantized routers load.
QUANTIZED_ROUTERS = {"qwen3_moe", "hunyuan_v1_moe"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function: name of a family -> its tiny checkpoint."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = synth(tmp_path_factory.mktemp(name) / "src", FAMILIES[name]).path
        return made[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_has_its_familys_name(name: str) -> None:
    assert FAMILIES[name].name == name


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_of_a_release_has_every_key_that_its_own_blocks_need(name: str) -> None:
    family = FAMILIES[name]
    config = family.synth.config
    assert not [key for key in family.needed_keys(config) if family.value(key, config) is None]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tiny_checkpoint_is_whole_and_can_be_quantized(
    tiny: Callable[[str], Path], name: str
) -> None:
    findings = plan_of(tiny(name)).findings
    assert {f.rule for f in findings if f.severity == "error"} == BROKEN.get(name, set())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in BROKEN])
def test_the_result_is_judged_clean_and_keeps_routers_embeddings_and_head(
    tiny: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    src = tiny(name)
    out = quantize_nvfp4(src, tmp_path / "out")
    report = verify(Folder(out), FAMILIES)

    assert not [finding for finding in report.findings if finding.severity == "error"]
    assert bool(report.undecided) is (FAMILIES[name].vllm is None)
    ignore = set(read_json(out / "config.json")["quantization_config"]["ignore"])
    checkpoint = open_checkpoint(Folder(src))
    family = family_of(checkpoint.config, FAMILIES, checkpoint.tensors)
    assert family
    roles = {tensor: family.classify(tensor) for tensor in checkpoint.tensors}
    kept = {tensor for tensor, role in roles.items() if role and role.row.role in KEPT}
    assert {tensor.removesuffix(".weight") for tensor in kept} <= ignore


@pytest.mark.parametrize(
    "name", [n for n, f in FAMILIES.items() if f.config.experts and n not in BROKEN]
)
def test_routers_that_ignore_did_not_name_are_found(
    tiny: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    out = quantize_nvfp4(tiny(name), tmp_path / "out")
    checkpoint = open_checkpoint(Folder(out))
    family = family_of(checkpoint.config, FAMILIES, checkpoint.tensors)
    assert family
    roles = {tensor: family.classify(tensor) for tensor in checkpoint.tensors}
    routers = {tensor for tensor, role in roles.items() if role and role.row.role is Role.ROUTER}

    def edit(rows: list[Row]) -> list[Row]:
        parts = [
            parts_of(row[0].removesuffix(".weight"), NVFP4A16, row[2])
            if row[0] in routers and len(row[2]) == 2
            else [row]
            for row in rows
        ]
        return [row for part in parts for row in part]

    bug = {"quantization_config": compressed(["lm_head"])}
    bad = mutated(out, tmp_path, edit=edit, config=bug)
    view = read_modules(open_checkpoint(Folder(bad)), FAMILIES)
    found = {finding.rule: finding.severity for finding in check_ignore(view).findings}
    assert found["router-quantized"] == ("warning" if name in QUANTIZED_ROUTERS else "error")
