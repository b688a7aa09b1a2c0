"""What holds of every shipped family: its tiny checkpoint is whole, and its result is judged clean.

The families of tests/family_cases.py have further tests; docs/families.md has the others' evidence.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from judges import read_json
from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import family_of, load_families
from mquant.family_rows import Role
from mquant.synth import synth
from mquant.verify.judge import verify
from run import plan_of, quantize_nvfp4

FAMILIES = load_families()
KEPT = (Role.ROUTER, Role.EMBEDDING, Role.HEAD)
# What vLLM 0.32 does not load of any recipe that quantizes experts.
BROKEN = {"gpt_oss": {"expert-bias"}}


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


@pytest.mark.parametrize("name", FAMILIES.keys() - BROKEN.keys())
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
