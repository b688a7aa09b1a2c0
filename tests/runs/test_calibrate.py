"""`calibrate` measures the mean square of each module's inputs, of an expert's own tokens only."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from judges import opened
from mquant.checkpoint import Folder
from mquant.cli.app import app
from mquant.engines.importance import open_importance
from mquant.errors import DataFileError, OutputError
from mquant.family_files import load_families
from mquant.plan import make_bf16_plan
from mquant.recipe import Calibration, find_recipe
from mquant.runs.calibrate import calibrate
from mquant.runs.convert import convert
from mquant.runs.quantize import quantize
from mquant.synth import Precision, Sizes, synth
from mquant.tokens.samples import load_samples
from run import FIXTURES, TRAINED, copy_tokenizer, plan_of

pytestmark = pytest.mark.upstream

TEXT = FIXTURES / "heldout.txt"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of a few hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(TEXT.read_text()[:1500])
    return str(path)


@pytest.fixture(scope="module")
def importance(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("importance") / "importance.safetensors"
    calibrate(plan_of(TRAINED, "nvfp4-opt"), text, out)
    return out


def by_transformers(text: str) -> dict[str, Any]:
    """Return the mean squares of inputs, from hooks on the model of transformers in F32."""
    import torch
    import transformers

    hf: Any = transformers
    config = hf.AutoConfig.from_pretrained(TRAINED)
    config.rope_parameters["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    model = hf.AutoModelForCausalLM.from_pretrained(TRAINED, config=config, dtype=torch.float32)
    inputs: dict[str, list[torch.Tensor]] = {}
    layer = model.model.layers[1]
    prefix = "model.layers.1"

    def attention(_module: object, args: tuple[torch.Tensor, ...]) -> None:
        inputs.setdefault(f"{prefix}.self_attn.q_proj", []).append(args[0].flatten(0, 1))

    def experts(_module: object, args: tuple[torch.Tensor, ...]) -> None:
        states, chosen = args[0], args[1]
        for expert in range(config.num_local_experts):
            name = f"{prefix}.block_sparse_moe.experts.{expert}.w1"
            inputs.setdefault(name, []).append(states[(chosen == expert).any(-1)])

    layer.self_attn.q_proj.register_forward_pre_hook(attention)
    layer.mlp.experts.register_forward_pre_hook(experts)
    for ids in load_samples(text, Folder(TRAINED), find_recipe("nvfp4-opt").calibration).ids:
        with torch.no_grad():
            model(torch.tensor(ids)[None])
    return {name: torch.cat(rows).square().mean(0).numpy() for name, rows in inputs.items()}


def test_each_module_has_the_mean_square_of_its_inputs(importance: Path, text: str) -> None:
    squares = open_importance(importance, plan_of(TRAINED, "nvfp4-opt"))

    expected = by_transformers(text)
    assert len(expected) == 11
    for name, mean in expected.items():
        measured = squares.of(name)
        # BF16 sends a token near the edge to another expert now and then.
        assert np.linalg.norm(measured - mean) < 0.05 * np.linalg.norm(mean), name


def test_gate_and_up_have_the_same_inputs_and_experts_their_own(importance: Path) -> None:
    squares = open_importance(importance, plan_of(TRAINED, "nvfp4-opt"))
    first, other = (f"model.layers.1.block_sparse_moe.experts.{e}" for e in (0, 1))

    assert (squares.of(f"{first}.w1") == squares.of(f"{first}.w3")).all()
    assert (squares.of(f"{first}.w1") != squares.of(f"{other}.w1")).any()


def test_quantize_takes_the_importance_file(importance: Path, tmp_path: Path) -> None:
    result = quantize(plan_of(TRAINED, "nvfp4-opt"), tmp_path / "out", importance=importance)
    assert result.fresh


def test_the_file_and_what_it_weighs_say_what_was_measured(
    importance: Path, text: str, tmp_path: Path
) -> None:
    samples = load_samples(text, Folder(TRAINED), Calibration())
    assert open_importance(importance, plan_of(TRAINED, "nvfp4-opt")).calibration == samples.record

    quantize(plan_of(TRAINED, "nvfp4-opt"), tmp_path / "out", importance=importance)

    record = json.loads((tmp_path / "out/mquant.json").read_text())
    assert record["calibration"] == samples.record


def test_a_file_that_says_nonsense_of_its_data_is_one_sentence(
    importance: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(importance, "np") as file:
        vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(vectors, tmp_path / "bad.safetensors", {"mquant.calibration": "[1"})
    with pytest.raises(DataFileError, match="says in no valid JSON what it was measured on"):
        open_importance(tmp_path / "bad.safetensors", plan_of(TRAINED, "nvfp4-opt"))


def test_samples_and_length_may_be_given(text: str, tmp_path: Path) -> None:
    out = tmp_path / "importance.safetensors"
    command = ("calibrate", str(TRAINED), "--data", text, "-o", str(out), "--format", "json")
    result = CliRunner().invoke(app, [*command, "--samples", "2", "--length", "32"])

    document = json.loads(result.stdout)
    assert (document["samples"], document["tokens"], document["data"]["length"]) == (2, 64, 32)


def test_experts_without_a_token_are_named_and_have_zeros(tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"text": "a b"}))
    plan = plan_of(TRAINED, "nvfp4-opt")

    result = calibrate(plan, str(data), tmp_path / "out.safetensors")

    assert result.modules == 102
    assert any(".experts." in name for name in result.unseen)
    squares = open_importance(result.out, plan)
    assert all(not squares.of(name).any() for name in result.unseen)


def test_the_same_data_makes_the_same_file(importance: Path, text: str, tmp_path: Path) -> None:
    calibrate(plan_of(TRAINED, "nvfp4-opt"), text, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == importance.read_bytes()


def test_an_existing_file_stays(importance: Path, text: str) -> None:
    before = importance.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        calibrate(plan_of(TRAINED, "nvfp4-opt"), text, importance)
    assert importance.read_bytes() == before


def test_the_verb_reports_modules_and_tokens(text: str, tmp_path: Path) -> None:
    out = tmp_path / "importance.safetensors"
    arguments = ("calibrate", str(TRAINED), "--data", text, "-o", str(out), "--format", "json")
    document = json.loads(CliRunner().invoke(app, arguments).stdout)

    assert document["ok"]
    assert (document["schema"], document["modules"]) == ("mquant.calibrate/1", 102)
    assert document["tokens"] == load_samples(text, Folder(TRAINED), Calibration()).tokens


def test_no_line_of_a_library_is_on_stdout_before_the_json(text: str, tmp_path: Path) -> None:
    out = tmp_path / "importance.safetensors"
    command = ["calibrate", TRAINED, "--data", text, "-o", out, "--format", "json"]
    process = subprocess.run(
        [sys.executable, "-m", "mquant", *map(str, command)], capture_output=True, check=True
    )
    assert json.loads(process.stdout)["ok"]


def test_calibrate_without_data_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ("calibrate", str(TRAINED)))
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: --data is missing.\nExample: mquant calibrate")


def test_calibration_reads_weights_in_fp8(tmp_path: Path) -> None:
    sizes = Sizes(layers=1, experts=3, hidden=128, intermediate=128, vocab=2048)
    src = tmp_path / "fp8"
    synth(src, load_families()["minimax_m2"], sizes=sizes, precision=Precision.FP8_BLOCK)
    copy_tokenizer(src)
    convert(make_bf16_plan(opened(src), load_families()), tmp_path / "bf16", "dequantize")
    found = []
    for folder in (src, tmp_path / "bf16"):
        out = tmp_path / f"{folder.name}.safetensors"
        calibrate(plan_of(folder, "nvfp4-opt"), str(TEXT), out)
        found.append(load_file(out))
    assert found[0].keys() == found[1].keys()
    first = "model.layers.0.self_attn.q_proj"  # what comes after sees weights rounded to BF16
    assert np.array_equal(found[0][first], found[1][first])
    assert found[0][first].any()
