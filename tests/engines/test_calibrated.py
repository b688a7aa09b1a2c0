"""The calibrated engine quantizes a layer with its inputs, and feeds the quantized layer on."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges import data, opened
from killed import calibrate_and_die
from mquant.checkpoint import Folder, reader_of
from mquant.engines.calibrated.quantizing import Quantizing
from mquant.errors import UsageError
from mquant.events import Event, Note
from mquant.family_files import load_families
from mquant.forward.decoder import Model
from mquant.loader_model.modules import read_modules
from mquant.measure.evaluation import evaluate
from mquant.output import LEDGER, STATES, StatesFile
from mquant.runs.quantize import quantize
from mquant.runs.spec import Engine
from mquant.verify.judge import Depth, verify
from mquant.weights.matrix import Workers
from run import FIXTURES, TRAINED, plan_of

TEXT = FIXTURES / "heldout.txt"
FEW = "{samples: 8, length: 96, seed: 1}"
ALL = "roles: {expert: NVFP4A16, attention: NVFP4A16}\n"
GPTQ = "rounding: gptq\nscales: hessian\norder: descending\n"


def write_recipe(folder: Path, text: str, samples: str = FEW) -> str:
    """Write a recipe; return its path."""
    folder.mkdir(exist_ok=True)
    (folder / "mine.yaml").write_text(f"name: mine\nsuffix: X\n{text}calibration: {samples}\n")
    return str(folder / "mine.yaml")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The part of the held-out text that is calibrated on; the rest is evaluated."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT.read_text("utf-8")[:30_000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def made(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model after GPTQ."""
    where = tmp_path_factory.mktemp("made")
    quantize(plan_of(TRAINED, write_recipe(where, ALL + GPTQ)), where / "out", data=text, workers=1)
    return where / "out"


def files_of(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_result_is_what_verify_accepts(made: Path) -> None:
    report = verify(Folder(made), load_families(), Depth.FULL, parent=Folder(TRAINED))
    assert [finding for finding in report.findings if finding.severity == "error"] == []
    record = json.loads((made / "mquant.json").read_text())
    assert record["engine"]["name"] == Engine.CALIBRATED
    assert record["recipe"]["revision"] == 1
    assert not (made / STATES).exists()


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_does_not_change_a_byte(
    workers: int, made: Path, text: str, tmp_path: Path
) -> None:
    plan = plan_of(TRAINED, write_recipe(tmp_path, ALL + GPTQ))
    quantize(plan, tmp_path / "out", data=text, workers=workers)
    assert files_of(tmp_path / "out") == files_of(made)


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (StatesFile, "save", 1),  # between two layers
        (Quantizing, "_quantize", 40),  # inside the second layer
        (StatesFile, "delete", 1),  # when all layers are done
    ],
    ids=["between", "inside", "after"],
)
def test_a_run_that_is_killed_goes_on_after_the_last_layer(
    owner: Any, name: str, calls: int, made: Path, text: str, tmp_path: Path
) -> None:
    recipe, out = write_recipe(tmp_path, ALL + GPTQ), tmp_path / "out"
    assert calibrate_and_die(TRAINED, recipe, out, text, (owner, name, calls)) == -signal.SIGKILL
    assert (out / LEDGER).exists()
    computed: list[int] = []
    layer = Model.layer

    def counted(self: Model, number: int, *arguments: Any) -> Any:
        computed.append(number)
        return layer(self, number, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "layer", counted)
        quantize(plan_of(TRAINED, recipe), out, data=text, workers=1)

    assert computed == ([] if name == "delete" else [1, 2])
    assert files_of(out) == files_of(made)


@pytest.mark.parametrize("spoil", [lambda raw: raw[:-4], lambda raw: raw[:-1] + b"\0"])
def test_states_that_are_not_whole_count_for_nothing(
    spoil: Callable[[bytes], bytes], made: Path, text: str, tmp_path: Path
) -> None:
    recipe, out = write_recipe(tmp_path, ALL + GPTQ), tmp_path / "out"
    assert calibrate_and_die(TRAINED, recipe, out, text, (StatesFile, "save", 1)) == -signal.SIGKILL
    states = out / STATES
    states.write_bytes(spoil(states.read_bytes()))

    quantize(plan_of(TRAINED, recipe), out, data=text, workers=1)
    assert files_of(out) == files_of(made)


def test_a_written_unit_that_changed_since_is_made_again_and_the_run_says_so(
    made: Path, text: str, tmp_path: Path
) -> None:
    """Layers come in another order than the output: the unit lies behind tensors still to come."""
    recipe, out = write_recipe(tmp_path, ALL + GPTQ), tmp_path / "out"
    assert calibrate_and_die(TRAINED, recipe, out, text, (StatesFile, "save", 1)) == -signal.SIGKILL
    plan, events = plan_of(TRAINED, recipe), list[Event]()
    (shard,) = plan.shards
    partial = out / f"{shard.name}.partial"
    raw = bytearray(partial.read_bytes())
    raw[shard.layout[1]["model.layers.0.self_attn.o_proj.weight_packed"]] ^= 1
    partial.write_bytes(raw)

    quantize(plan, out, data=text, workers=1, emit=events.append)
    sentence = f"{partial.name} is not as an earlier run left it; its tensors are made again."
    assert Note("warning", sentence) in events
    assert files_of(out) == files_of(made)


def test_another_run_deletes_the_states(text: str, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, ALL + GPTQ), tmp_path / "out"
    assert calibrate_and_die(TRAINED, recipe, out, text, (StatesFile, "save", 1)) == -signal.SIGKILL
    assert (out / STATES).exists()

    quantize(plan_of(TRAINED), out, restart=True)
    assert not (out / STATES).exists()


def kl(folder: Path) -> float:
    """Return the KL divergence from the trained model, on text that was not calibrated on."""
    rest = TEXT.read_text("utf-8")[30_000:]
    file = folder.parent / "rest.txt"
    file.write_text(rest, encoding="utf-8")
    parent = Folder(TRAINED)
    found = evaluate(Folder(folder), parent, load_families(), file, tokens=2048, context=256).kl
    assert found is not None
    return found


def test_gptq_loses_less_than_min_max_and_searched_scales(text: str, tmp_path: Path) -> None:
    many = "{samples: 32, length: 256, seed: 0}"
    lost = {}
    for name, recipe in {"min-max": "nvfp4", "searched": "nvfp4-opt"}.items():
        quantize(plan_of(TRAINED, recipe), tmp_path / name)
        lost[name] = kl(tmp_path / name)
    for name, sweeps in {"gptq": "", "sweeps": "sweeps: 3\n"}.items():
        plan = plan_of(TRAINED, write_recipe(tmp_path, ALL + GPTQ + sweeps, many))
        quantize(plan, tmp_path / name, data=text)
        lost[name] = kl(tmp_path / name)

    assert lost["sweeps"] < lost["gptq"] < 0.7 * lost["searched"] < lost["min-max"], lost


def test_the_next_layer_sees_the_values_that_loaders_decode(
    made: Path, text: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}
    weight = Quantizing._weight

    def heard(self: Quantizing, name: str, inputs: Any) -> Any:
        values = weight(self, name, inputs)
        given[name] = values.copy()
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quantizing, "_weight", heard)
        plan = plan_of(TRAINED, write_recipe(tmp_path, ALL + GPTQ))
        quantize(plan, tmp_path / "out", data=text)
    assert len(given) == 102
    view = read_modules(opened(made), load_families())
    with Workers(1) as workers:
        model = Model(view, reader_of(Folder(made)), 96, workers)
        for name, values in given.items():
            assert np.allclose(model.weight(name, "all"), values, rtol=1e-6, atol=0), name


def test_the_tokens_of_a_layer_count_as_one_for_each_column_of_an_expert(
    text: str, tmp_path: Path
) -> None:
    inputs: dict[str, Any] = {}
    priors: dict[str, Any] = {}
    hear, prior_of = Quantizing.hear_block, Quantizing._prior

    def heard(self: Quantizing, experts: str, block: Any) -> None:
        inputs[experts] = block.copy()
        hear(self, experts, block)

    def given(self: Quantizing, name: str) -> Any:
        priors[name] = prior_of(self, name)
        return priors[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quantizing, "hear_block", heard)
        patch.setattr(Quantizing, "_prior", given)
        recipe = write_recipe(tmp_path, ALL + GPTQ)
        quantize(plan_of(TRAINED, recipe), tmp_path / "out", data=text)

    with_prior = {name for name, prior in priors.items() if prior is not None}
    assert with_prior
    assert all(name.endswith("gate_proj.weight") for name in with_prior)
    for name in with_prior:
        block = inputs[name.partition(".experts.")[0] + ".experts"]
        assert len(block) <= 1024  # so all of them count
        expected = (block.T.astype(np.float64) @ block) * (block.shape[1] / len(block))
        assert np.abs(priors[name] - expected).max() < 1e-5 * expected.max(), name


def test_experts_that_few_tokens_reach_are_named(tmp_path: Path) -> None:
    events: list[Event] = []
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "a b"}))
    plan = plan_of(TRAINED, write_recipe(tmp_path, ALL + GPTQ))

    quantize(plan, tmp_path / "out", data=str(path), emit=events.append)

    warnings = [e.message for e in events if isinstance(e, Note) and e.level == "warning"]
    (none,) = [note for note in warnings if note.startswith("No calibration token")]
    assert "model.layers.0.block_sparse_moe.experts." in none
    (few,) = [note for note in warnings if "fewer than 64" in note]
    assert "model.layers.0.block_sparse_moe.experts." in few
    said = json.loads((tmp_path / "out/mquant.json").read_text())["few_inputs"]
    assert len({*said["no_tokens"], *said["few_tokens"]}) == 30
    report = verify(Folder(tmp_path / "out"), load_families(), Depth.FULL)
    assert [finding for finding in report.findings if finding.severity == "error"] == []


def test_importance_and_gptq_do_not_load_torch(text: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys; from mquant.cli import main\ntry: main()\nfinally: print(*sys.modules)"
    recipe = write_recipe(tmp_path, ALL + GPTQ)
    command = ["quantize", str(TRAINED), "--recipe", recipe, "--data", text]
    command += ["-o", str(tmp_path / "out")]
    run = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers"} & {*run.stdout.split()}


def test_oneshot_refuses_sweeps_in_one_sentence(text: str, tmp_path: Path) -> None:
    plan = plan_of(TRAINED, "nvfp4-best")
    with pytest.raises(UsageError) as caught:
        quantize(plan, tmp_path / "out", data=text, engine=Engine.ONESHOT)
    assert caught.value.message == (
        "Recipe nvfp4-best asks for sweeps, which only the calibrated engine does."
    )
    assert not (tmp_path / "out").exists()


def test_the_calibrated_engine_is_for_recipes_that_need_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs no data, which the calibrated engine is for"):
        quantize(plan_of(TRAINED), tmp_path / "out", engine=Engine.CALIBRATED)


def test_kept_tensors_are_the_parents(made: Path) -> None:
    ours, parent = opened(made), opened(TRAINED)
    kept = ours.tensors.keys() & parent.tensors.keys()
    assert len(kept) == 327 - 3 * 102
    assert [name for name in kept if data(ours, name) != data(parent, name)] == []
