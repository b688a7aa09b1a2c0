"""`evaluate` runs models a layer at a time, with the numbers of transformers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import perplexity
from judges import opened
from make import make_checkpoint
from mquant.checkpoint import Folder, reader_of
from mquant.errors import DataFileError, SourceError
from mquant.family_files import load_families
from mquant.forward.decoder import Model
from mquant.loader_model.modules import read_modules
from mquant.measure import perplexity as scoring
from mquant.measure.evaluation import Evaluation, evaluate
from mquant.measure.perplexity import score
from mquant.plan import make_bf16_plan
from mquant.runs.convert import convert
from mquant.synth import Precision, synth
from mquant.weights.matrix import Workers
from mutate import changed, mutated, setting
from run import FIXTURES, TRAINED

HELDOUT = FIXTURES / "heldout.txt"
ALL = 10**9
WORKERS = Workers(2)


def run(folder: Path, parent: Path | None = None, **options: Any) -> Evaluation:
    text = options.pop("text", HELDOUT)
    against = Folder(parent) if parent else None
    return evaluate(Folder(folder), against, load_families(), text, **options)


def model_of(folder: Path, context: int = 64, workers: Workers = WORKERS) -> Model:
    source = Folder(folder)
    view = read_modules(opened(folder), load_families())
    return Model(view, reader_of(source), context, workers)


def final_states(model: Model, ids: Any, windows: list[slice]) -> Any:
    hidden = model.embed(ids)
    for number in range(model.shape.layers):
        model.layer(number, hidden, windows)
    return model.last_norm(hidden)


@pytest.mark.upstream
def test_perplexities_are_those_of_the_whole_models_in_transformers(
    trained: Path, tmp_path: Path
) -> None:
    text = HELDOUT.read_text("utf-8")[:5_000]
    (tmp_path / "text").write_text(text, "utf-8")
    evaluation = run(
        trained, TRAINED, text=tmp_path / "text", context=perplexity.WINDOW, tokens=ALL
    )
    assert evaluation.parent_perplexity == pytest.approx(
        perplexity.perplexity(TRAINED, text), rel=1e-5
    )
    # The script dequantizes to BF16, so its weights are rounded once more.
    assert evaluation.perplexity == pytest.approx(perplexity.perplexity(trained, text), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("qwen3_moe", Precision.MXFP4),
        ("qwen3_moe", Precision.MXFP8),
        ("qwen2", Precision.MXFP8),  # has biases beside codes
    ],
)
def test_a_release_computes_the_states_of_its_weights_in_bf16(
    tmp_path: Path, name: str, precision: Precision
) -> None:
    """BF16 holds E2M1 and E4M3 codes times powers of two exactly."""
    families = load_families()
    src = synth(tmp_path / "src", families[name], precision=precision).path
    out = convert(make_bf16_plan(opened(src), families), tmp_path / "out", "dequantize").out
    ids, windows = np.random.default_rng(0).integers(0, 256, 64), [slice(0, 64)]
    states = [final_states(model_of(folder), ids, windows) for folder in (src, out)]
    assert (states[0][windows[0]] == states[1][windows[0]]).all()


def test_a_model_agrees_with_itself(trained: Path) -> None:
    evaluation = run(trained, trained, tokens=600)
    assert evaluation.perplexity == evaluation.parent_perplexity
    assert evaluation.kl == pytest.approx(0, abs=1e-9)
    assert evaluation.agreement == 1
    assert [layer.agreement for layer in evaluation.routing] == [1.0, 1.0, 1.0]


def test_an_evaluation_measures_the_loss_by_quantization(trained: Path) -> None:
    evaluation = run(trained, TRAINED, tokens=2000)
    assert evaluation.kl is not None
    assert 0.001 < evaluation.kl < 0.05
    assert evaluation.router_agreement is not None
    assert 0.9 < evaluation.router_agreement < 1
    for layer in evaluation.routing:
        assert layer.parent_usage is not None
        assert sum(layer.usage) == sum(layer.parent_usage) == 2000 * 4
    assert json.loads(json.dumps(evaluation.to_json()))["routing"][2]["layer"] == 2


def test_without_a_parent_only_perplexity_is_measured() -> None:
    evaluation = run(TRAINED, tokens=300)
    assert evaluation.perplexity == run(TRAINED, TRAINED, tokens=300).parent_perplexity
    assert (evaluation.kl, evaluation.agreement, evaluation.parent_perplexity) == (None, None, None)


def test_scores_by_slices_of_the_vocabulary_equal_scores_of_all_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "_ROWS", 300)
    models = [model_of(TRAINED), model_of(TRAINED)]
    random = np.random.default_rng(0)
    hidden = [random.standard_normal((70, 256)).astype(np.float32) * 3 for _ in models]
    targets = random.integers(0, 2048, 70)
    scores = score(models, hidden, targets, WORKERS)

    head = models[0].weight("lm_head.weight", "all").astype(np.float64)
    logs = []
    for states in hidden:
        logits = states @ head.T
        logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    np.testing.assert_allclose(scores.losses[0], -logs[0][np.arange(70), targets], rtol=1e-4)
    divergence = (np.exp(logs[1]) * (logs[1] - logs[0])).sum(axis=1)
    assert scores.divergence is not None
    np.testing.assert_allclose(scores.divergence, divergence, rtol=1e-4)
    assert (scores.agree == (logs[0].argmax(1) == logs[1].argmax(1))).all()


def test_states_have_the_same_bytes_whatever_the_number_of_workers() -> None:
    ids = np.random.default_rng(0).integers(0, 2048, 3000)
    windows = [slice(at, min(at + 256, 3000)) for at in range(0, 3000, 256)]
    results = []
    for count in (1, 2, 3):
        with Workers(count) as workers:
            results.append(final_states(model_of(TRAINED, workers=workers), ids, windows).tobytes())
    assert len(set(results)) == 1


def test_windows_are_independent() -> None:
    model = model_of(TRAINED)
    ids = np.arange(40)
    both = final_states(model, ids, [slice(0, 20), slice(20, 40)])
    alone = final_states(model, ids[20:], [slice(0, 20)])
    np.testing.assert_allclose(both[20:], alone, rtol=1e-4, atol=1e-5)


def test_experts_without_tokens_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "src", experts=16, shards=1)
    model = model_of(folder)
    read: list[str] = []
    weight = model.weight

    def record(name: str, use: str) -> Any:
        read.append(name)
        return weight(name, use)

    monkeypatch.setattr(model, "weight", record)
    hidden = model.embed(np.array([5]))
    chosen = model.layer(0, hidden, [slice(0, 1)])
    assert chosen is not None
    experts = {name.split(".")[5] for name in read if ".experts." in name}
    assert experts == set(map(str, chosen[0]))


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "src", config={"model_type": "unheard_of"})
    with pytest.raises(SourceError, match="model_type unheard_of cannot be evaluated"):
        run(folder)


def test_unusable_texts_and_tokenizers_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "src")
    with pytest.raises(SourceError, match=r"src has no tokenizer\.json"):
        run(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match=r"tokenizer\.json in .*src cannot be understood"):
        run(folder)
    (folder / "tokenizer.json").write_bytes((TRAINED / "tokenizer.json").read_bytes())
    with pytest.raises(SourceError, match=r"tokenizer produces token [0-9,]+; the model has 64"):
        run(folder)
    (tmp_path / "latin").write_bytes(b"\xe4\xf6")
    with pytest.raises(SourceError, match="not UTF-8"):
        run(TRAINED, text=tmp_path / "latin")
    (tmp_path / "short").write_text("")
    with pytest.raises(SourceError, match="fewer than two tokens"):
        run(TRAINED, text=tmp_path / "short")
    with pytest.raises(DataFileError, match="none cannot be read: No such file"):
        run(TRAINED, text=tmp_path / "none")


def test_other_vocabularies_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="vocabularies of different sizes"):
        run(trained, make_checkpoint(tmp_path / "src"))


def test_a_text_of_two_tokens_has_a_finite_perplexity(trained: Path) -> None:
    assert math.isfinite(run(trained, tokens=2, context=2).perplexity)


@pytest.mark.parametrize("part", ["e_score_correction_bias", "gate.weight"])
@pytest.mark.parametrize("value", [b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\xff\xff"])
def test_a_router_that_gives_nan_or_infinity_is_named(
    part: str, value: bytes, tmp_path: Path
) -> None:
    def change(values: Any) -> None:
        values[:4] = np.frombuffer(value, np.uint8)

    edit = changed(f"model.layers.1.block_sparse_moe.{part}", data=change)
    name = f"model.layers.1.block_sparse_moe.{part}"
    fault = f"layer 1's router gives NaN or infinity: {name} holds such numbers"
    with pytest.raises(SourceError, match=fault):
        run(mutated(TRAINED, tmp_path / "bad", edit=edit), tokens=64)


def test_embeddings_of_nan_are_named(tmp_path: Path) -> None:
    edit = changed("model.embed_tokens.weight", data=setting(slice(None), 0xFF))
    with pytest.raises(SourceError, match="the embeddings give NaN or infinity"):
        run(mutated(TRAINED, tmp_path / "bad", edit=edit), tokens=64)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.1.self_attn.o_proj.weight", "layer 1 gives"),
        ("model.layers.1.block_sparse_moe.gate.weight", "layer 1's router gives"),
        ("lm_head.weight", "the logits give"),
    ],
)
def test_finite_weights_whose_results_overflow_are_not_called_infinite(
    name: str, where: str, tmp_path: Path
) -> None:
    largest = np.frombuffer(b"\x7f\x7f", np.uint8)  # BF16's largest number

    def change(values: Any) -> None:
        values.reshape(-1, 2)[:] = largest

    bad = mutated(TRAINED, tmp_path / "bad", edit=changed(name, data=change))
    with pytest.raises(SourceError, match=f"{where} NaN or infinity, although the weights") as told:
        run(bad, tokens=64)
    assert told.value.message.endswith(f"e+38, in {name}.")
