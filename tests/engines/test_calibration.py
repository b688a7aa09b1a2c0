"""Calibrated recipes write the tensors that llmcompressor's oneshot makes of the whole model."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges import data, differences, model_free_ptq, one_shard, opened
from mquant.checkpoint import Folder
from mquant.errors import UsageError
from mquant.events import Event, Note
from mquant.family_files import load_families
from mquant.output.finish import recipe_yaml
from mquant.recipe import Calibration
from mquant.runs.quantize import quantize
from mquant.runs.spec import Engine
from mquant.verify.judge import Depth, verify
from run import FIXTURES, TRAINED, plan_of, wide

pytestmark = pytest.mark.upstream

TEXT = str(FIXTURES / "heldout.txt")
FEW = Calibration(samples=3, length=48, seed=1)
RECIPES = {
    "nvfp4-w4a4": "roles: {expert: NVFP4, attention: NVFP4}",
    "nvfp4-gptq": "roles: {expert: NVFP4A16, attention: NVFP4A16}\nrounding: gptq",
    "w4a16-awq": "roles: {expert: W4A16, attention: W4A16}\nsmoothing: awq",
}
# Each layer that feeds linear layers, and those linear layers: all of MiniMax-M2's, by
# transformers' names.
FEEDS = {
    "input_layernorm": ["q_proj", "k_proj", "v_proj"],
    "post_attention_layernorm": ["mlp.gate", "gate_proj", "up_proj"],
    "up_proj": ["down_proj"],
}


def recipe(folder: Path, name: str) -> str:
    """Write a copy of the shipped recipe `name`, with few samples; return its path."""
    path = folder / f"{name}.yaml"
    few = json.dumps(FEW.model_dump())
    path.write_text(f"name: {name}\nsuffix: X\n{RECIPES[name]}\ncalibration: {few}\n")
    return str(path)


@pytest.fixture(scope="module")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide(tmp_path_factory.mktemp("wide"))


def loaded(dtype: str, src: Path = TRAINED) -> Any:
    """Return the model as transformers loads it whole, with the RoPE of its training."""
    import transformers

    hf: Any = transformers
    config = hf.AutoConfig.from_pretrained(src)
    config.rope_parameters["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    return hf.AutoModelForCausalLM.from_pretrained(src, config=config, dtype=dtype).eval()


def upstream(name: str, src: Path) -> Any:
    """Return the model after plain oneshot: loaded whole, with its routers in F32."""
    import torch
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

    from mquant.engines.oneshot import calibrate
    from mquant.tokens.samples import load_samples

    model, parent = loaded("bfloat16", src), opened(src)
    for number, layer in enumerate(model.model.layers):
        block = f"model.layers.{number}.block_sparse_moe"
        for owner, stored_name, attribute in (
            (layer.mlp.gate, "gate.weight", "weight"),
            (layer.mlp, "e_score_correction_bias", "e_score_correction_bias"),
        ):
            raw = bytearray(data(parent, f"{block}.{stored_name}"))
            value = torch.frombuffer(raw, dtype=torch.float32)
            getattr(owner, attribute).data = value.reshape(getattr(owner, attribute).shape)
    linearize_moe(model)
    options = {"targets": ["Linear"], "ignore": ["lm_head"]}
    awq = [
        AWQMapping(f"re:.*{feeder}$", [f"re:.*{linear}$" for linear in feeds])
        for feeder, feeds in FEEDS.items()
    ]
    modifiers = {
        "nvfp4-gptq": [GPTQModifier(scheme="NVFP4A16", actorder=None, **options)],
        "nvfp4-w4a4": [QuantizationModifier(scheme="NVFP4", **options)],
        "w4a16-awq": [AWQModifier(mappings=awq), QuantizationModifier(scheme="W4A16", **options)],
    }[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads add up GPTQ's Hessians in another order
    try:
        calibrate(model, modifiers, load_samples(TEXT, Folder(src), FEW).ids)
    finally:
        torch.set_num_threads(threads)
    return model


@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_equals_oneshots_on_the_whole_model(
    tmp_path: Path, name: str, divisible: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompressor.pipelines.cache import IntermediatesCache

    from mquant.engines import oneshot
    from mquant.engines.oneshot import as_bytes, compress

    src = divisible if name == "w4a16-awq" else TRAINED
    plan = plan_of(src, recipe(tmp_path, name))
    with monkeypatch.context() as patched:
        patched.setattr(oneshot, "_AT_ONCE", 8192)  # elements of a weight compressed at once
        quantize(plan, tmp_path / "out", data=TEXT, engine=Engine.ONESHOT)

    # AWQ pins memory for an accelerator even if the machine has none.
    monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *_arguments: None)
    model, written = upstream(name, src), opened(tmp_path / "out")
    with ThreadPoolExecutor(1) as pool:
        expected = {
            f"{action.module}.{suffix}": bytes(as_bytes(tensor))
            for action in plan.actions
            if action.scheme
            for suffix, tensor in compress(
                model.get_submodule(plan.family.in_memory_name(action.module)), pool
            ).items()
        }
    for action in (action for action in plan.actions if action.scaled):
        module = model.get_submodule(plan.family.in_memory_name(action.module))
        expected[action.source.name] = bytes(as_bytes(module.weight.detach()))
    kept = [t for t in written.tensors if t in opened(src).tensors and t not in expected]
    assert len(expected) + len(kept) == len(written.tensors)
    assert [tensor for tensor in expected if expected[tensor] != data(written, tensor)] == []
    assert [t for t in kept if data(written, t) != data(opened(src), t)] == []
    report = verify(Folder(tmp_path / "out"), load_families(), Depth.FULL, parent=Folder(src))
    assert [finding for finding in report.findings if finding.severity != "info"] == []


def test_the_calibrated_model_predicts_like_the_trained_model(tmp_path: Path) -> None:
    import torch

    from mquant.engines.offloaded_model import attach, build_model
    from mquant.tokens.samples import load_samples

    plan = plan_of(TRAINED)
    checkpoint = plan.survey.checkpoint
    model: Any = build_model(tmp_path, checkpoint.config)
    names = {plan.family.in_memory_name(t.name): t for t in checkpoint.tensors.values()}
    attach(model, checkpoint.source, names)
    from compressed_tensors.offload import set_onload_device

    set_onload_device(model, torch.device("cpu"))
    reference = loaded("float32")
    (ids,) = load_samples(TEXT, Folder(TRAINED), Calibration(samples=1, length=256)).ids
    tokens = torch.tensor(ids)[None]
    with torch.no_grad():
        loss, reference_loss = (
            torch.nn.functional.cross_entropy(m(tokens).logits[0, :-1].float(), tokens[0, 1:])
            for m in (model, reference)
        )
    assert abs(loss - reference_loss) < 0.02  # BF16; with RoPE over the whole head it is 0.5
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.float32


def test_experts_without_routed_tokens_are_named(tmp_path: Path) -> None:
    events: list[Event] = []
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "a b"}))
    plan = plan_of(TRAINED, recipe(tmp_path, "nvfp4-w4a4"))

    quantize(plan, tmp_path / "out", data=str(path), engine=Engine.ONESHOT, emit=events.append)

    (note,) = [e.message for e in events if isinstance(e, Note) and "was routed to" in e.message]
    assert note.startswith("No calibration token was routed to ")
    assert "model.layers.0.block_sparse_moe.experts." in note
    # Calibration sends every token through every expert, so no expert lacks an input scale.
    tensors = opened(tmp_path / "out").tensors
    assert sum(name.endswith(".input_global_scale") for name in tensors) == 102


@pytest.mark.parametrize("name", RECIPES)
def test_llmcompressor_accepts_recipe_yaml(tmp_path: Path, name: str) -> None:
    from llmcompressor.recipe import Recipe

    text = tmp_path / "recipe.yaml"
    text.write_text(recipe_yaml(plan_of(TRAINED, name)))
    *before, modifier = Recipe.create_instance(str(text)).modifiers

    assert [type(earlier).__name__ for earlier in before] == ["AWQModifier"] * (name == "w4a16-awq")
    assert (type(modifier).__name__, modifier.scheme) == {
        "nvfp4-w4a4": ("QuantizationModifier", "NVFP4"),
        "nvfp4-gptq": ("GPTQModifier", "NVFP4A16"),
        "w4a16-awq": ("QuantizationModifier", "W4A16"),
    }[name]


def test_input_scales_are_within_2_percent_of_oneshots(tmp_path: Path) -> None:
    path = Path(recipe(tmp_path, "nvfp4-w4a4"))
    more = '"samples": 16, "length": 128, "seed": 0'
    path.write_text(path.read_text().replace(json.dumps(FEW.model_dump()), f"{{{more}}}"))
    plan = plan_of(TRAINED, str(path))
    assert quantize(plan, tmp_path / "ours", data=TEXT).engine == Engine.CALIBRATED
    quantize(plan, tmp_path / "theirs", data=TEXT, engine=Engine.ONESHOT)

    ours, theirs = opened(tmp_path / "ours"), opened(tmp_path / "theirs")
    scales = {name for name in ours.tensors if name.endswith(".input_global_scale")}
    assert len(scales) == 102
    assert [n for n in ours.tensors.keys() - scales if data(ours, n) != data(theirs, n)] == []
    for name in scales:
        our, their = (np.frombuffer(data(made, name), "<f4")[0] for made in (ours, theirs))
        assert abs(our / their - 1) < 0.02, name


def test_an_input_scale_is_the_observers_of_the_same_inputs() -> None:
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.observers import Observer

    from mquant.engines.calibrated.input_scales import Maxima, input_scale

    arguments = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations
    name = "model.layers.0.self_attn.q_proj"
    for seed, scale in enumerate((0.0, 1e-20, 1e-3, 1.0, 70.0)):
        inputs = np.random.default_rng(seed).standard_normal((40, 64), np.float32)
        inputs *= np.float32(scale)
        observer: Any = Observer.load_from_registry(
            "static_minmax", base_name="input", args=arguments
        )
        for part in np.split(inputs, 4):
            observer(torch.from_numpy(part[None]))
        maxima = Maxima(plan_of(TRAINED, "nvfp4-w4a4"))
        maxima.hear((f"{name}.weight",), inputs)
        expected = observer.get_qparams()["global_scale"].numpy()
        assert input_scale(maxima.of_layer(0)[name]).tobytes() == expected.tobytes(), scale


def test_pin_memory_is_restored_after_awq_without_an_accelerator(
    tmp_path: Path, divisible: Path
) -> None:
    from llmcompressor.pipelines.cache import IntermediatesCache

    before = IntermediatesCache.pin_memory
    quantize(plan_of(divisible, recipe(tmp_path, "w4a16-awq")), tmp_path / "out", data=TEXT)
    assert IntermediatesCache.pin_memory is before


def test_integers_without_data_equal_model_free_ptqs(tmp_path: Path, divisible: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nsuffix: X\nroles: {expert: W4A16, attention: W4A16}\n"
    )
    plan = plan_of(divisible, str(tmp_path / "mine.yaml"))
    assert quantize(plan, tmp_path / "out").engine == Engine.ONESHOT
    with pytest.raises(UsageError) as caught:
        quantize(plan, tmp_path / "other", engine=Engine.STREAM)
    assert caught.value.message == (
        "Recipe mine stores W4A16, which the stream engine does not make."
    )
    single = one_shard(divisible, tmp_path / "one")
    expected = model_free_ptq(single, tmp_path / "expected", scheme="W4A16")
    names = opened(tmp_path / "out").tensors.keys() - opened(divisible).tensors.keys()
    assert len(names) == 3 * 32
    assert differences(tmp_path / "out", expected, names) == []


def test_data_must_be_given_exactly_if_the_recipe_needs_data(tmp_path: Path) -> None:
    plan = plan_of(TRAINED, "nvfp4-w4a4")
    with pytest.raises(UsageError) as caught:
        quantize(plan, tmp_path / "out")
    assert caught.value.message == ("Recipe nvfp4-w4a4 needs calibration data, which --data names.")
    with pytest.raises(UsageError, match="which the stream engine does not see"):
        quantize(plan, tmp_path / "out", data=TEXT, engine=Engine.STREAM)
    with pytest.raises(UsageError, match="needs no data, so --data has no effect"):
        quantize(plan_of(TRAINED), tmp_path / "out", data=TEXT)
    assert not (tmp_path / "out").exists()
