"""`mquant card` writes facts only, and the same bytes each time."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from typer.testing import CliRunner

from cards import (
    PARENT,
    card_of,
    edit_json,
    from_hub,
    metadata,
    quantized,
    run_card,
    src,
    stored,
)
from corpus import OF_NVFP4A16
from fakehub import FakeHub, hub
from judges import hashes, read_json
from mquant.cli.app import app
from mquant.runs.quantize import quantize
from run import TRAINED, plan_of
from uploads import metadata_errors

__all__ = ["hub", "quantized", "src"]

EVALUATED = {
    "schema": "mquant.eval/1",
    "ok": True,
    "source": "org/Tiny-NVFP4",
    "text": {"name": "heldout.txt"},
    "tokens": 8192,
    "context": 512,
    "perplexity": 12.5,
    "parent_perplexity": 12.34567,
    "kl_nats": 0.0043,
    "top1_agreement": 0.975,
}
COMPARED = {
    "schema": "mquant.compare/1",
    "ok": True,
    "source": "Tiny-NVFP4",
    "roles": [
        {"role": "expert", "identical": 0, "relative_error": 0.0948},
        {"role": "router", "identical": 3, "relative_error": None},
    ],
}


def test_the_card_says_what_the_checkpoint_is(src: Path) -> None:
    card = card_of(src)
    for fact in (
        "| Architecture | `MiniMaxM2ForCausalLM` (minimax_m2) |",
        "| Quantization | NVFP4A16, `compressed-tensors`, `nvfp4-pack-quantized` |",
        "| Layers | 3 |",
        "| Experts | 10, pruned from 256 |",
        "| Experts per token | 4 |",
        "| Parameters | 3.03 million (3,025,118) |",
        # 3,025,118 without the 6 of 10 experts (1,474,560 all together) that are not chosen
        "| Active per token | 2.14 million (2,140,382), embeddings and lm\\_head included |",
        "| Context | 2,048 tokens |",
        "| Size | 3.28 MB (3.13 MiB) in 1 shard |",
        "| expert | 90 | 0 | 1,474,560 |",
        "| router | 0 | 3 | 7,680 |",
    ):
        assert fact in card


def test_the_command_on_the_card_names_the_calibration_data(src: Path) -> None:
    fingerprint = read_json(src / "mquant.json")["fingerprint"]
    made_with = {**fingerprint, "data": "a" * 64, "importance": "none"}
    edit_json(src / "mquant.json", fingerprint=made_with)
    card = card_of(src)
    assert "--recipe nvfp4 --data DATA -o" in card
    assert f"`DATA` has the sha256 `{'a' * 64}`." in card
    edit_json(src / "mquant.json", fingerprint={**fingerprint, "data": "org/text"})
    assert "`DATA` is the dataset `org/text`." in card_of(src)


def test_the_ignore_list_on_the_card_is_exact_and_counted(src: Path) -> None:
    card = card_of(src)
    assert "`ignore` in config.json has 5 entries, exact names." in card
    assert "| `model.layers.{0..2}.block_sparse_moe.gate` | 3 |" in card
    assert "| `lm_head` | 1 |" in card


def test_the_card_has_the_verdict_and_the_rules_that_were_checked(src: Path) -> None:
    card = card_of(src, "--from", TRAINED)
    assert "Clean for vLLM 0.32: 327 tensors, 102 quantized modules, checked structure and " in card
    assert "`router-quantized`" in card
    assert "`scale-not-finite`" in card
    assert "`kept-tensor-differs`" in card
    assert "| `tensor-parallel` | info |" in card


def test_the_card_names_the_engines_and_the_command_that_serves(src: Path) -> None:
    card = card_of(src)
    assert "```sh\nvllm serve ./Tiny-NVFP4\n```" in card
    engines = {"vLLM 0.32.0": "yes", "SGLang 0.5.23 or newer": "yes", "TensorRT-LLM": "no"}
    engines |= {"transformers 5.17": "wrongly", "llama.cpp": "no"}
    for engine, loads in engines.items():
        assert f"| {engine} | {loads} |" in card
    assert "| `top_k` | `40` |" in card
    # K and V, 3 layers, 2 heads of 32, 2 bytes
    assert "The KV cache takes 768 bytes a token in 16 bits, 1.50 MiB for the whole context" in card


@pytest.mark.parametrize(("recipe", "number_format"), [("fp8-dynamic", "8-bit floating point")])
def test_the_card_of_another_scheme_claims_only_what_was_checked(
    tmp_path: Path, recipe: str, number_format: str
) -> None:
    out = tmp_path / "Tiny"
    quantize(plan_of(TRAINED, recipe), out)
    assert run_card(out).exit_code == 0
    card = (out / "README.md").read_text("utf-8")
    assert re.search(rf"\| vLLM 0.32.0 \| yes \| .*{number_format}.*not run on a GPU", card)
    assert "SGLang" not in card


def test_the_card_has_the_command_and_every_checksum(src: Path) -> None:
    card = card_of(src, "--from", TRAINED)
    assert "```sh\nmquant quantize ./tiny-minimax-m2 --recipe nvfp4 -o Tiny-NVFP4\n```" in card
    recorded = {name: digest for name, digest in hashes(src).items() if name != "mquant.json"}
    del recorded["README.md"]
    for name, digest in recorded.items():
        assert f"\n{digest}  {name}\n" in card


def test_the_licence_of_a_parent_without_metadata_is_its_file_and_nothing_is_guessed(
    src: Path,
) -> None:
    card = card_of(src, "--from", TRAINED)
    front = metadata(card)
    assert (front["license"], front["license_link"]) == ("other", "LICENSE")
    assert not {"license_name", "base_model", "base_model_relation", "language"} & front.keys()
    (src / "LICENSE").unlink()
    assert "license" not in metadata(card_of(src))


def test_the_card_has_facts_of_the_parent_that_mquant_json_names(src: Path, hub: FakeHub) -> None:
    commit = from_hub(src, hub)
    card = card_of(src)
    assert metadata(card) == {
        "base_model": PARENT,
        "base_model_relation": "quantized",
        "language": ["en", "zh"],
        "library_name": "vllm",
        "license": "other",
        "license_link": "https://example.org/licence",
        "license_name": "modified-mit",
        "pipeline_tag": "text-generation",
        "tags": ["nvfp4", "compressed-tensors", "minimax_m2", "reap", "mquant"],
    }
    assert "| Pruning | The parent's card: “Made of org/Original with REAP (Router-weighted" in card
    assert "| Pruned from | org/Original |" in card
    assert f"mquant quantize {PARENT} --revision {commit} --recipe nvfp4 -o Tiny-NVFP4" in card
    read = {request.path.rpartition("/")[2] for request in hub.requests}
    assert read <= {"README.md", f"{commit}?blobs=true"}, "no more of it is read"


def test_a_parent_that_cannot_be_read_leaves_its_facts_out(src: Path, hub: FakeHub) -> None:
    from_hub(src, hub)
    hub.repos.clear()
    result = run_card(src)
    assert f"There is no repo {PARENT}" in result.stderr
    front = metadata((src / "README.md").read_text(encoding="utf-8"))
    assert front["base_model"] == PARENT
    assert "license_name" not in front


def test_the_hub_accepts_the_metadata_of_the_card(src: Path, hub: FakeHub) -> None:
    from_hub(src, hub)
    card = card_of(src)
    assert metadata_errors(card) == []
    HfApi(endpoint=hub.url)._validate_yaml(card)
    assert ModelCard(card).data.get("base_model_relation") == "quantized"


def test_accuracy_is_not_measured_or_measured(src: Path, tmp_path: Path) -> None:
    assert "## Accuracy\n\nNot measured.\n" in card_of(src)
    evaluated, compared = stored(tmp_path / "e", EVALUATED), stored(tmp_path / "c", COMPARED)
    card = card_of(src, "--eval", evaluated, "--compare", compared)
    assert (
        "| Perplexity of the checkpoint | 12.5000 |\n| Perplexity of the parent | 12.3457 |" in card
    )
    assert "| KL divergence from the parent | 0.00430 nats per token |" in card
    assert "| The parent's most likely token | 97.50% of positions |" in card
    assert "By `mquant eval` on `heldout.txt`, 8,192 tokens, windows of 512." in card
    assert "| Relative L2 error of the weights, expert | 0.0948 |" in card
    assert "weights, router" not in card
    assert "Not measured." not in card


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": "mquant.plan/1"}, "is no result of mquant eval (mquant.eval/1)."),
        ({"ok": False}, "describes a run of mquant eval that failed."),
        ({"source": "Other"}, "is about Other, not about Tiny-NVFP4."),
    ],
)
def test_figures_of_something_else_are_refused(
    src: Path, tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    wrong = stored(tmp_path / "w", {**EVALUATED, **change})
    assert f"{wrong} {sentence}" in run_card(src, "--eval", wrong, code=1).stderr
    assert not (src / "README.md").exists()


def test_the_card_lists_repairs_as_changes(src: Path, tmp_path: Path) -> None:
    bad = next(c for c in OF_NVFP4A16 if c.name == "one router quantized").make(src, tmp_path / "b")
    good = tmp_path / "good"
    command = ["repair", str(bad), "--from", str(TRAINED), "-o", str(good)]
    assert CliRunner().invoke(app, command).exit_code == 0
    card = card_of(good)
    assert "### Changes since" in card
    assert "1 tensor of router made again from the parent" in card
    assert "`router-quantized`" in card.partition("### Changes since")[2]


def test_the_facts_of_the_publisher_come_from_a_file(src: Path, tmp_path: Path) -> None:
    about = tmp_path / "about.yaml"
    about.write_text(
        "repo: org/Tiny-NVFP4\nbase_model: org/Base\n"
        "companions: [{repo: org/Other, what: 'in FP8'}]\n"
        "citation: |\n  @misc{x,\n    title = {```}\n  }\n",
        encoding="utf-8",
    )
    card = card_of(src, "--about", about)
    assert metadata(card)["base_model"] == "org/Base"
    assert "# org/Tiny-NVFP4\n" in card
    assert "vllm serve org/Tiny-NVFP4\n" in card
    assert "| [org/Other](https://huggingface.co/org/Other) | in FP8 |" in card
    assert "````\n@misc{x,\n  title = {```}\n}\n````\n" in card
    about.write_text("home: x\n", encoding="utf-8")
    assert (
        "about.yaml: home: Extra inputs are not permitted."
        in run_card(src, "--about", about, code=1).stderr
    )


def test_the_card_is_the_same_each_time_and_no_other_file_changes(src: Path) -> None:
    before = hashes(src)
    first = card_of(src, "--from", TRAINED)
    assert card_of(src, "--from", TRAINED) == first
    after = hashes(src)
    del after["README.md"]
    assert after == before


def test_a_hub_repo_gets_a_card_too(src: Path, tmp_path: Path, hub: FakeHub) -> None:
    hub.add("org/Tiny-NVFP4", src)
    assert "say where its card goes, with -o." in run_card("org/Tiny-NVFP4", code=2).stderr
    facts = json.loads(
        run_card("org/Tiny-NVFP4", "-o", tmp_path / "CARD.md", "--format", "json").stdout
    )
    assert facts["card"] == str(tmp_path / "CARD.md")
    assert facts["repo"] == "org/Tiny-NVFP4"
    card = (tmp_path / "CARD.md").read_text(encoding="utf-8")
    assert "vllm serve org/Tiny-NVFP4\n" in card
    assert "checked structure." in card
